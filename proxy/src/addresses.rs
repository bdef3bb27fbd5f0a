//! The node's own addresses, and when they change.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};

use ipnetwork::IpNetwork;
use keelson_netlink::route::{Group, Monitor};

/// All addresses of the calling thread's network namespace.
pub(crate) fn own() -> std::io::Result<Vec<IpAddr>> {
    let addresses = nix::ifaddrs::getifaddrs()?.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    Ok(addresses.collect())
}

/// Where a server of this process listens so that it is where node ports are, as kube-proxy's do: at all
/// addresses of a family where nothing limits it, else at those of the node's own that are in a range.
pub(crate) fn of_node_ports(ranges: &[IpNetwork], own: &[IpAddr]) -> BTreeSet<IpAddr> {
    let mut found = BTreeSet::new();
    for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        let ranges = || ranges.iter().filter(|range| range.is_ipv4() == any.is_ipv4());
        if ranges().next().is_none() || ranges().any(|range| range.prefix() == 0) {
            found.insert(any);
            continue;
        }
        // Nobody can listen at an address of a link without naming the link.
        let of_link = |address: &IpAddr| match address {
            IpAddr::V4(_) => false,
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        let own = own.iter().filter(|address| !of_link(address));
        found.extend(own.filter(|address| ranges().any(|range| range.contains(**address))));
    }
    found
}

/// Tells when the addresses change.
pub(crate) struct Changes(Monitor);

impl Changes {
    /// Listens in the network namespace of the calling thread.
    pub(crate) fn follow() -> Option<Self> {
        let monitor = Monitor::open(&[Group::Ipv4Address, Group::Ipv6Address]);
        let monitor = monitor.inspect_err(|error| {
            tracing::warn!(%error, "Changes of the node's addresses stay unnoticed");
        });
        monitor.ok().map(Changes)
    }

    /// Readable when there is something to [`Changes::read`].
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Takes note of what was told until now; then the addresses are to be read anew.
    pub(crate) fn read(&mut self) {
        if let Err(error) = self.0.drain() {
            tracing::debug!(%error, "News of addresses were lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_listen_where_node_ports_are() {
        let own = ["127.0.0.1", "192.0.2.1", "192.0.2.2", "::1", "2001:db8::1", "fe80::1"];
        let own = own.map(|address| address.parse().unwrap());
        let check = |ranges: &[&str], expected: &[&str]| {
            let ranges: Vec<_> = ranges.iter().map(|range| range.parse().unwrap()).collect();
            let expected = expected.iter().map(|address| address.parse().unwrap()).collect();
            assert_eq!(of_node_ports(&ranges, &own), expected, "{ranges:?}");
        };
        check(&[], &["0.0.0.0", "::"]);
        check(&["0.0.0.0/0", "192.0.2.1/32"], &["0.0.0.0", "::"]);
        check(&["192.0.2.0/24", "127.0.0.0/8"], &["127.0.0.1", "192.0.2.1", "192.0.2.2", "::"]);
        check(&["192.0.2.2/32", "2001:db8::1/128"], &["192.0.2.2", "2001:db8::1"]);
        // Nowhere, rather than everywhere, until the address is there.
        check(&["198.51.100.1/32", "fe80::/10"], &[]);
    }
}
