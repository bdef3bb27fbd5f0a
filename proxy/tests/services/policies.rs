//! Traffic policies, load balancer addresses, session affinity.

use std::io::ErrorKind;

use crate::stage::*;
use keelson_netlink::route::Route;
use serde_json::json;

rows![
    external_traffic_policy_local_keeps_the_client_and_stays_on_the_node,
    a_pod_of_another_node_is_no_pod_of_this_one,
    internal_traffic_policy_local_never_leaves_the_node,
    endpoints_that_terminate_serve_when_no_other_is_left,
    external_and_load_balancer_addresses_answer_and_source_ranges_hold,
    source_ranges_hold_for_an_address_that_is_also_in_external_ips,
    source_ranges_that_cannot_be_read_admit_nobody,
    a_sticky_client_stays_until_its_endpoint_goes,
    a_sticky_client_is_forgotten_in_time,
];

fn local(service: &str) -> serde_json::Value {
    json!({(service): "Local"})
}

fn external_traffic_policy_local_keeps_the_client_and_stays_on_the_node(mode: Mode) {
    let mut node = Node::new(mode);
    node.outside.route("10.66.0.0/24", NODE4);
    let client = node.pod("client", 10);
    let _here = node.pod("here", 2).serving("TCP", 8080);
    let _there = node.pod("there", 3).serving("TCP", 8080);
    let spec = with(node_port(cluster_ip(1, "TCP", 80), 30080), local("externalTrafficPolicy"));
    node.service("web", spec);
    let ready = json!({"ready": true});
    node.endpoints("web", "TCP", 8080, &[(2, "here", ready.clone()), (3, "other", ready.clone())]);
    node.apply();
    let port = format!("{NODE4}:30080");
    assert_eq!(servers(&node.outside, &port, 20), ["here"]);
    assert_eq!(node.outside.tcp(&port).unwrap().client.to_string(), OUTSIDE4);
    // Pods and the node take the short cut to the whole cluster; pods stay visible.
    assert_eq!(servers(&client.namespace, &port, 40), ["here", "there"]);
    assert_eq!(client.namespace.tcp(&port).unwrap().client, client.v4);
    assert_eq!(servers(&node.namespace, &port, 40), ["here", "there"]);
    assert_eq!(node.namespace.tcp(&port).unwrap().client.to_string(), "10.66.0.1");

    // Case 22: none here, so outside hears nothing; cases 23 and 24: pods and node are served.
    node.endpoints("web", "TCP", 8080, &[(3, "other", ready)]);
    node.apply();
    assert_eq!(node.outside.tcp(&port), Err(ErrorKind::TimedOut));
    assert_eq!(servers(&client.namespace, &port, 5), ["there"]);
    assert_eq!(servers(&node.namespace, &port, 5), ["there"]);

    // Case 27: none at all is refused.
    node.endpoints("web", "TCP", 8080, &[]);
    node.apply();
    assert_eq!(node.outside.tcp(&port), Err(ErrorKind::ConnectionRefused));
}

/// Case 25, where pods are told by the node's own range.
fn a_pod_of_another_node_is_no_pod_of_this_one(mode: Mode) {
    let pods = PodSources::Ranges(vec!["10.66.0.0/24".parse().unwrap()]);
    let mut node = Node::with(mode, BackendConfig { pods, ..BackendConfig::default() });
    node.outside.route("10.66.0.0/24", NODE4);
    let client = node.pod("client", 10);
    let _there = node.pod("there", 3).serving("TCP", 8080);
    // A pod over there: it comes with its own address.
    let there = "10.66.9.9";
    node.outside.address("lo", &format!("{there}/32"));
    let mut rtnl = node.outside.rtnl();
    let eth0 = rtnl.link("eth0").unwrap().unwrap().index;
    let to_node = Route::host(NODE4.parse().unwrap(), eth0);
    rtnl.ensure_route(&Route { source: Some(there.parse().unwrap()), ..to_node }).unwrap();
    let spec = with(node_port(cluster_ip(1, "TCP", 80), 30080), local("externalTrafficPolicy"));
    node.service("web", spec);
    node.endpoints("web", "TCP", 8080, &[(3, "here", json!({"ready": true}))]);
    node.apply();
    let port = format!("{NODE4}:30080");
    assert_eq!(node.outside.tcp(&port).unwrap().client.to_string(), there);
    // The only endpoint is on another node.
    node.endpoints("web", "TCP", 8080, &[(3, "other", json!({"ready": true}))]);
    node.apply();
    assert_eq!(node.outside.tcp(&port), Err(ErrorKind::TimedOut));
    assert_eq!(servers(&client.namespace, &port, 5), ["there"]);
}

fn internal_traffic_policy_local_never_leaves_the_node(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _here = node.pod("here", 2).serving("TCP", 8080);
    let _there = node.pod("there", 3).serving("TCP", 8080);
    let spec = with(node_port(cluster_ip(1, "TCP", 80), 30080), local("internalTrafficPolicy"));
    node.service("web", spec);
    let ready = json!({"ready": true});
    node.endpoints("web", "TCP", 8080, &[(2, "here", ready.clone()), (3, "other", ready.clone())]);
    node.apply();
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 20), ["here"]);
    assert_eq!(servers(&client.namespace, "[fd96::1]:80", 20), ["here"]);
    // Case 26: none here drops the ClusterIP, the node port still works.
    node.endpoints("web", "TCP", 8080, &[(3, "other", ready)]);
    node.apply();
    assert_eq!(client.namespace.tcp("10.96.0.1:80"), Err(ErrorKind::TimedOut));
    assert_eq!(servers(&node.outside, &format!("{NODE4}:30080"), 5), ["there"]);
}

fn endpoints_that_terminate_serve_when_no_other_is_left(mode: Mode) {
    // Case 12.
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _a = node.pod("a", 2).serving("TCP", 8080);
    let _b = node.pod("b", 3).serving("TCP", 8080);
    node.service("web", cluster_ip(1, "TCP", 80));
    let going = json!({"ready": false, "serving": true, "terminating": true});
    node.endpoints("web", "TCP", 8080, &[(2, "here", json!({})), (3, "here", going.clone())]);
    node.apply();
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 20), ["a"]);
    node.endpoints("web", "TCP", 8080, &[(3, "here", going)]);
    node.apply();
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 5), ["b"]);
}

/// Case 37.
fn external_and_load_balancer_addresses_answer_and_source_ranges_hold(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let spec = with(
        node_port(cluster_ip(1, "TCP", 80), 30080),
        json!({
            "type": "LoadBalancer",
            "externalIPs": ["198.51.100.1"],
            "loadBalancerSourceRanges": [" 192.0.2.0/24", "10.66.0.0/16"],
        }),
    );
    node.service_object(json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": spec,
        "status": {"loadBalancer": {"ingress": [
            {"ip": "198.51.100.2"}, {"ip": "198.51.100.3", "ipMode": "Proxy"}, {"hostname": "x"},
        ]}},
    }));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    assert!(node.outside.tcp("198.51.100.1:80").is_ok());
    assert!(client.namespace.tcp("198.51.100.1:80").is_ok());
    // Row 26: outside is in no range, the pod is.
    assert_eq!(node.outside.tcp("198.51.100.2:80"), Err(ErrorKind::TimedOut));
    assert!(client.namespace.tcp("198.51.100.2:80").is_ok());
    // Case 30: the node port is open all the same; case 33: ipMode Proxy is not programmed.
    assert!(node.outside.tcp(&format!("{NODE4}:30080")).is_ok());
    assert!(node.outside.tcp("198.51.100.3:80").is_err());
    // Case 31: a range of everything switches the filter off.
    let spec = with(
        cluster_ip(1, "TCP", 80),
        json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ["0.0.0.0/0"]}),
    );
    node.service_object(json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": spec,
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.2"}]}},
    }));
    node.apply();
    assert!(node.outside.tcp("198.51.100.2:80").is_ok());
}

/// A Service of type LoadBalancer at 198.51.100.2 with these fields, and an endpoint that waits for clients.
fn balance(node: &mut Node, protocol: &str, fields: serde_json::Value) {
    let balancer = with(cluster_ip(1, protocol, 80), json!({"type": "LoadBalancer"}));
    let object = json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": with(balancer, fields),
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.2"}]}},
    });
    node.model.apply_service(&serde_json::from_value(object).unwrap());
    node.model.take_problems();
    node.ready("web", protocol, 8080, &[2]);
    node.apply();
}

/// A connection that times out, or a datagram without an answer.
fn is_silence<T>(outcome: &Result<T, ErrorKind>) -> bool {
    matches!(outcome, Err(ErrorKind::TimedOut | ErrorKind::WouldBlock))
}

fn source_ranges_hold_for_an_address_that_is_also_in_external_ips(mode: Mode) {
    for protocol in ["TCP", "UDP"] {
        let mut node = Node::new(mode);
        let client = node.pod("client", 10);
        let _one = node.pod("one", 2).serving(protocol, 8080);
        let ranges = ["192.0.2.0/24", "10.66.0.0/16"];
        let external = ["198.51.100.2"];
        let fields = json!({"externalIPs": external, "loadBalancerSourceRanges": ranges});
        balance(&mut node, protocol, fields);
        assert!(client.namespace.ask(protocol, "198.51.100.2:80").is_ok());
        assert!(is_silence(&node.outside.ask(protocol, "198.51.100.2:80")));
    }
}

fn source_ranges_that_cannot_be_read_admit_nobody(mode: Mode) {
    for protocol in ["TCP", "UDP"] {
        let mut node = Node::new(mode);
        let client = node.pod("client", 10);
        let _one = node.pod("one", 2).serving(protocol, 8080);
        balance(&mut node, protocol, json!({"loadBalancerSourceRanges": ["10.0.0.0/33"]}));
        for from in [&node.outside, &client.namespace] {
            assert!(is_silence(&from.ask(protocol, "198.51.100.2:80")));
        }
        // One that can be read holds by itself.
        let ranges = json!({"loadBalancerSourceRanges": ["10.0.0.0/33", "10.66.0.0/16"]});
        balance(&mut node, protocol, ranges);
        assert!(client.namespace.ask(protocol, "198.51.100.2:80").is_ok());
        assert!(is_silence(&node.outside.ask(protocol, "198.51.100.2:80")));
    }
}

fn a_sticky_client_stays_until_its_endpoint_goes(mode: Mode) {
    for prefix in ["10.96.0.1", "[fd96::1]"] {
        let mut node = Node::new(mode);
        let (client, other) = (node.pod("client", 10), node.pod("other", 11));
        let _pods: Vec<Pod> = (2..8)
            .map(|number| node.pod(&format!("p{number}"), number).serving("TCP", 8080))
            .collect();
        let sticky = json!({"sessionAffinity": "ClientIP"});
        node.service("web", with(node_port(cluster_ip(1, "TCP", 80), 30080), sticky));
        node.ready("web", "TCP", 8080, &[2, 3, 4, 5, 6, 7]);
        node.apply();
        let vip = format!("{prefix}:80");
        let first = servers(&client.namespace, &vip, 10);
        assert_eq!(first.len(), 1, "{first:?}");
        assert_eq!(servers(&other.namespace, &vip, 10).len(), 1);
        // Case 40: the node port of the same port sticks along. Row 49: so does a restart.
        let port = if prefix.starts_with('[') {
            format!("[{NODE6}]:30080")
        } else {
            format!("{NODE4}:30080")
        };
        assert_eq!(servers(&client.namespace, &port, 5), first);
        assert_eq!(node.restart(), 0);
        assert_eq!(servers(&client.namespace, &vip, 5), first);
        // Others go and come: the client stays.
        let mine: u8 = first[0][1..].parse().unwrap();
        let others: Vec<u8> = (2..8).filter(|number| *number != mine).collect();
        let mut three = vec![mine];
        three.extend(&others[..2]);
        node.ready("web", "TCP", 8080, &three);
        node.apply();
        assert_eq!(servers(&client.namespace, &vip, 10), first);
        // Case 42: its own endpoint goes, and it sticks to another one.
        node.ready("web", "TCP", 8080, &others);
        node.apply();
        let second = servers(&client.namespace, &vip, 10);
        assert_eq!(second.len(), 1);
        assert_ne!(second, first);
        // Case 14: affinity off and on again: the old entry must not hold.
        node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
        node.apply();
        assert!(servers(&client.namespace, &vip, 60).len() > 2);
    }
}

fn a_sticky_client_is_forgotten_in_time(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _pods: Vec<Pod> =
        (2..8).map(|number| node.pod(&format!("p{number}"), number).serving("TCP", 8080)).collect();
    let sticky = json!({
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}},
    });
    node.service("web", with(cluster_ip(1, "TCP", 80), sticky));
    node.ready("web", "TCP", 8080, &[2, 3, 4, 5, 6, 7]);
    node.apply();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..8 {
        seen.extend(servers(&client.namespace, "10.96.0.1:80", 3));
        if seen.len() > 1 {
            return;
        }
        // The kernel's clock is what is tested here.
        std::thread::sleep(std::time::Duration::from_millis(1300));
    }
    panic!("always {seen:?}");
}
