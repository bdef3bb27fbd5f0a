//! What only the IPVS mode has: virtual servers that others can look at, and the ways that lead to them.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use keelson_netlink::ipvs::{Command, Ipvs, Key, Real, Virtual};
use keelson_proxy::cleanup;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

use crate::stage::*;

rows![
    a_virtual_server_for_each_address_and_node_port,
    a_real_server_goes_with_its_last_connection,
    for_clients_that_stick_the_scheduler_chooses_too,
    no_program_of_the_node_answers_at_a_services_address,
    the_scheduler_is_the_one_that_was_asked_for,
    node_ports_follow_the_nodes_addresses,
    what_is_removed_is_noticed_by_the_clock,
    kube_proxys_virtual_servers_go_and_no_others,
    a_clean_up_removes_the_ways_too,
];

fn only_ipvs(mode: Mode) {
    if mode != Mode::Ipvs {
        skip("this is about IPVS");
    }
}

fn key(to: &str, protocol: u8) -> Key {
    let to: SocketAddr = to.parse().unwrap();
    Key { address: to.ip(), protocol, port: to.port() }
}

fn virtuals(node: &Node) -> Vec<Virtual> {
    node.namespace.run(|| Ipvs::open().unwrap().virtuals().unwrap())
}

/// Address and weight of each real server.
fn reals(node: &Node, key: Key) -> Vec<(String, u32)> {
    let found = node.namespace.run(|| Ipvs::open().unwrap().reals(key).unwrap());
    let mut reals: Vec<_> =
        found.iter().map(|found| (found.real.at.to_string(), found.real.weight)).collect();
    reals.sort();
    reals
}

fn perform(node: &Node, commands: &[Command]) {
    node.namespace.run(|| Ipvs::open().unwrap().perform(commands).unwrap());
}

/// Waits for the alarm, as the engine does, until it is as wanted.
#[track_caller]
fn with_the_alarm(node: &mut Node, mut wanted: impl FnMut(&mut Node, bool) -> bool) {
    const RINGS: u32 = 60;
    for _ in 0..RINGS {
        let backend = node.backend.as_mut().unwrap();
        let mut waiting = [PollFd::new(backend.alarm(), PollFlags::POLLIN)];
        assert!(poll(&mut waiting, PollTimeout::from(20_000u16)).unwrap() > 0, "no alarm");
        let disturbed = backend.disturbed().unwrap();
        if wanted(node, disturbed) {
            return;
        }
    }
    panic!("never");
}

fn a_virtual_server_for_each_address_and_node_port(mode: Mode) {
    only_ipvs(mode);
    let mut node = Node::new(mode);
    let external = json!({"externalIPs": ["198.51.100.1"]});
    node.service("web", with(node_port(cluster_ip(1, "TCP", 80), 30080), external));
    node.ready("web", "TCP", 8080, &[2, 3]);
    node.service("dns", cluster_ip(2, "UDP", 53));
    node.ready("dns", "UDP", 5353, &[4]);
    node.service("empty", cluster_ip(3, "TCP", 80));
    node.apply();
    let found: BTreeSet<String> = virtuals(&node)
        .iter()
        .map(|found| format!("{} {} {}", found.key, found.scheduler, found.persistent))
        .collect();
    let wanted = [
        "10.96.0.1:80/tcp",
        "198.51.100.1:80/tcp",
        "203.0.113.2:30080/tcp",
        "[2001:db8::2]:30080/tcp",
        "[fd96::1]:80/tcp",
        "10.96.0.2:53/udp",
        "[fd96::2]:53/udp",
    ];
    assert_eq!(found, wanted.map(|key| format!("{key} rr false")).into());
    let web = ["10.66.0.2:8080", "10.66.0.3:8080"].map(|at| (at.to_owned(), 1));
    assert_eq!(reals(&node, key("10.96.0.1:80", 6)), web);
    assert_eq!(reals(&node, key(&format!("{NODE4}:30080"), 6)), web);
    assert_eq!(reals(&node, key("[fd96::2]:53", 17)), [("[fd66::4]:5353".to_owned(), 1)]);
    // Their addresses are on no interface.
    let addresses = node.namespace.rtnl().addresses(None).unwrap();
    assert!(!addresses.iter().any(|a| a.network.ip().to_string() == "10.96.0.1"));
}

fn a_real_server_goes_with_its_last_connection(mode: Mode) {
    only_ipvs(mode);
    let mut node = Node::new(mode);
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let _other = node.pod("other", 3).serving("TCP", 8080);
    let listener = server.namespace.run(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let mut stream = client.namespace.run(|| TcpStream::connect("10.96.0.1:80").unwrap());
    let (accepted, _) = listener.accept().unwrap();
    let web = key("10.96.0.1:80", 6);
    let with_weights =
        |old, new| vec![("10.66.0.2:8080".to_owned(), old), ("10.66.0.3:8080".to_owned(), new)];
    node.ready("web", "TCP", 8080, &[3]);
    node.apply();
    assert_eq!(reals(&node, web), with_weights(0, 1));
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 10), ["other"]);
    // Also a new process leaves it alone, and does not mind.
    assert_eq!(node.restart(), 0);
    node.assert_as_planned();
    assert_eq!(reals(&node, web), with_weights(0, 1));
    stream.write_all(b"ping").unwrap();
    // It comes back, and goes again.
    node.ready("web", "TCP", 8080, &[2, 3]);
    node.apply();
    assert_eq!(reals(&node, web), with_weights(1, 1));
    node.delete_service("web");
    node.apply();
    let draining = |node: &Node| reals(node, web).iter().any(|(at, _)| at == "10.66.0.2:8080");
    assert!(draining(&node));
    assert_eq!(node.restart(), 0);
    stream.write_all(b"pong").unwrap();
    // A reset: the kernel remembers such a connection for ten seconds, a closed one for two minutes.
    nix::sys::socket::setsockopt(
        &stream,
        nix::sys::socket::sockopt::Linger,
        &nix::libc::linger { l_onoff: 1, l_linger: 0 },
    )
    .unwrap();
    drop((stream, accepted));
    with_the_alarm(&mut node, |node, _| !draining(node));
}

fn for_clients_that_stick_the_scheduler_chooses_too(mode: Mode) {
    only_ipvs(mode);
    let mut node = Node::new(mode);
    let clients: Vec<Pod> = (10..14).map(|n| node.pod(&format!("client{n}"), n)).collect();
    let _a = node.pod("a", 2).serving("TCP", 8080);
    let _b = node.pod("b", 3).serving("TCP", 8080);
    let sticky = json!({"sessionAffinity": "ClientIP"});
    node.service("web", with(node_port(cluster_ip(1, "TCP", 80), 30080), sticky));
    node.ready("web", "TCP", 8080, &[2, 3]);
    node.apply();
    for (vip, port) in
        [("10.96.0.1:80", format!("{NODE4}:30080")), ("[fd96::1]:80", format!("[{NODE6}]:30080"))]
    {
        let first: Vec<String> =
            clients.iter().map(|client| client.namespace.tcp(vip).unwrap().server).collect();
        // Round robin.
        assert!(first[0] != first[1] && first[1] != first[2] && first[2] != first[3], "{first:?}");
        for (client, first) in clients.iter().zip(&first) {
            assert_eq!(servers(&client.namespace, vip, 4), std::slice::from_ref(first));
            assert_eq!(servers(&client.namespace, &port, 4), std::slice::from_ref(first));
        }
    }
}

fn no_program_of_the_node_answers_at_a_services_address(mode: Mode) {
    only_ipvs(mode);
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let _programs = [80, 9999].map(|port| node.namespace.serve("host", "TCP", port));
    let external = json!({"externalIPs": ["198.51.100.1"]});
    node.service("web", with(cluster_ip(1, "TCP", 80), external));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    for from in [&client.namespace, &node.outside] {
        for address in ["10.96.0.1", "[fd96::1]", "198.51.100.1"] {
            assert_eq!(from.tcp(&format!("{address}:80")).unwrap().server, "one");
            assert!(from.tcp(&format!("{address}:9999")).is_err(), "{address}");
        }
        assert_eq!(from.tcp(&format!("{NODE4}:9999")).unwrap().server, "host");
    }
    // Not even when IPVS has forgotten everything.
    perform(&node, &[Command::Flush]);
    for from in [&client.namespace, &node.outside] {
        for to in ["10.96.0.1:80", "[fd96::1]:80", "198.51.100.1:80"] {
            assert_eq!(from.tcp(to), Err(ErrorKind::ConnectionRefused), "{to}");
        }
    }
}

fn the_scheduler_is_the_one_that_was_asked_for(mode: Mode) {
    only_ipvs(mode);
    for (asked, wanted) in [("mh", "mh"), ("wlc", "wlc"), ("sed", "sed"), ("absent", "rr")] {
        let mut config = BackendConfig::default();
        config.ipvs.scheduler = asked.to_owned();
        let mut node = Node::with(mode, config);
        let client = node.pod("client", 10);
        let _one = node.pod("one", 2).serving("TCP", 8080);
        node.service("web", cluster_ip(1, "TCP", 80));
        node.ready("web", "TCP", 8080, &[2]);
        node.apply();
        assert!(virtuals(&node).iter().all(|found| found.scheduler == wanted), "{asked}");
        assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().server, "one");
        assert_eq!(node.restart(), 0);
        // Another one, while it runs.
        let config = BackendConfig::default();
        node.backend.as_mut().unwrap().configure(config.clone());
        node.config = config;
        node.adopt();
        assert!(virtuals(&node).iter().all(|found| found.scheduler == "rr"), "{asked}");
    }
}

fn node_ports_follow_the_nodes_addresses(mode: Mode) {
    only_ipvs(mode);
    let mut node = Node::new(mode);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    assert!(!node.backend.as_mut().unwrap().disturbed().unwrap());
    node.namespace.address("eth0", "203.0.113.77/24");
    let outside = |node: &Node| node.outside.tcp("203.0.113.77:30080");
    assert_eq!(outside(&node), Err(ErrorKind::ConnectionRefused));
    with_the_alarm(&mut node, |node, disturbed| {
        assert!(!disturbed);
        outside(node).is_ok()
    });
    node.assert_as_planned();
}

fn what_is_removed_is_noticed_by_the_clock(mode: Mode) {
    only_ipvs(mode);
    let mut node = Node::new(mode);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    perform(&node, &[Command::Flush]);
    // Nobody announces this.
    with_the_alarm(&mut node, |_, disturbed| disturbed);
    assert!(node.adopt() > 0);
    node.assert_as_planned();
}

fn kube_proxys_virtual_servers_go_and_no_others(mode: Mode) {
    only_ipvs(mode);
    let mut node = Node::new(mode);
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let ours = virtuals(&node).len();
    // An interface like any other, with Service addresses on it.
    let other_end = Namespace::new();
    node.namespace.connect("kube-ipvs0", &other_end, "eth0");
    node.namespace.address("kube-ipvs0", "10.96.0.50/32");
    let add = |to: &str, at: &str| {
        let new =
            Virtual { key: key(to, 6), scheduler: "rr".to_owned(), persistent: false, mark: 0 };
        let real = Real { at: at.parse().unwrap(), weight: 1 };
        perform(&node, &[Command::AddVirtual(new.clone()), Command::AddReal(new.key, real)]);
    };
    add("10.96.0.50:80", "10.66.0.9:8080");
    add(&format!("{NODE4}:31000"), "10.66.0.9:8080");
    add("198.51.100.77:80", "10.66.0.8:8080");
    node.namespace.run(|| cleanup::kube_proxy().unwrap());
    let left = virtuals(&node);
    assert_eq!(left.len(), ours + 1, "{left:?}");
    assert!(left.iter().any(|found| found.key == key("198.51.100.77:80", 6)));
    assert!(node.namespace.rtnl().link("kube-ipvs0").unwrap().is_none());
    assert_eq!(node.restart(), 0);
}

fn a_clean_up_removes_the_ways_too(mode: Mode) {
    only_ipvs(mode);
    let mut node = Node::new(mode);
    let rules = |node: &Node| node.namespace.rtnl().rules().unwrap();
    let routes = |node: &Node| node.namespace.rtnl().routes_of(27_493).unwrap().len();
    let fresh = Namespace::new().rtnl().rules().unwrap();
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    assert_eq!((rules(&node).len(), routes(&node)), (fresh.len() + 6, 2));
    node.namespace.run(|| cleanup::everything(&node.config.ebpf).unwrap());
    assert_eq!((rules(&node), routes(&node)), (fresh, 0));
    assert_eq!(virtuals(&node), []);
    assert!(!node.namespace.output("nft", &["list", "tables"]).contains("keelson"));
}
