//! ADD, CHECK, DEL, GC, STATUS and VERSION.

use std::net::SocketAddr;

use keelson_netlink::route::Rtnl;
use serde_json::{Value, json};

use super::stage::{Node, echo_source, is_root, pod_namespace, source_seen};

#[test]
fn pods_reach_one_another_and_the_node_under_their_own_addresses() {
    if !is_root() {
        return;
    }
    for cidrs in [&["10.99.0.0/24"][..], &["fd00:99::/64"], &["10.99.0.0/24", "fd00:99::/64"]] {
        let node = Node::new(cidrs);
        let (one, two) = (node.pod("one"), node.pod("two"));
        assert_eq!(one.ips.len(), cidrs.len());
        for (from, to) in one.ips.iter().zip(&two.ips) {
            echo_source(&two.namespace, *to, 80);
            let seen = source_seen(&one.namespace, SocketAddr::new(*to, 80));
            assert_eq!(seen, Some(from.to_string()), "{cidrs:?}");
            assert!(source_seen(&node.namespace, SocketAddr::new(*to, 80)).is_some());
        }
        for (id, pod) in [("one", &one), ("two", &two)] {
            node.call("CHECK", id, Some(&pod.namespace), &node.config).unwrap();
            node.del(id, Some(&pod.namespace)).unwrap();
        }
        node.is_clean();
    }
}

#[test]
fn results_come_in_the_version_that_was_asked_for() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let config = node.with(json!({ "cniVersion": version }));
        let pod = node.pod_with("c", &config);
        assert_eq!(pod.result["cniVersion"], version);
        let old = version.starts_with('0');
        assert_eq!(pod.result["ips"][0]["version"].is_string(), old, "{}", pod.result);
        assert_eq!(pod.result["interfaces"][1]["mtu"].is_u64(), version == "1.1.0");
        node.call("DEL", "c", Some(&pod.namespace), &config).unwrap();
    }
    let versions = node.call("VERSION", "", None, &json!({ "cniVersion": "1.0.0" })).unwrap();
    assert_eq!(versions["supportedVersions"].as_array().unwrap().len(), 5);
    let error = node.call("ADD", "c", None, &node.with(json!({ "cniVersion": "9.0.0" })));
    assert_eq!(error.unwrap_err()["code"], 1);
}

#[test]
fn check_names_what_is_damaged() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let pod = node.pod("c");
    let check = || node.call("CHECK", "c", Some(&pod.namespace), &node.config);
    check().unwrap();
    let text = |error: Value| error.to_string();
    let host = node.links().remove(0);
    // The IPv6 route of the node goes, as if somebody had flushed the table.
    node.namespace.run(|| {
        let mut rtnl = Rtnl::open().unwrap();
        let route = rtnl.route_to(pod.ips[1]).unwrap().unwrap();
        assert!(rtnl.delete_route(&route).unwrap());
    });
    let error = text(check().unwrap_err());
    assert!(error.contains(&pod.ips[1].to_string()) && error.contains(&host), "{error}");
    node.namespace.run(|| {
        let mut rtnl = Rtnl::open().unwrap();
        let link = rtnl.link(host.as_str()).unwrap().unwrap();
        rtnl.delete_link(link.index).unwrap();
    });
    let error = text(check().unwrap_err());
    assert!(error.contains(&host) && error.contains("missing"), "{error}");
}

#[test]
fn a_second_add_is_refused_and_a_second_del_succeeds() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let pod = node.pod("c");
    let error = node.add("c", &pod.namespace).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("already"), "{error}");
    // The refused one has taken nothing away.
    node.call("CHECK", "c", Some(&pod.namespace), &node.config).unwrap();
    node.del("c", None).unwrap();
    node.del("c", Some(&pod.namespace)).unwrap();
    node.del("never-seen", None).unwrap();
    node.is_clean();
}

#[test]
fn a_container_can_be_added_again_right_after_its_del() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let namespace = pod_namespace();
    for _ in 0..20 {
        node.add("c", &namespace).unwrap();
        node.del("c", Some(&namespace)).unwrap();
    }
    node.add("c", &namespace).unwrap();
    // What the last DEL left to be done is done now, and has not hit the new link.
    while node.links().len() > 1 {
        std::thread::yield_now();
    }
    node.call("CHECK", "c", Some(&namespace), &node.config).unwrap();
}

#[test]
fn gc_frees_what_is_not_listed_also_links_whose_record_was_lost() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let pods = ["kept", "dropped"].map(|id| node.pod(id));
    let valid =
        json!({ "cni.dev/valid-attachments": [{ "containerID": "kept", "ifname": "eth0" }] });
    node.call("GC", "", None, &node.with(valid.clone())).unwrap();
    assert_eq!((node.links().len(), node.taken()), (1, 1));
    node.call("CHECK", "kept", Some(&pods[0].namespace), &node.config).unwrap();
    let lost = node.pod("lost");
    std::fs::remove_file(node.data.path().join("test/journal")).unwrap();
    node.call("GC", "", None, &node.with(valid)).unwrap();
    assert_eq!(node.links().len(), 1);
    drop(lost);
}

#[test]
fn a_second_interface_leads_to_the_cluster_only_and_says_so() {
    if !is_root() {
        return;
    }
    let (node, other) = (Node::dual(), Node::new(&["10.98.0.0/24", "fd00:98::/64"]));
    let pod = node.pod("c");
    let second = other.with(json!({ "clusterCIDRs": ["10.96.0.0/14"] }));
    // Another interface of the same pod, in another network.
    let mut child = std::process::Command::new("nsenter");
    let output = child
        .arg(format!("--net={}", node.namespace.path.display()))
        .arg(env!("CARGO_BIN_EXE_keelson-cni"))
        .envs([("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c"), ("CNI_IFNAME", "net1")])
        .env("CNI_NETNS", &pod.namespace.path)
        .stdin(stdin_of(&second))
        .output()
        .unwrap();
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let routes = result["routes"].as_array().unwrap();
    let destinations: Vec<_> = routes.iter().map(|r| r["dst"].as_str().unwrap()).collect();
    assert_eq!(destinations, ["10.96.0.0/14"], "{result}");
}

fn stdin_of(config: &Value) -> std::fs::File {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(config.to_string().as_bytes()).unwrap();
    file.rewind().unwrap();
    file
}

#[test]
fn status_is_bad_when_no_address_is_left() {
    if !is_root() {
        return;
    }
    let node = Node::new(&["10.99.0.0/30"]);
    node.call("STATUS", "", None, &node.config).unwrap();
    let _pods = [node.pod("one"), node.pod("two")];
    let error = node.call("STATUS", "", None, &node.config).unwrap_err();
    assert_eq!(error["code"], 50, "{error}");
    let namespace = pod_namespace();
    let error = node.add("three", &namespace).unwrap_err();
    assert!(error["code"] == 11 && error.to_string().contains("10.99.0.0/30"), "{error}");
}
