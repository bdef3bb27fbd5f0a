//! Corners of the reference that need a stage of their own.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};

use serde_json::json;

use crate::stage::*;

rows![
    hints_keep_traffic_in_the_zone_and_follow_the_node,
    an_endpoint_on_the_nodes_own_network_answers_everybody,
    one_source_port_to_two_services_with_the_same_endpoint,
    sctp_is_translated_like_the_others,
    source_ranges_of_the_node_let_the_node_in,
    a_service_of_every_kind_at_once_on_one_number,
    a_restart_in_the_middle_of_connections_loses_none,
    an_endpoint_learns_that_its_packets_are_too_long,
    strict_checks_of_the_way_back_do_no_harm,
];

/// Row 21, cases 8, 9 and 15.
fn hints_keep_traffic_in_the_zone_and_follow_the_node(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _pods = (node.pod("near", 2).serving("TCP", 8080), node.pod("far", 3).serving("TCP", 8080));
    node.service("web", cluster_ip(1, "TCP", 80));
    let hinted = |zone: &str| json!({"forZones": [{"name": zone}]});
    let mut object = slice("web", "IPv4", &[("10.66.0.2", "x"), ("10.66.0.3", "y")], "", 8080);
    object["endpoints"][0]["hints"] = hinted("a");
    object["endpoints"][1]["hints"] = hinted("b");
    node.slice(object.clone());
    node.apply();
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 20), ["near"]);
    let facts =
        keelson_proxy::model::NodeFacts { zone: Some("b".to_owned()), ..node.model.node().clone() };
    node.model.set_node(facts);
    node.apply();
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 20), ["far"]);
    object["endpoints"][1]["hints"] = json!(null);
    node.slice(object);
    node.apply();
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 30), ["far", "near"]);
}

/// Case 18.
fn an_endpoint_on_the_nodes_own_network_answers_everybody(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _server = node.namespace.serve("host", "TCP", 8080);
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    for (family, address) in [("IPv4", NODE4), ("IPv6", NODE6)] {
        node.slice(slice("web", family, &[(address, "here")], "", 8080));
    }
    node.apply();
    for to in ["10.96.0.1:80", "[fd96::1]:80", &format!("{NODE4}:30080"), "127.0.0.1:30080"] {
        for from in [&client.namespace, &node.namespace, &node.outside] {
            if to.starts_with("127.") && !std::ptr::eq(from, &node.namespace) {
                continue;
            }
            assert_eq!(from.tcp(to).map(|answer| answer.server), Ok("host".to_owned()), "{to}");
        }
    }
    assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().client, client.v4);
}

/// Case 60: after translation both connections would look the same.
fn one_source_port_to_two_services_with_the_same_endpoint(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("UDP", 8080);
    for last in [1, 2] {
        let name = format!("web{last}");
        node.service(&name, cluster_ip(last, "UDP", 80));
        node.ready(&name, "UDP", 8080, &[2]);
    }
    node.apply();
    let first = client.namespace.udp_socket("10.96.0.1:80");
    assert_eq!(udp_exchange(&first, silence()).unwrap().server, "one");
    let port = first.local_addr().unwrap();
    drop(first);
    let second = client.namespace.run(|| std::net::UdpSocket::bind(port).unwrap());
    second.connect("10.96.0.2:80").unwrap();
    assert_eq!(udp_exchange(&second, silence()).unwrap().server, "one");
}

/// Row 24, on the wire: not every kernel has SCTP sockets.
fn sctp_is_translated_like_the_others(mode: Mode) {
    let mut node = Node::new(mode);
    if !std::path::Path::new("/proc/sys/net/netfilter/nf_conntrack_sctp_timeout_closed").exists() {
        skip("this kernel does not track SCTP");
    }
    // The checksum of the association's first packet is of no interest here.
    node.namespace.set("netfilter/nf_conntrack_checksum", "0");
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    node.service("web", cluster_ip(1, "SCTP", 80));
    node.ready("web", "SCTP", 8080, &[2]);
    node.apply();
    let wire = server.namespace.sctp_wire();
    client.namespace.send_sctp_init(4000, [10, 96, 0, 1], 80);
    let packet = wire.next_from([10, 66, 0, 10]).expect("nothing arrives");
    // Behind the IP header: source port, destination port.
    assert_eq!(u16::from_be_bytes([packet[22], packet[23]]), 8080);
}

/// Row 28.
fn source_ranges_of_the_node_let_the_node_in(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let spec = with(
        cluster_ip(1, "TCP", 80),
        json!({
            "type": "LoadBalancer",
            "loadBalancerSourceRanges": [format!("{NODE4}/32"), "192.0.2.0/24"],
        }),
    );
    node.service_object(json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": spec,
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.2"}]}},
    }));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    assert!(node.namespace.tcp("198.51.100.2:80").is_ok());
    // Also where the address is on one of the node's interfaces, as some load balancers want it.
    node.namespace.address("lo", "198.51.100.2/32");
    assert!(node.namespace.tcp("198.51.100.2:80").is_ok());
    for from in [&node.outside, &client.namespace] {
        assert_eq!(from.tcp("198.51.100.2:80"), Err(ErrorKind::TimedOut));
    }
}

/// Cases 21 and 29: a number means what address and protocol say.
fn a_service_of_every_kind_at_once_on_one_number(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let pods: Vec<Pod> = [(2, "cluster"), (3, "external"), (4, "port"), (5, "udp")]
        .map(|(number, name)| node.pod(name, number).serving("TCP", 8080).serving("UDP", 8080))
        .into();
    let external = json!({"externalIPs": ["198.51.100.1"], "ports": [{"port": 30080}]});
    node.service("cluster", cluster_ip(1, "TCP", 30080));
    node.service("external", with(cluster_ip(2, "TCP", 1), external));
    node.service("port", node_port(cluster_ip(3, "TCP", 1), 30080));
    node.service("udp", node_port(cluster_ip(4, "UDP", 1), 30080));
    for (number, name) in [(2, "cluster"), (3, "external"), (4, "port")] {
        node.ready(name, "TCP", 8080, &[number]);
    }
    node.ready("udp", "UDP", 8080, &[5]);
    node.apply();
    let from = &client.namespace;
    assert_eq!(from.tcp("10.96.0.1:30080").unwrap().server, "cluster");
    assert_eq!(from.tcp("198.51.100.1:30080").unwrap().server, "external");
    assert_eq!(from.tcp(&format!("{NODE4}:30080")).unwrap().server, "port");
    assert_eq!(from.udp(&format!("{NODE4}:30080")).unwrap().server, "udp");
    assert_eq!(from.tcp("10.96.0.3:30080"), Err(ErrorKind::ConnectionRefused));
    drop(pods);
}

/// Row 48.
fn a_restart_in_the_middle_of_connections_loses_none(mode: Mode) {
    use std::io::{Read, Write};
    let mut node = Node::new(mode);
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let listener = server.namespace.run(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let to = ["10.96.0.1:80", &format!("{NODE4}:30080")].map(str::to_owned);
    let mut pairs: Vec<(TcpStream, TcpStream)> = Vec::new();
    for to in &to {
        let stream = client.namespace.run(|| TcpStream::connect(to).unwrap());
        pairs.push((stream, listener.accept().unwrap().0));
    }
    assert_eq!(node.restart(), 0);
    for (near, far) in &mut pairs {
        near.write_all(b"ping").unwrap();
        let mut buffer = [0; 4];
        far.read_exact(&mut buffer).unwrap();
    }
    for to in &to {
        let stream = client.namespace.run(|| TcpStream::connect(to));
        assert!(stream.is_ok(), "{to}");
    }
}

/// Path MTU discovery: a router near the client knows the Service's address only.
fn an_endpoint_learns_that_its_packets_are_too_long(mode: Mode) {
    let mut node = Node::new(mode);
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let listener = server.namespace.run(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    for to in ["10.96.0.1:80".to_owned(), format!("{NODE4}:30080")] {
        if mode == Mode::Ebpf && to.starts_with("10.") {
            // The pod's packets carry the endpoint's address, which routers know.
            continue;
        }
        let stream = client.namespace.run(|| TcpStream::connect(&to).unwrap());
        let _accepted = listener.accept().unwrap();
        let (SocketAddr::V4(near), SocketAddr::V4(far)) =
            (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
        else {
            panic!("not IPv4")
        };
        let wire = server.namespace.icmp_wire();
        client.namespace.send_too_long(far, near);
        let source = if to.starts_with("10.") { [10, 66, 0, 10] } else { [10, 66, 0, 1] };
        let packet = wire.next_from(source).unwrap_or_else(|| panic!("{to}: nothing arrives"));
        // Behind the headers of IP and ICMP: the segment as the server has sent it.
        assert_eq!(packet[20..22], [3, 4], "{to}");
        assert_eq!(packet[40..44], [10, 66, 0, 2], "{to}");
        assert_eq!(u16::from_be_bytes([packet[48], packet[49]]), 8080, "{to}");
    }
}

/// `rp_filter` 1, and packet marks count when the way back is looked up, as WireGuard's tools want it.
fn strict_checks_of_the_way_back_do_no_harm(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    for setting in ["rp_filter", "src_valid_mark"] {
        node.namespace.set(&format!("ipv4/conf/all/{setting}"), "1");
    }
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    for to in ["10.96.0.1:80", &format!("{NODE4}:30080")] {
        for from in [&client.namespace, &node.namespace, &node.outside] {
            assert_eq!(from.tcp(to).map(|answer| answer.server), Ok("one".to_owned()), "{to}");
        }
    }
}
