//! What Services do to real packets: clients in pods, on the node and outside.

use std::io::ErrorKind;

use crate::stage::*;
use keelson_proxy::model::NodeFacts;
use serde_json::json;

rows![
    a_cluster_ip_reaches_its_endpoints_from_everywhere,
    a_node_port_answers_on_the_nodes_addresses_and_hides_the_client,
    node_ports_answer_only_on_the_chosen_addresses,
    several_named_ports_lead_to_their_own_target_ports,
    without_endpoints_clients_are_refused_at_once,
    a_pod_reaches_itself_through_its_service,
    all_endpoints_get_their_share,
    masquerade_follows_the_configuration,
];

fn a_cluster_ip_reaches_its_endpoints_from_everywhere(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080).serving("UDP", 8080);
    for protocol in ["TCP", "UDP"] {
        let last = if protocol == "TCP" { 1 } else { 2 };
        let name = format!("web-{}", protocol.to_lowercase());
        node.service(&name, cluster_ip(last, protocol, 80));
        node.ready(&name, protocol, 8080, &[2]);
        node.apply();
        for to in [format!("10.96.0.{last}:80"), format!("[fd96::{last}]:80")] {
            // From a pod: the client's own address is seen.
            let answer = client.namespace.ask(protocol, &to).unwrap();
            assert_eq!(answer.server, "one");
            assert!([client.v4, client.v6].contains(&answer.client), "{answer:?}");
            // From the node and from outside: masqueraded.
            for from in [&node.namespace, &node.outside] {
                let answer = from.ask(protocol, &to).unwrap();
                assert!(
                    ["10.66.0.1", "fd66::1"].contains(&&*answer.client.to_string()),
                    "{answer:?}"
                );
            }
        }
    }
}

fn a_node_port_answers_on_the_nodes_addresses_and_hides_the_client(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080).serving("UDP", 9090);
    // Case 21: the same number for TCP and UDP.
    let both = with(
        cluster_ip(1, "TCP", 80),
        json!({"type": "NodePort", "ports": [
            {"name": "t", "port": 80, "protocol": "TCP", "nodePort": 30080},
            {"name": "u", "port": 80, "protocol": "UDP", "nodePort": 30080},
        ]}),
    );
    node.service("web", both);
    for (name, protocol, port) in [("t", "TCP", 8080), ("u", "UDP", 9090)] {
        for (family, address) in [("IPv4", "10.66.0.2"), ("IPv6", "fd66::2")] {
            let mut slice = slice("web", family, &[(address, "here")], name, port);
            slice["ports"][0]["protocol"] = json!(protocol);
            slice["metadata"]["name"] = json!(format!("web-{name}-{family}").to_lowercase());
            node.slice(slice);
        }
    }
    node.apply();
    for protocol in ["TCP", "UDP"] {
        for address in [NODE4.to_owned(), format!("[{NODE6}]")] {
            let to = format!("{address}:30080");
            for from in [&node.outside, &client.namespace, &node.namespace] {
                let answer = from.ask(protocol, &to).unwrap();
                assert_eq!(answer.server, "one");
                let seen = answer.client.to_string();
                assert!(["10.66.0.1", "fd66::1"].contains(&&*seen), "{protocol} {to}: {seen}");
            }
        }
    }
    // Row 32, for programs on the node; no translation can serve ::1 (row 33 is in `whole`).
    for protocol in ["TCP", "UDP"] {
        assert_eq!(node.namespace.ask(protocol, "127.0.0.1:30080").unwrap().server, "one");
    }
    let on_loopback6 = node.namespace.tcp("[::1]:30080").map(|answer| answer.server);
    match mode {
        // There the socket connects to the endpoint.
        Mode::Ebpf => assert_eq!(on_loopback6, Ok("one".to_owned())),
        _ => assert_eq!(on_loopback6, Err(ErrorKind::ConnectionRefused)),
    }
    // The number means nothing on a Service's address (case 29).
    assert!(client.namespace.tcp("10.96.0.1:30080").is_err());
}

fn node_ports_answer_only_on_the_chosen_addresses(mode: Mode) {
    let mut node = Node::with(
        mode,
        BackendConfig {
            node_port_ranges: vec![format!("{NODE4}/32").parse().unwrap()],
            ..BackendConfig::default()
        },
    );
    node.namespace.address("eth0", "203.0.113.77/24");
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    assert!(node.outside.tcp(&format!("{NODE4}:30080")).is_ok());
    assert_eq!(node.outside.tcp("203.0.113.77:30080"), Err(ErrorKind::ConnectionRefused));
    // Case 36: no IPv6 range given means all IPv6 addresses.
    assert!(node.outside.tcp(&format!("[{NODE6}]:30080")).is_ok());
}

fn several_named_ports_lead_to_their_own_target_ports(mode: Mode) {
    // Case 17: the target port's name stands for 8080 in one pod and 9090 in the other.
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _a = node.pod("a", 2).serving("TCP", 8080).serving("TCP", 7000);
    let _b = node.pod("b", 3).serving("TCP", 9090);
    let ports = json!([{"name": "http", "port": 80}, {"name": "admin", "port": 81}]);
    node.service("web", with(cluster_ip(1, "TCP", 80), json!({"ports": ports})));
    let mut first = slice("web", "IPv4", &[("10.66.0.2", "here")], "http", 8080);
    first["ports"] = json!([{"name": "http", "port": 8080}, {"name": "admin", "port": 7000}]);
    node.slice(first);
    let mut second = slice("web", "IPv4", &[("10.66.0.3", "here")], "http", 9090);
    second["metadata"]["name"] = json!("web-second");
    node.slice(second);
    node.apply();
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 40), ["a", "b"]);
    assert_eq!(servers(&client.namespace, "10.96.0.1:81", 10), ["a"]);
}

fn without_endpoints_clients_are_refused_at_once(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080).serving("UDP", 8080);
    for protocol in ["TCP", "UDP"] {
        let last = if protocol == "TCP" { 1 } else { 2 };
        let name = format!("web-{}", protocol.to_lowercase());
        node.service(&name, node_port(cluster_ip(last, protocol, 80), 30080));
        node.apply();
        let targets =
            [format!("10.96.0.{last}:80"), format!("[fd96::{last}]:80"), format!("{NODE4}:30080")];
        for to in &targets {
            for from in [&client.namespace, &node.namespace, &node.outside] {
                assert_eq!(
                    from.ask(protocol, to),
                    Err(ErrorKind::ConnectionRefused),
                    "{protocol} {to}"
                );
            }
        }
        node.ready(&name, protocol, 8080, &[2]);
        node.apply();
        for to in &targets {
            let answer = client.namespace.ask(protocol, to);
            assert_eq!(answer.map(|answer| answer.server), Ok("one".to_owned()), "{protocol} {to}");
        }
        // Case 13: one that terminates and serves no more counts as none.
        let gone = json!({"ready": false, "serving": false, "terminating": true});
        node.endpoints(&name, protocol, 8080, &[(2, "here", gone)]);
        node.apply();
        for to in &targets {
            assert_eq!(client.namespace.ask(protocol, to), Err(ErrorKind::ConnectionRefused));
        }
    }
}

fn a_pod_reaches_itself_through_its_service(mode: Mode) {
    let mut node = Node::new(mode);
    let one = node.pod("one", 2).serving("TCP", 8080).serving("UDP", 8080);
    for protocol in ["TCP", "UDP"] {
        let last = if protocol == "TCP" { 1 } else { 2 };
        let name = format!("web-{}", protocol.to_lowercase());
        node.service(&name, cluster_ip(last, protocol, 80));
        node.ready(&name, protocol, 8080, &[2]);
        node.apply();
        for to in [format!("10.96.0.{last}:80"), format!("[fd96::{last}]:80")] {
            let answer = one.namespace.ask(protocol, &to);
            let answer = answer.unwrap_or_else(|error| panic!("{protocol} {to}: {error}"));
            if mode == Mode::Ebpf {
                // Its packets never leave it.
                assert!([one.v4, one.v6].contains(&answer.client));
                continue;
            }
            assert_ne!(answer.client, one.v4);
            assert_ne!(answer.client, one.v6);
        }
    }
}

fn all_endpoints_get_their_share(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _pods: Vec<Pod> = [(2, "a"), (3, "b"), (4, "c")]
        .map(|(n, name)| node.pod(name, n).serving("TCP", 8080))
        .into();
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2, 3, 4]);
    node.apply();
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 60), ["a", "b", "c"]);
    node.ready("web", "TCP", 8080, &[2, 4]);
    node.apply();
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 40), ["a", "c"]);
}

fn masquerade_follows_the_configuration(mode: Mode) {
    // Nobody is known to be a pod: nobody is masqueraded on a ClusterIP.
    let mut node = Node::with(mode, BackendConfig::default());
    node.outside.route("10.66.0.0/24", NODE4);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    assert_eq!(node.outside.tcp("10.96.0.1:80").unwrap().client.to_string(), OUTSIDE4);
    assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().client, client.v4);
    // Everybody is masqueraded.
    let facts = NodeFacts { masquerade_all: true, ..node.model.node().clone() };
    node.model.set_node(facts);
    node.apply();
    assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().client.to_string(), "10.66.0.1");
}
