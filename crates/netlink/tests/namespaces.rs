//! rtnetlink and namespaces against the real kernel. Needs root; touches only namespaces that it makes.
#![allow(clippy::unwrap_used, reason = "a test ends where something that it needs does not hold")]

use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use keelson_netlink::netns::{self, Kind, Netns};
use keelson_netlink::route::{
    Group, InetSetting, LinkChange, Mac, Neighbour, Route, RouteKind, RoutingRule, Rtnl,
    RuleAction, Scope, VethEnd, VethPair,
};
use keelson_netlink::sysctl;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pair(near: &Netns, far: &Netns) -> (Rtnl, Rtnl, u32, u32) {
    let mut here = Rtnl::open_in(near).unwrap();
    here.create_veth(&VethPair {
        near: VethEnd { name: "left", mac: Some(Mac([2, 0, 0, 0, 0, 1])), netns: None },
        far: VethEnd { name: "eth0", mac: Some(Mac([2, 0, 0, 0, 0, 2])), netns: Some(far.as_fd()) },
        mtu: Some(1400),
    })
    .unwrap();
    let mut there = Rtnl::open_in(far).unwrap();
    there.set_up("eth0").unwrap();
    let left = here.link("left").unwrap().unwrap().index;
    let eth0 = there.link("eth0").unwrap().unwrap().index;
    (here, there, left, eth0)
}

#[test]
fn a_veth_pair_is_born_in_both_namespaces_and_dies_as_one() {
    let (near, far) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let (mut here, mut there, left, _) = pair(&near, &far);
    let up = here
        .wait_for(&[Group::Link], Duration::from_secs(10), |rtnl| {
            Ok(rtnl.link(left)?.filter(|link| link.running))
        })
        .unwrap()
        .expect("carrier");
    assert_eq!((up.mtu, up.kind.as_deref()), (1400, Some("veth")));
    let eth0 = there.link("eth0").unwrap().unwrap();
    assert_eq!(eth0.mac, Some(Mac([2, 0, 0, 0, 0, 2])));
    assert_eq!(up.peer, Some(eth0.index));
    assert!(here.delete_link("left").unwrap());
    assert!(!here.delete_link("left").unwrap());
    assert_eq!(there.link("eth0").unwrap(), None);
    assert_eq!(there.links().unwrap().len(), 1, "only lo is left");
}

#[test]
fn routing_rules_and_the_routes_of_a_table_come_back_as_they_were_set() {
    const TABLE: u32 = 4242;
    let mut rtnl = Rtnl::open_in(&Netns::anonymous().unwrap()).unwrap();
    rtnl.set_up("lo").unwrap();
    for (ipv6, all) in [(false, "0.0.0.0/0"), (true, "::/0")] {
        let before = rtnl.rules().unwrap();
        let rule = |priority, mark, input: Option<&str>, action| RoutingRule {
            ipv6,
            priority,
            mark,
            input: input.map(str::to_owned),
            protocol: 99,
            action,
        };
        let rules = [
            rule(7, None, None, RuleAction::Nothing),
            rule(6, Some((0x2000, 0x2000)), None, RuleAction::Table(TABLE)),
            rule(5, None, Some("lo"), RuleAction::Goto(7)),
        ];
        for rule in &rules {
            assert!(rtnl.add_rule(rule).unwrap());
            assert!(!rtnl.add_rule(rule).unwrap());
        }
        let found = rtnl.rules().unwrap();
        assert!(rules.iter().all(|rule| found.contains(rule)), "{found:?}");
        let count = rtnl.routes_of(TABLE).unwrap().len();
        let route = Route {
            link: Some(1),
            kind: RouteKind::Local,
            table: TABLE,
            scope: if ipv6 { Scope::Universe } else { Scope::Other(254) },
            ..Route::to(all.parse().unwrap())
        };
        rtnl.ensure_route(&route).unwrap();
        let routes = rtnl.routes_of(TABLE).unwrap();
        assert_eq!(routes.len(), count + 1);
        assert!(routes.iter().any(|found| found.kind == RouteKind::Local
            && found.destination == route.destination
            && found.link == Some(1)));
        for rule in &rules {
            assert!(rtnl.delete_rule(rule).unwrap());
            assert!(!rtnl.delete_rule(rule).unwrap());
        }
        assert_eq!(rtnl.rules().unwrap(), before);
    }
}

#[test]
fn a_neighbour_that_nobody_asked_for_long_is_checked() {
    const HUNG: Duration = Duration::from_secs(20);
    let (near, far) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let (mut here, mut there, left, eth0) = pair(&near, &far);
    here.ensure_address(left, "192.0.2.1/24".parse().unwrap()).unwrap();
    there.ensure_address(eth0, "192.0.2.2/24".parse().unwrap()).unwrap();
    let neighbour = address("192.0.2.2");
    let set = |setting: &str, value: &str| {
        let path = format!("net/ipv4/neigh/left/{setting}");
        near.run(|| sysctl::write(&path, value)).unwrap().unwrap();
    };
    let becomes = |here: &mut Rtnl, stale: bool| {
        let found = here.wait_for(&[Group::Neighbour], HUNG, |rtnl| {
            let all = rtnl.neighbours()?;
            let is = |n: &Neighbour| n.address == neighbour && n.mac.is_some() && n.stale == stale;
            Ok(all.iter().any(is).then_some(()))
        });
        assert!(found.unwrap().is_some(), "it never is {}", if stale { "stale" } else { "there" });
    };
    assert!(!here.check_neighbour(left, neighbour).unwrap());
    set("delay_first_probe_time", "0");
    set("base_reachable_time_ms", "1");
    near.run(|| UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"", (neighbour, 9)).unwrap())
        .unwrap();
    becomes(&mut here, true);
    set("base_reachable_time_ms", "600000");
    assert!(here.check_neighbour(left, neighbour).unwrap());
    becomes(&mut here, false);
}

#[test]
fn addresses_routes_and_neighbours_come_back_as_they_were_set() {
    let (near, far) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let (mut here, mut there, left, eth0) = pair(&near, &far);
    for (ours, gateway) in [("10.66.0.2/32", "169.254.1.1"), ("fd66::2/128", "fe80::1")] {
        there.ensure_address(eth0, ours.parse().unwrap()).unwrap();
        there.ensure_address(eth0, ours.parse().unwrap()).unwrap();
        let route =
            Route { onlink: true, protocol: 99, ..Route::default_via(address(gateway), eth0) };
        assert!(there.add_route(&route).unwrap());
        assert!(!there.add_route(&route).unwrap());
        there.ensure_neighbour(eth0, address(gateway), Mac([2, 0, 0, 0, 0, 1])).unwrap();
        let host = ours.split('/').next().unwrap();
        here.ensure_route(&Route { protocol: 99, ..Route::host(address(host), left) }).unwrap();
    }
    let addresses = there.addresses(Some(eth0)).unwrap();
    let global: Vec<_> = addresses
        .iter()
        .filter(|a| !a.network.ip().to_string().starts_with("fe80"))
        .map(|a| (a.network.to_string(), a.tentative))
        .collect();
    assert_eq!(global, [("10.66.0.2/32".into(), false), ("fd66::2/128".into(), false)]);
    let routes = there.routes().unwrap();
    let defaults: Vec<_> = routes.iter().filter(|r| r.protocol == 99).collect();
    assert_eq!(defaults.len(), 2);
    assert!(defaults.iter().all(|r| r.destination.prefix() == 0 && r.link == Some(eth0)));
    let neighbours = there.neighbours().unwrap();
    assert_eq!(neighbours.iter().filter(|n| n.permanent && n.link == eth0).count(), 2);
    let ours: Vec<_> = here.routes().unwrap().into_iter().filter(|r| r.protocol == 99).collect();
    assert_eq!(ours.len(), 2);
    assert_eq!(ours[0].scope, Scope::Link);
    for route in &ours {
        assert!(here.delete_route(route).unwrap());
        assert!(!here.delete_route(route).unwrap());
    }
    assert!(there.delete_neighbour(eth0, address("fe80::1")).unwrap());
    assert!(there.delete_address(eth0, "10.66.0.2/32".parse().unwrap()).unwrap());
    assert!(!there.delete_address(eth0, "10.66.0.2/32".parse().unwrap()).unwrap());
}

#[test]
fn link_settings_change_without_files() {
    let (near, far) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let (mut here, _, left, _) = pair(&near, &far);
    let change = LinkChange {
        inet: &[(InetSetting::RpFilter, 1), (InetSetting::ProxyArp, 1)],
        alias: Some("a pod"),
        ..LinkChange::default()
    };
    here.change_link(left, &change).unwrap();
    assert_eq!(here.link(left).unwrap().unwrap().alias.as_deref(), Some("a pod"));
    let read = |key: &'static str| near.run(move || sysctl::read(key)).unwrap().unwrap();
    assert_eq!(read("net/ipv4/conf/left/rp_filter"), "1");
    assert_eq!(read("net/ipv4/conf/left/proxy_arp"), "1");
    assert!(near.run(|| sysctl::ensure("net/ipv4/ip_forward", "1")).unwrap().unwrap());
    assert!(!near.run(|| sysctl::ensure("net/ipv4/ip_forward", "1")).unwrap().unwrap());
    assert_eq!(far.run(|| sysctl::read("net/ipv4/ip_forward")).unwrap().unwrap(), "0");
}

#[test]
fn the_kernels_words_reach_the_caller() {
    let netns = Netns::anonymous().unwrap();
    let mut rtnl = Rtnl::open_in(&netns).unwrap();
    let route = Route::default_via(address("192.0.2.1"), 1);
    let error = rtnl.add_route(&route).unwrap_err();
    assert!(error.errno().is_some(), "{error}");
    assert!(error.to_string().contains('('), "no extended text: {error}");
}

#[test]
fn namespaces_are_pinned_opened_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pod");
    let netns = Netns::create(&path).unwrap();
    assert!(Netns::create(&path).is_err(), "a pinned path is not taken over");
    let again = Netns::open(&path).unwrap();
    assert_eq!(netns.identity().unwrap(), again.identity().unwrap());
    assert_ne!(netns.identity().unwrap(), Netns::current().unwrap().identity().unwrap());
    netns::delete(&path).unwrap();
    netns::delete(&path).unwrap();
    assert!(!path.exists());
    assert!(Netns::open(&path).is_err());
}

#[test]
fn a_set_of_namespaces_is_pinned_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let (net, ipc, uts) = (dir.path().join("net"), dir.path().join("ipc"), dir.path().join("uts"));
    let wanted = [(Kind::Net, net.as_path()), (Kind::Ipc, &ipc), (Kind::Uts, &uts)];
    netns::pin(&wanted, || Ok(nix::unistd::sethostname("pod-7")?)).unwrap();
    for path in [&net, &ipc, &uts] {
        netns::delete(path).unwrap();
    }
    let wanted = [(Kind::Net, net.as_path()), (Kind::Ipc, &dir.path().join("no/ipc"))];
    let error = netns::pin(&wanted, || Ok(())).unwrap_err();
    assert!(error.to_string().contains("no/ipc"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_file_that_is_no_namespace_is_named() {
    let error = Netns::open(std::path::Path::new("/etc/hostname")).unwrap_err();
    assert_eq!(error.to_string(), "cannot open network namespace /etc/hostname");
}
