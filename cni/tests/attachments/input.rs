//! Configurations and environments that are wrong.

use serde_json::{Value, json};

use super::stage::{Node, is_root, pod_namespace};

#[test]
fn what_is_wrong_is_named() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let namespace = pod_namespace();
    let cases: [(Value, u64, &str); 9] = [
        (json!({ "podCIDRs": ["10.0.0.1/24"] }), 7, "10.0.0.0/24"),
        (json!({ "podCIDRs": [] }), 7, "podCIDRs"),
        (json!({ "podCIDRs": ["ten"] }), 7, "podCIDRs[0]"),
        (json!({ "mtu": 1 }), 7, "mtu"),
        (json!({ "masquerade": "yes" }), 7, "masquerade"),
        (json!({ "subnet": "10.0.0.0/8" }), 2, "subnet"),
        (json!({ "name": "../x" }), 7, "name"),
        (json!({ "dataDir": "here" }), 7, "dataDir"),
        (json!({ "cniVersion": "0.1.0" }), 1, "0.1.0"),
    ];
    for (fields, code, named) in cases {
        let error = node.call("ADD", "c", Some(&namespace), &node.with(fields.clone()));
        let error = error.unwrap_err();
        assert_eq!(error["code"], code, "{fields}: {error}");
        assert!(error.to_string().contains(named), "{fields}: {error}");
    }
    node.is_clean();
}

#[test]
fn a_bad_environment_is_named() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let namespace = pod_namespace();
    for (verb, id, pod, named) in [
        ("ADD", "../../x", Some(&namespace), "CNI_CONTAINERID"),
        ("ADD", "", Some(&namespace), "CNI_CONTAINERID"),
        ("ADD", "c", None, "CNI_NETNS"),
        ("ADD", "c", Some(&node.namespace), "own network"),
        ("FLY", "c", Some(&namespace), "FLY"),
    ] {
        let error = node.call(verb, id, pod, &node.config).unwrap_err();
        assert!(error["code"] == 4 && error.to_string().contains(named), "{verb} {id}: {error}");
    }
}
