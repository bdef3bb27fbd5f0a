//! What must not get through, and who counts as a pod.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket};

use serde_json::json;

use crate::stage::*;

rows![
    a_port_that_a_cluster_ip_does_not_have_is_refused,
    an_address_of_the_service_range_that_nobody_has_is_silent,
    nobody_outside_reaches_the_nodes_loopback,
    a_segment_that_cannot_be_translated_back_does_not_reach_the_client,
    pods_are_told_by_the_name_of_their_interface,
    pods_are_told_by_their_bridge,
    masquerading_takes_any_free_port,
];

/// Row 37.
fn a_port_that_a_cluster_ip_does_not_have_is_refused(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    for from in [&client.namespace, &node.namespace, &node.outside] {
        for to in ["10.96.0.1:81", "[fd96::1]:81"] {
            assert_eq!(from.tcp(to), Err(ErrorKind::ConnectionRefused), "{to}");
            assert_eq!(from.udp(to), Err(ErrorKind::ConnectionRefused), "{to}");
        }
        assert_eq!(from.udp("10.96.0.1:80"), Err(ErrorKind::ConnectionRefused));
        assert!(from.tcp("10.96.0.1:80").is_ok());
    }
    // A Service without any port is guarded as well.
    node.service("none", with(cluster_ip(2, "TCP", 80), json!({"ports": []})));
    node.apply();
    assert_eq!(client.namespace.tcp("10.96.0.2:80"), Err(ErrorKind::ConnectionRefused));
    // And a Service that goes takes its guard along.
    node.delete_service("web");
    node.apply();
    assert_ne!(client.namespace.tcp("10.96.0.1:81"), Err(ErrorKind::ConnectionRefused));
}

/// Row and case 38.
fn an_address_of_the_service_range_that_nobody_has_is_silent(mode: Mode) {
    let ranges = ["10.96.0.0/16", "fd96::/64"].map(|range| range.parse().unwrap());
    let service_ranges = ranges.to_vec();
    let mut node = Node::with(mode, BackendConfig { service_ranges, ..BackendConfig::default() });
    node.let_outside_have("10.96.0.9", "fd96::9");
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    for to in ["10.96.0.9:80", "[fd96::9]:80"] {
        assert_eq!(client.namespace.tcp(to), Err(ErrorKind::TimedOut), "{to}");
    }
    for from in [&client.namespace, &node.outside] {
        for to in ["10.96.0.1:80", "[fd96::1]:80"] {
            assert!(from.tcp(to).is_ok(), "{to}");
        }
    }
    // The ranges change while the proxy runs.
    let config = BackendConfig { service_ranges: Vec::new(), ..node.config.clone() };
    assert!(node.backend.as_mut().unwrap().configure(config.clone()));
    node.config = config;
    node.adopt();
    assert_eq!(client.namespace.tcp("10.96.0.9:80"), Err(ErrorKind::ConnectionRefused));
    assert_eq!(node.restart(), 0);
}

/// Row 45, CVE-2020-8558.
fn nobody_outside_reaches_the_nodes_loopback(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    // An answer would be lost on the way: what counts is whether the packet arrives.
    let victim = node.namespace.run(|| UdpSocket::bind("127.0.0.1:7777").unwrap());
    victim.set_read_timeout(Some(silence())).unwrap();
    let mut buffer = [0; 8];
    for (from, gateway) in [(&client.namespace, "10.66.0.1"), (&node.outside, NODE4)] {
        // A neighbour that does as it likes.
        from.set("ipv4/conf/all/route_localnet", "1");
        from.forget_local("127.0.0.0/8");
        from.route("127.0.0.1/32", gateway);
        from.udp_socket("127.0.0.1:7777").send(b"x").unwrap();
        assert!(victim.recv(&mut buffer).is_err());
    }
    node.namespace.udp_socket("127.0.0.1:7777").send(b"x").unwrap();
    victim.recv(&mut buffer).unwrap();
    assert_eq!(node.namespace.tcp("127.0.0.1:30080").unwrap().server, "one");
}

/// Row 43, case 47.
fn a_segment_that_cannot_be_translated_back_does_not_reach_the_client(mode: Mode) {
    let mut node = Node::new(mode);
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let listener = server.namespace.run(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let mut stream = client.namespace.run(|| TcpStream::connect("10.96.0.1:80").unwrap());
    let (mut accepted, _) = listener.accept().unwrap();
    let port = stream.local_addr().unwrap().port();
    let everything = client.namespace.tcp_wire();
    server.namespace.send_stray_segment(
        SocketAddrV4::new([10, 66, 0, 2].into(), 8080),
        SocketAddrV4::new([10, 66, 0, 10].into(), port),
    );
    if mode == Mode::Ebpf {
        // Here the client's connection is with the endpoint, and nothing has to be translated.
        assert!(everything.next_from([10, 66, 0, 2]).is_some());
        accepted.write_all(b"ping").unwrap();
        let mut buffer = [0; 4];
        stream.read_exact(&mut buffer).unwrap();
        return assert_eq!(&buffer, b"ping");
    }
    // The client knows nobody but the Service: it would answer with a reset.
    assert_eq!(everything.next_from([10, 66, 0, 2]), None);
    accepted.write_all(b"ping").unwrap();
    let mut buffer = [0; 4];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"ping");
    assert!(everything.next_from([10, 96, 0, 1]).is_some());
}

/// Row 40: masquerading follows who is a pod.
fn check_detection(mode: Mode, pods: PodSources) {
    let mut node = Node::with(mode, BackendConfig { pods, ..BackendConfig::default() });
    node.outside.route("10.66.0.0/24", NODE4);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let spec = node_port(cluster_ip(1, "TCP", 80), 30080);
    node.service("web", with(spec, json!({"externalTrafficPolicy": "Local"})));
    node.endpoints("web", "TCP", 8080, &[(2, "other", json!({}))]);
    node.apply();
    for (vip, gateway) in [("10.96.0.1:80", "10.66.0.1"), ("[fd96::1]:80", "fd66::1")] {
        let seen = client.namespace.tcp(vip).unwrap().client;
        assert!([client.v4, client.v6].contains(&seen), "{vip}: {seen}");
        for from in [&node.namespace, &node.outside] {
            assert_eq!(from.tcp(vip).unwrap().client.to_string(), gateway, "{vip}");
        }
    }
    // The short cut of externalTrafficPolicy Local is for pods and the node.
    let port = format!("{NODE4}:30080");
    assert_eq!(client.namespace.tcp(&port).unwrap().client, client.v4);
    assert!(node.namespace.tcp(&port).is_ok());
    assert_eq!(node.outside.tcp(&port), Err(ErrorKind::TimedOut));
    assert_eq!(node.restart(), 0);
}

fn pods_are_told_by_the_name_of_their_interface(mode: Mode) {
    check_detection(mode, PodSources::InterfacePrefix("pod".to_owned()));
}

fn pods_are_told_by_their_bridge(mode: Mode) {
    // To the packet filter, a bridge is an interface like any other.
    check_detection(mode, PodSources::Bridge("pod10".to_owned()));
}

/// Row 41, case 50: a port that follows from the client's makes two clients want the same one at the same time.
fn masquerading_takes_any_free_port(mode: Mode) {
    let mut node = Node::new(mode);
    let server = node.pod("server", 2);
    let listener = server.namespace.run(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let ports: Vec<(u16, u16)> = (0..3)
        .map(|_| {
            let stream = node.outside.run(|| TcpStream::connect((NODE4, 30080)).unwrap());
            let (_, seen) = listener.accept().unwrap();
            (stream.local_addr().unwrap().port(), seen.port())
        })
        .collect();
    // By chance one may stay as it was, not all of them.
    assert!(ports.iter().any(|(own, seen)| own != seen), "{ports:?}");
}
