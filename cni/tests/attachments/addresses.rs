//! Who gets which address.

use std::collections::HashSet;

use serde_json::json;

use super::stage::{Node, ips, is_root, pod_namespace};

#[test]
fn a_hundred_at_once_get_a_hundred_addresses() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let pods: Vec<_> = (0..100).map(|number| (format!("c{number}"), pod_namespace())).collect();
    let children: Vec<_> =
        pods.iter().map(|(id, pod)| node.spawn("ADD", id, Some(pod), &node.config)).collect();
    let mut seen = HashSet::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        for ip in ips(&serde_json::from_slice(&output.stdout).unwrap()) {
            assert!(seen.insert(ip), "{ip} was given twice");
        }
    }
    assert_eq!(seen.len(), 200);
    let children: Vec<_> =
        pods.iter().map(|(id, pod)| node.spawn("DEL", id, Some(pod), &node.config)).collect();
    for child in children {
        assert!(child.wait_with_output().unwrap().status.success());
    }
    node.is_clean();
}

#[test]
fn an_address_is_given_again_only_after_all_others() {
    if !is_root() {
        return;
    }
    let node = Node::new(&["10.99.0.0/29"]);
    let mut given = Vec::new();
    for round in 0..7 {
        let id = format!("c{round}");
        let pod = node.pod(&id);
        given.push(pod.ips[0]);
        node.del(&id, Some(&pod.namespace)).unwrap();
    }
    let different: HashSet<_> = given[..6].iter().collect();
    assert_eq!(different.len(), 6);
    assert_eq!(given[6], given[0]);
}

#[test]
fn addresses_of_pods_that_vanished_are_given_back_when_none_is_left() {
    if !is_root() {
        return;
    }
    let node = Node::new(&["10.99.0.0/30"]);
    let pods = [node.pod("one"), node.pod("two")];
    let [one, two] = pods;
    let freed = one.ips[0];
    // The machine's administrator removes the namespace, and nobody calls DEL.
    let host = one.result["interfaces"][0]["name"].as_str().unwrap().to_owned();
    drop(one);
    while node.links().contains(&host) {
        std::thread::yield_now();
    }
    let three = node.pod("three");
    assert_eq!(three.ips, [freed]);
    node.call("CHECK", "two", Some(&two.namespace), &node.config).unwrap();
}

#[test]
fn an_address_that_somebody_has_is_not_given_whatever_the_records_say() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let one = node.pod("one");
    // The records are lost, the pod is not.
    std::fs::remove_file(node.data.path().join("test/journal")).unwrap();
    let two = node.pod("two");
    assert!(one.ips.iter().zip(&two.ips).all(|(a, b)| a != b), "{:?} {:?}", one.ips, two.ips);
}

#[test]
fn an_address_whose_line_in_the_journal_is_damaged_is_not_given_twice() {
    if !is_root() {
        return;
    }
    let node = Node::new(&["10.99.0.0/29"]);
    let one = node.pod("one");
    let path = node.data.path().join("test/journal");
    let mut text = std::fs::read(&path).unwrap();
    text[25] ^= 1;
    std::fs::write(&path, text).unwrap();
    // A whole round through the range.
    for round in 0..6 {
        let id = format!("c{round}");
        let pod = node.pod(&id);
        assert_ne!(pod.ips, one.ips);
        node.del(&id, Some(&pod.namespace)).unwrap();
    }
    node.del("one", Some(&one.namespace)).unwrap();
    node.is_clean();
}

#[test]
fn excluded_addresses_are_never_given() {
    if !is_root() {
        return;
    }
    let node = Node::new(&["10.99.0.0/29"]);
    let config = node.with(json!({ "exclude": ["10.99.0.1/32", "10.99.0.4/30"] }));
    let pods = ["one", "two"].map(|id| node.pod_with(id, &config));
    assert_eq!(pods.map(|pod| pod.ips[0].to_string()), ["10.99.0.2", "10.99.0.3"]);
}
