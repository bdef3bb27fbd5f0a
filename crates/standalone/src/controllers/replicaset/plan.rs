//! Which pods a ReplicaSet takes, lets go, creates and deletes.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use crate::controllers::ownership::{Claim, claim, controller_reference};
use crate::controllers::pods::{is_active, is_ready, phase, ready_since, since_then};
use crate::controllers::selector::{is_empty, selects};

/// What is to be done for one ReplicaSet. Pods to adopt are counted as its own already.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Pods that are the ReplicaSet's, those to adopt included.
    pub(crate) claimed: Vec<Arc<Pod>>,
    /// Pods that get a controller reference.
    pub(crate) adopt: Vec<Arc<Pod>>,
    /// Pods that lose theirs.
    pub(crate) release: Vec<Arc<Pod>>,
    /// How many pods to create.
    pub(crate) create: usize,
    /// The pods to delete, first the one that is missed least.
    pub(crate) delete: Vec<Arc<Pod>>,
}

/// Compares wish and reality. `pods` are all pods of the namespace, or at least those that may concern the set.
pub(crate) fn plan(set: &ReplicaSet, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let Some(spec) = &set.spec else { return plan };
    if is_empty(&spec.selector) {
        return plan;
    }
    for pod in pods {
        let matches = selects(&spec.selector, pod.metadata.labels.as_ref());
        // A pod that has ended is not worth taking.
        match claim(&set.metadata, &pod.metadata, matches) {
            Claim::Adopt if is_active(pod) => {
                plan.adopt.push(pod.clone());
                plan.claimed.push(pod.clone());
            }
            Claim::Keep => plan.claimed.push(pod.clone()),
            Claim::Release => plan.release.push(pod.clone()),
            Claim::Adopt | Claim::Ignore => {}
        }
    }
    if set.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let mut active: Vec<Arc<Pod>> =
        plan.claimed.iter().filter(|pod| is_active(pod)).cloned().collect();
    let wanted = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    plan.create = wanted.saturating_sub(active.len());
    let surplus = active.len().saturating_sub(wanted);
    if surplus > 0 {
        rank(&mut active, now);
        plan.delete = active.into_iter().take(surplus).collect();
    }
    plan
}

/// Sorts pods so that those which are missed least come first: not placed, not running, not ready, cheap by
/// annotation, doubled on a node, ready for the shortest time, restarted most often, youngest.
pub(crate) fn rank(pods: &mut [Arc<Pod>], now: Timestamp) {
    let mut crowd: HashMap<String, usize> = HashMap::new();
    for pod in pods.iter() {
        *crowd.entry(node(pod).to_owned()).or_default() += 1;
    }
    let key = |pod: &Pod| Rank {
        placed: !node(pod).is_empty(),
        running: match phase(pod) {
            "Running" => 2,
            "Unknown" => 1,
            _ => 0,
        },
        ready: is_ready(pod),
        cost: deletion_cost(&pod.metadata),
        alone: std::cmp::Reverse(crowd.get(node(pod)).copied().unwrap_or(0)),
        // Times are compared by magnitude, so that the choice among pods of about the same age does not
        // always hit the same node (upstream's LogarithmicScaleDown).
        ready_for: ready_since(pod).map_or(0, |since| magnitude(since, now)),
        steady: std::cmp::Reverse(restarts(pod)),
        age: pod.metadata.creation_timestamp.as_ref().map_or(0, |time| magnitude(time.0, now)),
        uid: pod.metadata.uid.clone().unwrap_or_default(),
    };
    pods.sort_by(|one, other| key(one).partial_cmp(&key(other)).unwrap_or(Ordering::Equal));
}

/// Field order is the order of importance; smaller goes first.
#[derive(PartialEq, PartialOrd)]
struct Rank {
    placed: bool,
    running: u8,
    ready: bool,
    cost: i32,
    alone: std::cmp::Reverse<usize>,
    ready_for: u32,
    steady: std::cmp::Reverse<i32>,
    age: u32,
    uid: String,
}

fn magnitude(then: Timestamp, now: Timestamp) -> u32 {
    since_then(then, now).as_millis().checked_ilog2().unwrap_or(0) + 1
}

fn node(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

fn deletion_cost(meta: &ObjectMeta) -> i32 {
    let annotations = meta.annotations.as_ref();
    let cost = annotations.and_then(|all| all.get("controller.kubernetes.io/pod-deletion-cost"));
    cost.and_then(|cost| cost.parse().ok()).unwrap_or(0)
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_deref());
    statuses.unwrap_or_default().iter().map(|status| status.restart_count).max().unwrap_or(0)
}

/// The pod that the ReplicaSet's template describes; the API server completes the name.
pub(crate) fn pod_from_template(set: &ReplicaSet) -> Pod {
    let template = set.spec.as_ref().and_then(|spec| spec.template.clone()).unwrap_or_default();
    let from = template.metadata.unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", set.metadata.name.as_deref().unwrap_or_default())),
            namespace: set.metadata.namespace.clone(),
            labels: from.labels,
            annotations: from.annotations,
            finalizers: from.finalizers,
            owner_references: Some(vec![controller_reference::<ReplicaSet>(&set.metadata)]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

/// The sizes of the batches in which `count` pods are created: 1, 2, 4 and so on, so that a template which the API
/// server refuses costs one refusal and not hundreds.
pub(crate) fn batches(count: usize) -> impl Iterator<Item = usize> {
    let mut left = count;
    let mut size = 1;
    std::iter::from_fn(move || {
        let now = size.min(left);
        left -= now;
        size *= 2;
        (now > 0).then_some(now)
    })
}
