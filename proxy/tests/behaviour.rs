//! What Services do to real packets: clients in pods, on the node and outside.

mod support;

use support::*;

#[test]
fn a_cluster_ip_reaches_its_endpoints_from_everywhere() {
    let mut node = Node::new();
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
