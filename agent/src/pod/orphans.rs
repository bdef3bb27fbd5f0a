//! What is left of pods that nobody wants any more: deleted while the agent was away.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;

use super::image::chain;
use super::shared::Node;
use super::worker::forget_observed;
use crate::runtime::types::ObservedPod;
use crate::volume::teardown;

/// kubelet's grace for containers whose pod is unknown.
const GRACE: Duration = Duration::from_secs(1);

/// So many pods are removed side by side: most of it is waiting for processes to end.
const PARALLEL: usize = 8;

/// Between two attempts at what could not be removed.
const RETRY: Duration = Duration::from_secs(5);

/// Removes the containers, folders and cgroups of all pods but `known`. Called once, when all sources have told
/// everything; what cannot be removed is tried again, for nobody else will.
pub(super) async fn remove(node: Arc<Node>, known: HashSet<String>) {
    let orphans = loop {
        match node.runtime.observe_all().await {
            Ok(observed) => {
                let unknown = |pod: &ObservedPod| !known.contains(&pod.pod.uid);
                break observed.into_iter().filter(unknown).map(|pod| pod.pod.uid).collect();
            }
            Err(error) => {
                tracing::warn!(%error, "Cannot look for orphaned pods");
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    let mut left: Vec<String> = orphans;
    while !left.is_empty() {
        let failed = futures_util::stream::iter(left)
            .map(|uid| remove_orphan(&node, uid))
            .buffer_unordered(PARALLEL)
            .filter_map(std::future::ready)
            .collect()
            .await;
        left = failed;
        if !left.is_empty() {
            tokio::time::sleep(RETRY).await;
        }
    }
    remove_leftovers(&node, &known);
}

/// Answers the uid again when it could not be removed.
async fn remove_orphan(node: &Node, uid: String) -> Option<String> {
    let problem = match node.runtime.observe(&uid).await {
        Ok(None) => return None,
        Ok(Some(pod)) => {
            tracing::info!(pod = pod.pod.name, pod_uid = uid, "Removing a pod that nobody wants");
            remove_pod(node, &pod).await.err()?
        }
        Err(error) => chain(&error),
    };
    tracing::warn!(pod_uid = uid, problem, "Orphaned pod not removed");
    Some(uid)
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
