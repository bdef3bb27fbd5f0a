//! One decision: the node for a pod, or the reason why there is none.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Pod, Taint};

use super::affinity::{node_matches, preference, untolerated};
use super::ledger::{HostPort, Ledger, NodeLoad, host_ports};
use super::resources::{Amounts, pod_request};

/// What becomes of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Bind it to this node.
    Bind(String),
    /// No node can take it now, in Kubernetes' words.
    Unschedulable(String),
}

/// The taints that keep pods away from a node that does not say that it is ready.
///
/// They are derived and not only read, since the lifecycle controller may not have written them yet.
const NOT_READY: &str = "node.kubernetes.io/not-ready";

/// Chooses the node for `pod`.
pub(crate) fn decide(pod: &Pod, ledger: &Ledger) -> Decision {
    let request = pod_request(pod);
    let ports = host_ports(pod);
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut best: Option<(Score, &str)> = None;
    let mut total = 0;
    for (name, load) in ledger.nodes() {
        total += 1;
        let Some(node) = &load.node else { continue };
        let obstacles = obstacles(pod, &request, &ports, node, load);
        if obstacles.is_empty() {
            let score = score(pod, &request, node, load);
            // Names break ties, so that the same state always gives the same answer.
            if best.as_ref().is_none_or(|(held, _)| score > *held) {
                best = Some((score, name));
            }
        }
        for obstacle in obstacles {
            *reasons.entry(obstacle).or_default() += 1;
        }
    }
    match best {
        Some((_, node)) => Decision::Bind(node.to_owned()),
        None => Decision::Unschedulable(message(total, &reasons)),
    }
}

/// `0/1 nodes are available: 1 Insufficient cpu.`
fn message(total: usize, reasons: &BTreeMap<String, usize>) -> String {
    if total == 0 {
        return "no nodes available to schedule pods".to_owned();
    }
    let mut parts: Vec<String> =
        reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    parts.sort();
    format!("0/{total} nodes are available: {}.", parts.join(", "))
}

/// What keeps the pod from the node. The first kind of obstacle hides the later ones, as with the upstream filters.
fn obstacles(
    pod: &Pod,
    request: &Amounts,
    ports: &[HostPort],
    node: &Node,
    load: &NodeLoad,
) -> Vec<String> {
    let taints = taints(node);
    let unschedulable = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
    let cordon = Taint {
        key: "node.kubernetes.io/unschedulable".into(),
        effect: "NoSchedule".into(),
        ..Taint::default()
    };
    if unschedulable && untolerated(pod, &[cordon], &["NoSchedule"]).is_some() {
        return vec!["node(s) were unschedulable".to_owned()];
    }
    if let Some(taint) = untolerated(pod, &taints, &["NoSchedule", "NoExecute"]) {
        let value = taint.value.as_deref().unwrap_or_default();
        return vec![format!("node(s) had untolerated taint {{{}: {value}}}", taint.key)];
    }
    if !node_matches(pod, node) {
        return vec!["node(s) didn't match Pod's node affinity/selector".to_owned()];
    }
    if ports.iter().any(|wanted| load.ports.iter().any(|used| conflicts(wanted, used))) {
        return vec!["node(s) didn't have free ports for the requested pod ports".to_owned()];
    }
    shortages(request, load)
}

fn shortages(request: &Amounts, load: &NodeLoad) -> Vec<String> {
    let mut found = Vec::new();
    let room = load.allocatable.0.get("pods").copied().unwrap_or(110);
    if i64::try_from(load.pods).unwrap_or(i64::MAX) + 1 > room {
        found.push("Too many pods".to_owned());
    }
    for (name, amount) in &request.0 {
        let free = load.allocatable.get(name).saturating_sub(load.requested.get(name));
        if *amount > 0 && *amount > free {
            found.push(format!("Insufficient {name}"));
        }
    }
    found
}

/// A host port on all addresses conflicts with the same port on any.
fn conflicts(one: &HostPort, other: &HostPort) -> bool {
    one.1 == other.1
        && one.2 == other.2
        && (one.0.is_empty() || other.0.is_empty() || one.0 == other.0)
}

/// The node's taints and those that follow from its condition.
fn taints(node: &Node) -> Vec<Taint> {
    let mut taints: Vec<Taint> =
        node.spec.iter().flat_map(|spec| spec.taints.iter().flatten()).cloned().collect();
    if !is_ready(node) && !taints.iter().any(|taint| taint.key == NOT_READY) {
        taints.push(Taint {
            key: NOT_READY.into(),
            effect: "NoSchedule".into(),
            ..Taint::default()
        });
    }
    // The cordon has a message of its own.
    taints.retain(|taint| taint.key != "node.kubernetes.io/unschedulable");
    taints
}

/// Whether the node's Ready condition is True.
pub(crate) fn is_ready(node: &Node) -> bool {
    node.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Larger is better: preferred terms, then soft taints, then free share of cpu and memory.
type Score = (i64, i64, i64);

fn score(pod: &Pod, request: &Amounts, node: &Node, load: &NodeLoad) -> Score {
    let soft = i64::from(untolerated(pod, &taints(node), &["PreferNoSchedule"]).is_none());
    let free = ["cpu", "memory"]
        .iter()
        .map(|name| {
            let capacity = load.allocatable.get(name);
            // Pods that ask for nothing still take something (upstream's defaults of 100m and 200MiB).
            let least = if *name == "cpu" { 100 } else { 200 << 20 };
            let used = load.requested.get(name).saturating_add(request.get(name).max(least));
            if capacity <= 0 { 0 } else { (capacity - used).max(0).saturating_mul(100) / capacity }
        })
        .sum::<i64>();
    let spread = -i64::try_from(load.pods).unwrap_or(i64::MAX);
    (preference(pod, node) + soft * 100, free, spread)
}
