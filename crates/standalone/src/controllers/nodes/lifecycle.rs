//! Watches over nodes: who does not renew its Lease is not ready, and its pods are not either.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tracing::{info, warn};

use super::eviction::stays_for;
use super::health::{GRACE, condition, conditions, taints};
use super::{node_of, pods_on};
use crate::controllers::cluster::{Change, Cluster, Key};
use crate::controllers::pods::is_ready;
use crate::controllers::queue::Outcome;
use crate::controllers::recorder::{Recorder, Tone};
use crate::controllers::worker::Controller;
use crate::{Api, ApiError, DeleteOptions, PatchType, Preconditions, Registry};

/// Where nodes keep their Leases.
const LEASES: &str = "kube-node-lease";

/// The node lifecycle controller. Keys are nodes.
pub(crate) struct NodeLifecycle {
    cluster: Arc<Cluster>,
    nodes: Api<Node>,
    pods: Api<Pod>,
    recorder: Recorder,
    signs: Mutex<HashMap<String, Sign>>,
    /// When each node's NoExecute taints were first seen.
    tainted: Mutex<HashMap<String, Vec<(Taint, Instant)>>>,
}

/// A node's last sign of life, and when *we* saw it: a clock that jumps, or a control plane that was down itself, must
/// not make a node look dead.
#[derive(Debug, Clone)]
struct Sign {
    renewed: Option<Timestamp>,
    seen: Instant,
}

impl NodeLifecycle {
    pub(crate) fn new(
        registry: &Registry,
        cluster: &Arc<Cluster>,
        recorder: Recorder,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            cluster: cluster.clone(),
            nodes: registry.api()?,
            pods: registry.api()?,
            recorder,
            signs: Mutex::default(),
            tainted: Mutex::default(),
        })
    }

    fn silent_for(&self, node: &str) -> Duration {
        let lease = self.cluster.leases.get(&Key::new(LEASES, node));
        let spec = lease.as_ref().and_then(|lease| lease.spec.as_ref());
        let renewed = spec.and_then(|spec| spec.renew_time.as_ref()).map(|time| time.0);
        let mut signs = self.signs.lock().unwrap_or_else(PoisonError::into_inner);
        let sign =
            signs.entry(node.to_owned()).or_insert_with(|| Sign { renewed, seen: Instant::now() });
        if sign.renewed != renewed {
            *sign = Sign { renewed, seen: Instant::now() };
        }
        sign.seen.elapsed()
    }

    fn forget(&self, node: &str) {
        self.signs.lock().unwrap_or_else(PoisonError::into_inner).remove(node);
        self.tainted.lock().unwrap_or_else(PoisonError::into_inner).remove(node);
    }

    /// The node's NoExecute taints, and when this process saw each of them first.
    fn evicting_taints(&self, node: &Node, name: &str) -> Vec<(Taint, Instant)> {
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let evicting: Vec<&Taint> = taints.filter(|taint| taint.effect == "NoExecute").collect();
        let mut tainted = self.tainted.lock().unwrap_or_else(PoisonError::into_inner);
        if evicting.is_empty() {
            tainted.remove(name);
            return Vec::new();
        }
        let known = tainted.entry(name.to_owned()).or_default();
        known.retain(|(taint, _)| evicting.contains(&taint));
        for taint in evicting {
            if !known.iter().any(|(seen, _)| seen == taint) {
                known.push((taint.clone(), Instant::now()));
            }
        }
        known.clone()
    }

    async fn report_silence(&self, node: &Node, silent_for: Duration) -> Result<bool, ApiError> {
        let Some(wanted) = conditions(node, silent_for, Timestamp::now()) else { return Ok(false) };
        let name = node.metadata.name.clone().unwrap_or_default();
        let mut node = node.clone();
        node.status.get_or_insert_default().conditions = Some(wanted);
        self.nodes.update_status(&node).await?;
        warn!(node = %name, "Node does not renew its lease, its state is unknown");
        let text = format!("Node {name} status is now: NodeNotReady");
        self.recorder.record::<Node>(&node.metadata, Tone::Normal, "NodeNotReady", &text);
        Ok(true)
    }

    /// Endpoints on a node that cannot be reached must not get traffic.
    async fn mark_pods(&self, name: &str) -> Result<(), ApiError> {
        for pod in pods_on(&self.cluster, name).iter().filter(|pod| is_ready(pod)) {
            let mut pod = Pod::clone(pod);
            let status = pod.status.get_or_insert_default();
            for condition in status.conditions.iter_mut().flatten() {
                if condition.type_ == "Ready" {
                    condition.status = "False".into();
                    condition.last_transition_time = Some(Time(Timestamp::now()));
                }
            }
            match self.pods.update_status(&pod).await {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
            self.recorder.record::<Pod>(
                &pod.metadata,
                Tone::Warning,
                "NodeNotReady",
                "Node is not ready",
            );
        }
        Ok(())
    }

    async fn write_taints(&self, node: &Node) -> Result<bool, ApiError> {
        let Some(wanted) = taints(node, Timestamp::now()) else { return Ok(false) };
        let patch = json!({
            "metadata": {"resourceVersion": node.metadata.resource_version},
            "spec": {"taints": wanted},
        });
        let name = node.metadata.name.as_deref().unwrap_or_default();
        self.nodes.patch("", name, PatchType::Merge, &patch).await?;
        Ok(true)
    }

    /// Deletes the pods that may not stay. Returns when the next one may not.
    async fn evict(&self, node: &Node, name: &str) -> Result<Option<Duration>, ApiError> {
        let seen = self.evicting_taints(node, name);
        let taints: Vec<_> = seen.iter().map(|(taint, since)| (taint, since.elapsed())).collect();
        if taints.is_empty() {
            return Ok(None);
        }
        let mut next: Option<Duration> = None;
        for pod in pods_on(&self.cluster, name) {
            match stays_for(&pod, &taints) {
                None => {}
                Some(Duration::ZERO) => self.delete(&pod).await?,
                Some(left) => next = Some(next.map_or(left, |soonest| soonest.min(left))),
            }
        }
        Ok(next)
    }

    async fn delete(&self, pod: &Pod) -> Result<(), ApiError> {
        let key = Key::of(&pod.metadata);
        let text = format!("Marking for deletion Pod {key}");
        self.recorder.record::<Pod>(&pod.metadata, Tone::Normal, "TaintManagerEviction", &text);
        let preconditions =
            Preconditions { uid: pod.metadata.uid.clone(), ..Preconditions::default() };
        let options = DeleteOptions { preconditions, ..DeleteOptions::default() };
        match self.pods.delete(&key.namespace, &key.name, &options).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => {
                info!(pod = %key, "Evicted by a taint of its node");
                Ok(())
            }
        }
    }
}

impl Controller for NodeLifecycle {
    const NAME: &'static str = "node-lifecycle";
    type Key = Key;

    fn affected(&self, change: &Change, add: &mut dyn FnMut(Key)) {
        match change {
            Change::Node(delta) => {
                if let Some(node) = delta.latest() {
                    add(Key::of(&node.metadata));
                }
            }
            Change::Lease(delta) => {
                if let Some(lease) = delta.latest() {
                    add(Key::new("", lease.metadata.name.as_deref().unwrap_or_default()));
                }
            }
            Change::Pod(delta) => {
                let node = delta.new.as_deref().and_then(node_of);
                let came = delta.old.as_deref().and_then(node_of) != node;
                if let Some(node) = node.filter(|_| came) {
                    add(Key::new("", node));
                }
            }
            _ => {}
        }
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, ApiError> {
        let Some(node) = self.cluster.nodes.get(key) else {
            self.forget(&key.name);
            return Ok(Outcome::Done);
        };
        let silent_for = self.silent_for(&key.name);
        // What is written here comes back as a change of the node, and with it the next step.
        if self.report_silence(&node, silent_for).await? || self.write_taints(&node).await? {
            return Ok(Outcome::Later(
                GRACE.saturating_sub(silent_for).max(Duration::from_secs(1)),
            ));
        }
        if silent_for >= GRACE && condition(&node, "Ready") == "Unknown" {
            self.mark_pods(&key.name).await?;
        }
        let eviction = self.evict(&node, &key.name).await?;
        // A node that is known to be silent wakes us when it speaks.
        let silence = Some(GRACE.saturating_sub(silent_for)).filter(|left| !left.is_zero());
        let next = eviction.into_iter().chain(silence).min();
        Ok(next.map_or(Outcome::Done, |left| Outcome::Later(left + Duration::from_millis(10))))
    }
}
