//! Ports of the node that lead to pods.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use keelson_netlink::route::Rtnl;
use serde_json::{Value, json};

use super::stage::{Node, echo_source, is_root, pod_namespace, source_seen};

/// An address of the node; see [`Node::new`].
const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

fn with_port(node: &Node, host: u16, address: Option<&str>) -> Value {
    let mut mapping = json!({ "hostPort": host, "containerPort": 80, "protocol": "tcp" });
    if let Some(address) = address {
        mapping["hostIP"] = address.into();
    }
    node.with(json!({ "runtimeConfig": { "portMappings": [mapping] } }))
}

#[test]
fn a_port_answers_pods_the_node_and_localhost() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let server = node.pod_with("server", &with_port(&node, 8080, None));
    let client = node.pod("client");
    echo_source(&server.namespace, server.ips[0], 80);
    let at = SocketAddr::new(NODE, 8080);
    // A pod is seen as itself, also through a translated port.
    assert_eq!(source_seen(&client.namespace, at), Some(client.ips[0].to_string()));
    assert!(source_seen(&node.namespace, at).is_some());
    assert!(source_seen(&node.namespace, "127.0.0.1:8080".parse().unwrap()).is_some());
    // To itself, a pod must come as the node.
    let seen = source_seen(&server.namespace, at).unwrap();
    assert_ne!(seen, server.ips[0].to_string());
    node.del("server", Some(&server.namespace)).unwrap();
    assert_eq!(source_seen(&client.namespace, at), None);
}

#[test]
fn pods_with_ports_do_not_reach_the_nodes_loopback() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    echo_source(&node.namespace, Ipv4Addr::LOCALHOST.into(), 9000);
    let pod = node.pod_with("c", &with_port(&node, 8080, None));
    pod.namespace.run(|| {
        // A hostile pod sends 127.0.0.1 over its link.
        keelson_netlink::sysctl::write("net/ipv4/conf/all/route_localnet", "1").unwrap();
        let mut rtnl = Rtnl::open().unwrap();
        let lo = rtnl.link("lo").unwrap().unwrap();
        rtnl.delete_address(lo.index, "127.0.0.1/8".parse().unwrap()).unwrap();
    });
    assert_eq!(source_seen(&pod.namespace, "127.0.0.1:9000".parse().unwrap()), None);
}

#[test]
fn a_taken_port_is_refused_and_stays_with_its_first_pod() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let config = with_port(&node, 8080, None);
    let first = node.pod_with("first", &config);
    echo_source(&first.namespace, first.ips[0], 80);
    for config in [config, with_port(&node, 8080, Some("192.0.2.1"))] {
        let namespace = pod_namespace();
        let error = node.call("ADD", "second", Some(&namespace), &config).unwrap_err().to_string();
        assert!(error.contains("8080/tcp") && error.contains("first"), "{error}");
        // The runtime cleans up after a failed ADD.
        node.del("second", Some(&namespace)).unwrap();
    }
    assert_eq!(node.taken(), 1);
    assert!(source_seen(&node.namespace, SocketAddr::new(NODE, 8080)).is_some());
}

#[test]
fn the_same_port_can_be_had_on_different_addresses() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let one = node.pod_with("one", &with_port(&node, 8080, Some("192.0.2.1")));
    let two = node.pod_with("two", &with_port(&node, 8080, Some("127.0.0.1")));
    echo_source(&one.namespace, one.ips[0], 80);
    assert!(source_seen(&node.namespace, SocketAddr::new(NODE, 8080)).is_some());
    assert_eq!(source_seen(&node.namespace, "127.0.0.1:8080".parse().unwrap()), None);
    echo_source(&two.namespace, two.ips[0], 80);
    assert!(source_seen(&node.namespace, "127.0.0.1:8080".parse().unwrap()).is_some());
}
