//! The Node as it is registered, and what of it is put right when it exists already. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, NodeSpec, NodeStatus, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};

use crate::config::AgentConfig;

/// Volumes are attached by the control plane, never by this node.
const ATTACH_ANNOTATION: &str = "volumes.kubernetes.io/controller-managed-attach-detach";

/// The object to create.
pub(super) fn node(config: &AgentConfig, architecture: &str, status: NodeStatus) -> Node {
    let taints: Vec<Taint> = config.node.taints.iter().map(taint).collect();
    Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels(config, architecture)),
            annotations: Some(BTreeMap::from([(ATTACH_ANNOTATION.to_owned(), "true".to_owned())])),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            provider_id: config.node.provider_id.clone(),
            taints: (!taints.is_empty()).then_some(taints),
            ..NodeSpec::default()
        }),
        status: Some(status),
    }
}

fn taint(taint: &crate::config::labels::NodeTaint) -> Taint {
    Taint {
        key: taint.key.clone(),
        value: taint.value.clone(),
        effect: taint.effect.clone(),
        time_added: None,
    }
}

fn labels(config: &AgentConfig, architecture: &str) -> BTreeMap<String, String> {
    let fixed = [
        ("kubernetes.io/hostname", config.node_name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", architecture),
    ];
    let fixed = fixed.map(|(key, value)| (key.to_owned(), value.to_owned()));
    // A configured label may say something else about the host name, but not about the machine.
    let mut labels = BTreeMap::from(fixed.clone());
    labels.extend(config.node.labels.clone());
    labels.extend(fixed.into_iter().skip(1));
    labels
}

/// A merge patch that puts labels and annotations of an existing Node right; `None` when they are.
/// Those of others stay, and so do taints: administrators change them after registration.
pub(super) fn metadata_patch(wanted: &Node, existing: &Node) -> Option<Value> {
    let labels = missing(wanted.metadata.labels.as_ref(), existing.metadata.labels.as_ref());
    let annotations =
        missing(wanted.metadata.annotations.as_ref(), existing.metadata.annotations.as_ref());
    if labels.is_empty() && annotations.is_empty() {
        return None;
    }
    Some(json!({"metadata": {"labels": labels, "annotations": annotations}}))
}

fn missing<'a>(
    wanted: Option<&'a BTreeMap<String, String>>,
    existing: Option<&BTreeMap<String, String>>,
) -> BTreeMap<&'a str, &'a str> {
    wanted
        .into_iter()
        .flatten()
        .filter(|(key, value)| existing.and_then(|map| map.get(*key)) != Some(value))
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect()
}

/// A merge patch that turns `before` into `after`. Null removes, lists are replaced whole.
pub(super) fn merge_diff(before: &Value, after: &Value) -> Value {
    let (Value::Object(before), Value::Object(after)) = (before, after) else {
        return after.clone();
    };
    let gone = before.keys().filter(|key| !after.contains_key(*key));
    let mut patch: serde_json::Map<String, Value> =
        gone.map(|key| (key.clone(), Value::Null)).collect();
    for (key, value) in after {
        match before.get(key) {
            Some(old) if old == value => {}
            Some(old) => drop(patch.insert(key.clone(), merge_diff(old, value))),
            None => drop(patch.insert(key.clone(), value.clone())),
        }
    }
    Value::Object(patch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AgentConfig {
        let mut config = AgentConfig { node_name: "n1".to_owned(), ..AgentConfig::default() };
        config.node.labels = BTreeMap::from([
            ("zone".to_owned(), "a".to_owned()),
            ("kubernetes.io/arch".to_owned(), "lie".to_owned()),
        ]);
        config
    }

    #[test]
    fn a_new_node_has_the_labels_that_everybody_selects_by() {
        let node = node(&config(), "amd64", NodeStatus::default());
        let labels = node.metadata.labels.unwrap();
        assert_eq!(labels["kubernetes.io/hostname"], "n1");
        assert_eq!(labels["kubernetes.io/arch"], "amd64");
        assert_eq!(labels["zone"], "a");
    }

    #[test]
    fn an_existing_node_keeps_what_others_wrote() {
        let wanted = node(&config(), "amd64", NodeStatus::default());
        let mut existing = wanted.clone();
        assert_eq!(metadata_patch(&wanted, &existing), None);
        let labels = existing.metadata.labels.as_mut().unwrap();
        labels.insert("team".to_owned(), "b".to_owned());
        labels.remove("zone");
        let patch = metadata_patch(&wanted, &existing).unwrap();
        assert_eq!(patch, json!({"metadata": {"labels": {"zone": "a"}, "annotations": {}}}));
    }

    #[test]
    fn merge_diff_names_only_what_changed() {
        let before = json!({"a": 1, "b": {"c": 1, "d": 2}, "e": [1]});
        let after = json!({"a": 1, "b": {"c": 3}, "e": [1, 2], "f": true});
        let want = json!({"b": {"c": 3, "d": null}, "e": [1, 2], "f": true});
        assert_eq!(merge_diff(&before, &after), want);
        assert_eq!(merge_diff(&before, &before), json!({}));
    }
}
