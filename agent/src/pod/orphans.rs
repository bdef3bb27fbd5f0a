//! What is left of pods that nobody wants any more: deleted while the agent was away.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;

use super::image::chain;
use super::shared::Node;
use super::worker::forget_observed;
use crate::runtime::types::ObservedPod;
use crate::volume::teardown;

/// kubelet's grace for containers whose pod is unknown.
const GRACE: Duration = Duration::from_secs(1);

/// Removes the containers, folders and cgroups of all pods but `known`. Called once, when all sources have told everything.
pub(super) async fn remove(node: Arc<Node>, known: HashSet<String>) {
    let observed = match node.runtime.observe_all().await {
        Ok(observed) => observed,
        Err(error) => {
            tracing::warn!(%error, "Cannot look for orphaned pods");
            return;
        }
    };
    for pod in observed.iter().filter(|pod| !known.contains(&pod.pod.uid)) {
        tracing::info!(
            pod = pod.pod.name,
            pod_uid = pod.pod.uid,
            "Removing a pod that nobody wants"
        );
        if let Err(problem) = remove_pod(&node, pod).await {
            tracing::warn!(pod = pod.pod.name, problem, "Orphaned pod not removed");
        }
    }
    remove_leftovers(&node, &known);
}

async fn remove_pod(node: &Node, pod: &ObservedPod) -> Result<(), String> {
    let stopped =
        join_all(pod.containers.iter().map(|c| node.runtime.stop_container(&c.id, GRACE))).await;
    for result in stopped {
        result.map_err(|e| chain(&e))?;
    }
    forget_observed(node, Some(pod)).await
}

/// Folders and cgroups that no worker owns. A pod that starts meanwhile is known to the registry.
fn remove_leftovers(node: &Node, known: &HashSet<String>) {
    let wanted: HashSet<String> = node
        .registry
        .pods()
        .iter()
        .filter_map(|pod| pod.metadata.uid.clone())
        .chain(known.iter().cloned())
        .collect();
    let folders =
        std::fs::read_dir(node.config.root_dir.join("pods")).into_iter().flatten().flatten();
    for folder in folders {
        let uid = folder.file_name().to_string_lossy().into_owned();
        if !wanted.contains(&uid)
            && let Err(error) = teardown::remove_pod_dir(&folder.path())
        {
            tracing::warn!(pod_uid = uid, %error, "Folder of an orphaned pod not removed");
        }
    }
    for uid in node.cgroups.pod_uids().into_iter().filter(|uid| !wanted.contains(uid)) {
        if let Err(error) = node.cgroups.remove_pod(&uid) {
            tracing::warn!(
                pod_uid = uid,
                error = chain(&error),
                "cgroup of an orphaned pod not removed"
            );
        }
    }
}
