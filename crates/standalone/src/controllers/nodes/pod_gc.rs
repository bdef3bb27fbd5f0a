//! Pods that nobody will clean up: those of nodes that are gone, and too many that have ended.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use tracing::info;

use super::{node_of, pods_on};
use crate::controllers::cluster::{Change, Cluster, Key};
use crate::controllers::pods::has_ended;
use crate::controllers::queue::Outcome;
use crate::controllers::worker::Controller;
use crate::{Api, ApiError, DeleteOptions, Preconditions, Registry};

/// How many ended pods may stay for people to look at (kube-controller-manager's default).
const ENDED_KEPT: usize = 12_500;
/// How long a node may be missing before its pods are given up (upstream's quarantine): it may register again.
const QUARANTINE: Duration = Duration::from_secs(40);
/// Stands for all ended pods in the queue; no node can be called so.
const ENDED: &str = "*ended*";

/// The pod garbage collector. Keys are nodes, and [`ENDED`].
pub(crate) struct PodCollection {
    cluster: Arc<Cluster>,
    pods: Api<Pod>,
    missing: Mutex<HashMap<String, Instant>>,
}

impl PodCollection {
    pub(crate) fn new(registry: &Registry, cluster: &Arc<Cluster>) -> Result<Self, ApiError> {
        let missing = Mutex::new(HashMap::new());
        Ok(Self { cluster: cluster.clone(), pods: registry.api()?, missing })
    }

    async fn collect_ended(&self) -> Result<(), ApiError> {
        for pod in surplus(self.cluster.pods.all(), ENDED_KEPT) {
            self.delete(&pod).await?;
        }
        Ok(())
    }

    /// Its agent cannot report the end of such a pod any more: it is marked as failed and removed at once.
    async fn collect_orphan(&self, pod: &Pod, node: &str) -> Result<(), ApiError> {
        if !has_ended(pod) {
            let mut pod = pod.clone();
            pod.metadata.resource_version = None;
            let status = pod.status.get_or_insert_default();
            status.phase = Some("Failed".into());
            status.reason = Some("NodeLost".into());
            status.message = Some(format!("node {node} does not exist any more"));
            match self.pods.update_status(&pod).await {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
        info!(pod = %Key::of(&pod.metadata), node, "Removing the pod of a node that is gone");
        self.delete(pod).await
    }

    async fn delete(&self, pod: &Pod) -> Result<(), ApiError> {
        let key = Key::of(&pod.metadata);
        let preconditions =
            Preconditions { uid: pod.metadata.uid.clone(), ..Preconditions::default() };
        let options =
            DeleteOptions { grace_period_seconds: Some(0), preconditions, propagation: None };
        match self.pods.delete(&key.namespace, &key.name, &options).await {
            Err(error) if !error.is_not_found() && !error.is_conflict() => Err(error),
            _ => Ok(()),
        }
    }

    /// How long the node must still be missing, or `None` if it is there.
    fn quarantine(&self, node: &str) -> Option<Duration> {
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.cluster.nodes.get(&Key::new("", node)).is_some() {
            missing.remove(node);
            return None;
        }
        let since = missing.entry(node.to_owned()).or_insert_with(Instant::now);
        Some(QUARANTINE.saturating_sub(since.elapsed()))
    }
}

/// The ended pods beyond the limit, oldest first.
fn surplus(mut pods: Vec<Arc<Pod>>, limit: usize) -> Vec<Arc<Pod>> {
    pods.retain(|pod| has_ended(pod));
    let count = pods.len().saturating_sub(limit);
    let age = |pod: &Arc<Pod>| -> Option<Timestamp> {
        pod.metadata.creation_timestamp.as_ref().map(|time| time.0)
    };
    if count > 0 {
        pods.sort_by_key(age);
    }
    pods.truncate(count);
    pods
}

impl Controller for PodCollection {
    const NAME: &'static str = "pod-garbage-collector";
    type Key = Key;

    fn affected(&self, change: &Change, add: &mut dyn FnMut(Key)) {
        match change {
            Change::Node(delta) if delta.new.is_none() || delta.old.is_none() => {
                if let Some(node) = delta.latest() {
                    add(Key::of(&node.metadata));
                }
            }
            Change::Pod(delta) => {
                let Some(pod) = &delta.new else { return };
                let before = delta.old.as_deref();
                if has_ended(pod) && !before.is_some_and(has_ended) {
                    add(Key::new("", ENDED));
                }
                let node = node_of(pod).filter(|_| before.and_then(node_of).is_none());
                let Some(node) = node.map(|node| Key::new("", node)) else { return };
                if self.cluster.nodes.get(&node).is_none() {
                    add(node);
                }
            }
            _ => {}
        }
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, ApiError> {
        if key.name == ENDED {
            self.collect_ended().await?;
            return Ok(Outcome::Done);
        }
        let Some(left) = self.quarantine(&key.name) else { return Ok(Outcome::Done) };
        let pods = pods_on(&self.cluster, &key.name);
        if pods.is_empty() {
            return Ok(Outcome::Done);
        }
        if !left.is_zero() {
            return Ok(Outcome::Later(left));
        }
        for pod in pods {
            self.collect_orphan(&pod, &key.name).await?;
        }
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_ended_pods_beyond_the_limit_go() {
        let pod = |name: &str, second: u32, phase: &str| {
            let value = serde_json::json!({"metadata": {"name": name,
                "creationTimestamp": format!("2026-01-01T00:00:{second:02}Z")}, "status": {"phase": phase}});
            Arc::new(serde_json::from_value::<Pod>(value).unwrap())
        };
        let pods = vec![
            pod("b", 2, "Failed"),
            pod("a", 1, "Succeeded"),
            pod("r", 0, "Running"),
            pod("c", 3, "Failed"),
        ];
        let names = |pods: Vec<Arc<Pod>>| -> Vec<String> {
            pods.iter().map(|pod| pod.metadata.name.clone().unwrap()).collect()
        };
        assert_eq!(names(surplus(pods.clone(), 1)), ["a", "b"]);
        assert_eq!(names(surplus(pods, 3)), [""; 0]);
    }
}
