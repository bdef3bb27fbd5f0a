//! Which nodes a pod names: node selector, node affinity, taints and tolerations.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, Taint, Toleration,
};

/// Whether the node satisfies the pod's `nodeSelector` and its required node affinity.
pub(crate) fn node_matches(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let selected =
        spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let required =
        spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref()).and_then(
            |affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref(),
        );
    selected
        && required.is_none_or(|required| {
            required.node_selector_terms.iter().any(|term| term_matches(term, node, labels))
        })
}

/// The weight of the preferred terms that the node satisfies.
pub(crate) fn preference(pod: &Pod, node: &Node) -> i64 {
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    pod.spec
        .iter()
        .filter_map(|spec| spec.affinity.as_ref()?.node_affinity.as_ref())
        .flat_map(|affinity| {
            affinity.preferred_during_scheduling_ignored_during_execution.iter().flatten()
        })
        .filter(|preferred| term_matches(&preferred.preference, node, labels))
        .map(|preferred| i64::from(preferred.weight))
        .sum()
}

/// An empty term matches nothing (core/v1 NodeSelectorTerm).
fn term_matches(term: &NodeSelectorTerm, node: &Node, labels: &BTreeMap<String, String>) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let name = node.metadata.name.as_ref();
    expressions.iter().all(|wanted| requirement_matches(wanted, labels.get(&wanted.key)))
        && fields
            .iter()
            .all(|wanted| wanted.key == "metadata.name" && requirement_matches(wanted, name))
}

fn requirement_matches(wanted: &NodeSelectorRequirement, value: Option<&String>) -> bool {
    let values = wanted.values.as_deref().unwrap_or_default();
    let number = |text: &String| text.parse::<i64>().ok();
    let compared = |holds: fn(i64, i64) -> bool| {
        let bound = values.first().and_then(number);
        value.and_then(number).zip(bound).is_some_and(|(value, bound)| holds(value, bound))
    };
    match wanted.operator.as_str() {
        "In" => value.is_some_and(|value| values.contains(value)),
        "NotIn" => value.is_none_or(|value| !values.contains(value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compared(|value, bound| value > bound),
        "Lt" => compared(|value, bound| value < bound),
        _ => false,
    }
}

/// Whether one toleration covers the taint (core/v1 `Toleration.ToleratesTaint`).
pub(crate) fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let set = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    if set(&toleration.effect).is_some_and(|effect| effect != taint.effect) {
        return false;
    }
    if set(&toleration.key).is_some_and(|key| key != taint.key) {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or_default() {
        "Exists" => true,
        "" | "Equal" => {
            set(&toleration.key).is_some()
                && toleration.value.clone().unwrap_or_default()
                    == taint.value.clone().unwrap_or_default()
        }
        _ => false,
    }
}

/// The first taint with one of `effects` that no toleration of the pod covers.
pub(crate) fn untolerated<'a>(
    pod: &Pod,
    taints: &'a [Taint],
    effects: &[&str],
) -> Option<&'a Taint> {
    let tolerations =
        pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
    taints
        .iter()
        .filter(|taint| effects.contains(&taint.effect.as_str()))
        .find(|taint| !tolerations.iter().any(|toleration| tolerates(toleration, taint)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(spec: serde_json::Value, want: bool) {
        let node: Node = serde_json::from_value(
            json!({"metadata": {"name": "n1", "labels": {"disk": "ssd", "cores": "8"}}}),
        )
        .unwrap();
        let pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
        assert_eq!(node_matches(&pod, &node), want);
    }

    fn required(term: serde_json::Value) -> serde_json::Value {
        json!({"containers": [], "affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}})
    }

    #[test]
    fn selectors_and_affinity_operators() {
        check(json!({"containers": [], "nodeSelector": {"disk": "ssd"}}), true);
        check(json!({"containers": [], "nodeSelector": {"disk": "hdd"}}), false);
        let expression = |key: &str, operator: &str, values: &[&str]| {
            required(
                json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]}),
            )
        };
        check(expression("disk", "In", &["hdd", "ssd"]), true);
        check(expression("disk", "NotIn", &["ssd"]), false);
        check(expression("gpu", "NotIn", &["x"]), true);
        check(expression("gpu", "Exists", &[]), false);
        check(expression("gpu", "DoesNotExist", &[]), true);
        check(expression("cores", "Gt", &["4"]), true);
        check(expression("cores", "Lt", &["8"]), false);
        check(required(json!({})), false);
        check(
            required(
                json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}),
            ),
            true,
        );
    }

    #[test]
    fn tolerations_cover_by_key_value_and_effect() {
        let taint = |effect: &str| Taint {
            key: "k".into(),
            value: Some("v".into()),
            effect: effect.into(),
            time_added: None,
        };
        let table = [
            (json!({"operator": "Exists"}), true),
            (json!({"key": "k", "operator": "Exists"}), true),
            (json!({"key": "k", "value": "v"}), true),
            (json!({"key": "k", "value": "w"}), false),
            (json!({"key": "k", "operator": "Exists", "effect": "NoExecute"}), false),
            (json!({"key": "other", "operator": "Exists"}), false),
            (json!({"value": "v"}), false),
        ];
        for (toleration, want) in table {
            let parsed: Toleration = serde_json::from_value(toleration.clone()).unwrap();
            assert_eq!(tolerates(&parsed, &taint("NoSchedule")), want, "{toleration}");
        }
        let pod = Pod::default();
        assert!(untolerated(&pod, &[taint("PreferNoSchedule")], &["NoSchedule"]).is_none());
        assert!(untolerated(&pod, &[taint("NoSchedule")], &["NoSchedule"]).is_some());
    }
}
