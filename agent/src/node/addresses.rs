//! The addresses under which the node says it can be reached.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The configured addresses, or else one per family from the link that has the default route, or
/// else from the first link that has a usable address.
pub fn node_addresses(configured: &[IpAddr]) -> Vec<IpAddr> {
    let configured: Vec<IpAddr> =
        configured.iter().copied().filter(|ip| !ip.is_unspecified()).collect();
    if !configured.is_empty() {
        return configured;
    }
    let routes = std::fs::read_to_string("/proc/self/net/route").unwrap_or_default();
    choose(&link_addresses(), default_route_link(&routes))
}

/// Every address of every link, in the kernel's order.
fn link_addresses() -> Vec<(String, IpAddr)> {
    let Ok(links) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    links
        .filter_map(|link| {
            let address = link.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            let v6 = address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip()));
            Some((link.interface_name, v4.or(v6)?))
        })
        .collect()
}

/// The link of the IPv4 default route: destination and mask are both zero.
fn default_route_link(routes: &str) -> Option<&str> {
    routes.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
        is_default.then(|| fields.first().copied()).flatten()
    })
}

fn choose(addresses: &[(String, IpAddr)], default_link: Option<&str>) -> Vec<IpAddr> {
    let pick = |v6: bool| {
        let usable = |(_, ip): &&(String, IpAddr)| ip.is_ipv6() == v6 && is_usable(*ip);
        let on_default = |(link, _): &&(String, IpAddr)| default_link == Some(link.as_str());
        let mut candidates = addresses.iter().filter(usable);
        let first = candidates.clone().find(on_default).or_else(|| candidates.next());
        first.map(|(_, ip)| *ip)
    };
    pick(false).into_iter().chain(pick(true)).collect()
}

fn is_usable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && ip != Ipv4Addr::UNSPECIFIED,
        IpAddr::V6(ip) => {
            !ip.is_loopback() && !ip.is_unicast_link_local() && ip != Ipv6Addr::UNSPECIFIED
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, ip: &str) -> (String, IpAddr) {
        (name.to_owned(), ip.parse().unwrap())
    }

    #[test]
    fn the_default_routes_link_comes_first() {
        let routes = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n\
                      eth1 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n\
                      eth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0\n";
        assert_eq!(default_route_link(routes), Some("eth0"));
        let links = [
            link("lo", "127.0.0.1"),
            link("eth1", "192.0.2.9"),
            link("eth0", "169.254.1.1"),
            link("eth0", "192.0.2.7"),
            link("eth0", "fe80::1"),
            link("eth1", "2001:db8::9"),
        ];
        let want: Vec<IpAddr> = vec!["192.0.2.7".parse().unwrap(), "2001:db8::9".parse().unwrap()];
        assert_eq!(choose(&links, Some("eth0")), want);
        assert_eq!(choose(&links, None)[0], "192.0.2.9".parse::<IpAddr>().unwrap());
        assert!(choose(&links[..1], None).is_empty());
    }

    #[test]
    fn configured_addresses_win() {
        let configured = ["192.0.2.1".parse().unwrap()];
        assert_eq!(node_addresses(&configured), configured);
    }
}
