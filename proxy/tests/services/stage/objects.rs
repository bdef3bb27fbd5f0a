//! Services and slices, and counting who answers.

use serde_json::{Value, json};

use super::Namespace;

/// A ClusterIP Service in both families with one TCP or UDP port.
pub(crate) fn cluster_ip(last: u8, protocol: &str, port: u16) -> Value {
    json!({
        "type": "ClusterIP",
        "clusterIP": format!("10.96.0.{last}"),
        "clusterIPs": [format!("10.96.0.{last}"), format!("fd96::{last}")],
        "ports": [{"port": port, "protocol": protocol}],
    })
}

/// `base` with some fields replaced.
pub(crate) fn with(mut base: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

/// `base` with a node port on its only port.
pub(crate) fn node_port(mut base: Value, number: u16) -> Value {
    base["type"] = json!("NodePort");
    base["ports"][0]["nodePort"] = json!(number);
    base
}

/// A slice with one port and endpoints `(address, node)`.
pub(crate) fn slice(
    service: &str,
    family: &str,
    of: &[(&str, &str)],
    port: &str,
    number: u16,
) -> Value {
    let endpoints: Vec<Value> = of
        .iter()
        .map(|(address, node)| json!({"addresses": [address], "nodeName": node, "conditions": {}}))
        .collect();
    json!({
        "metadata": {
            "namespace": "default",
            "name": format!("{service}-{family}").to_lowercase(),
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": [{"name": port, "port": number}],
    })
}

/// Who answers `count` connections, each server once, in order of name.
#[track_caller]
pub(crate) fn servers(from: &Namespace, to: &str, count: usize) -> Vec<String> {
    let names: std::collections::BTreeSet<String> =
        (0..count).map(|_| from.tcp(to).unwrap().server).collect();
    names.into_iter().collect()
}
