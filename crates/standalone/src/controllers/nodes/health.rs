//! What a node's signs of life mean for its conditions and taints: pure.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

/// How long a node may be silent (kube-controller-manager's `--node-monitor-grace-period` had this for long).
pub(crate) const GRACE: Duration = Duration::from_secs(40);

pub(crate) const NOT_READY: &str = "node.kubernetes.io/not-ready";
pub(crate) const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
/// Conditions that keep new pods away while they are True.
const PRESSURES: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];
/// The conditions that only the agent can know.
const AGENT_CONDITIONS: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// The state of one condition, `Unknown` where it is not there.
pub(crate) fn condition<'a>(node: &'a Node, kind: &str) -> &'a str {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions
        .into_iter()
        .find(|condition| condition.type_ == kind)
        .map_or("Unknown", |condition| condition.status.as_str())
}

/// The node's conditions after `silent_for` without a sign, if they must change.
pub(crate) fn conditions(
    node: &Node,
    silent_for: Duration,
    now: Timestamp,
) -> Option<Vec<NodeCondition>> {
    if silent_for < GRACE {
        return None;
    }
    let held = node.status.as_ref().and_then(|status| status.conditions.clone());
    let mut wanted = held.clone().unwrap_or_default();
    for kind in AGENT_CONDITIONS {
        match wanted.iter_mut().find(|condition| condition.type_ == kind) {
            Some(condition) if condition.status != "Unknown" => {
                condition.status = "Unknown".into();
                condition.reason = Some("NodeStatusUnknown".into());
                condition.message = Some("Kubelet stopped posting node status.".into());
                condition.last_transition_time = Some(Time(now));
            }
            Some(_) => {}
            None => wanted.push(NodeCondition {
                type_: kind.into(),
                status: "Unknown".into(),
                reason: Some("NodeStatusNeverUpdated".into()),
                message: Some("Kubelet never posted node status.".into()),
                last_transition_time: Some(Time(now)),
                last_heartbeat_time: None,
            }),
        }
    }
    (held.as_ref() != Some(&wanted)).then_some(wanted)
}

/// The node's taints by its conditions and its cordon, if they must change. Taints of others are left alone.
pub(crate) fn taints(node: &Node, now: Timestamp) -> Option<Vec<Taint>> {
    let held: Vec<Taint> =
        node.spec.iter().flat_map(|spec| spec.taints.iter().flatten()).cloned().collect();
    let ready = condition(node, "Ready");
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    match ready {
        "True" => {}
        "False" => wanted.extend([(NOT_READY, "NoSchedule"), (NOT_READY, "NoExecute")]),
        _ => wanted.extend([(UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]),
    }
    for (kind, key) in PRESSURES {
        if condition(node, kind) == "True" {
            wanted.push((key, "NoSchedule"));
        }
    }
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        wanted.push(("node.kubernetes.io/unschedulable", "NoSchedule"));
    }
    let is_ours = |taint: &Taint| {
        let by_pressure = PRESSURES.iter().any(|(_, key)| *key == taint.key);
        [NOT_READY, UNREACHABLE, "node.kubernetes.io/unschedulable"].contains(&&*taint.key)
            || by_pressure
    };
    let is_wanted = |taint: &Taint| {
        wanted.iter().any(|(key, effect)| taint.key == *key && taint.effect == *effect)
    };
    let mut new: Vec<Taint> =
        held.iter().filter(|taint| !is_ours(taint) || is_wanted(taint)).cloned().collect();
    for (key, effect) in wanted {
        if !new.iter().any(|taint| taint.key == key && taint.effect == effect) {
            new.push(Taint {
                key: key.into(),
                effect: effect.into(),
                value: None,
                time_added: Some(Time(now)),
            });
        }
    }
    (new != held).then_some(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(ready: &str, spec: serde_json::Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1"}, "spec": spec,
            "status": {"conditions": [{"type": "Ready", "status": ready}]}}))
        .unwrap()
    }

    fn keys(node: &Node) -> Option<Vec<String>> {
        let taints = taints(node, Timestamp::UNIX_EPOCH)?;
        Some(taints.into_iter().map(|taint| format!("{}:{}", taint.key, taint.effect)).collect())
    }

    #[test]
    fn silence_makes_every_agent_condition_unknown_once() {
        let mut node = node("True", json!({}));
        let now = Timestamp::UNIX_EPOCH;
        assert_eq!(conditions(&node, Duration::from_secs(39), now), None);
        let found = conditions(&node, GRACE, now).unwrap();
        let states: Vec<_> = found.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect();
        assert_eq!(states, AGENT_CONDITIONS.map(|kind| (kind, "Unknown")));
        assert_eq!(found[0].reason.as_deref(), Some("NodeStatusUnknown"));
        node.status.as_mut().unwrap().conditions = Some(found);
        assert_eq!(conditions(&node, GRACE * 2, now), None);
    }

    #[test]
    fn taints_follow_the_conditions_and_spare_those_of_others() {
        assert_eq!(keys(&node("True", json!({}))), None);
        let not_ready =
            ["node.kubernetes.io/not-ready:NoSchedule", "node.kubernetes.io/not-ready:NoExecute"];
        assert_eq!(keys(&node("False", json!({}))).unwrap(), not_ready);
        let held = json!({"unschedulable": true, "taints": [
            {"key": "mine", "effect": "NoSchedule"},
            {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]});
        assert_eq!(
            keys(&node("True", held)).unwrap(),
            ["mine:NoSchedule", "node.kubernetes.io/unschedulable:NoSchedule"]
        );
        let unknown = keys(&node("Unknown", json!({}))).unwrap();
        assert_eq!(unknown[1], "node.kubernetes.io/unreachable:NoExecute");
    }
}
