//! Starts the pod layer.

use std::collections::HashSet;
use std::sync::Arc;

use keelson_supervise::Heartbeats;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::admission::Ledger;
use super::config::PodsConfig;
use super::dispatcher::{self, Dispatcher};
use super::objects::ObjectCache;
use super::pull_slots::PullSlots;
use super::registry::PodRegistry;
use super::services::ServiceLinks;
use super::shared::Node;
use super::source::{SourceKind, api, manifests};
use crate::cgroup::{CgroupError, CgroupTree};
use crate::events::EventRecorder;
use crate::runtime::Runtime;

/// What the pod layer works with. Whoever starts the agent makes it and shares the registry with the kubelet API.
pub struct Pods {
    pub config: PodsConfig,
    pub runtime: Runtime,
    /// Without an API server only static pods run.
    pub client: Option<kube::Client>,
    pub events: EventRecorder,
    pub registry: PodRegistry,
    pub heartbeats: Heartbeats,
}

/// Runs the pods of this node until `cancel`; then everything is left running for the next agent.
///
/// # Errors
/// When this machine has no cgroups.
pub async fn run(pods: Pods, cancel: CancellationToken) -> Result<(), CgroupError> {
    let Pods { config, runtime, client, events, registry, heartbeats } = pods;
    let cgroups = CgroupTree::detect(&config.cgroup_root)?;
    let (updates, receiver) = mpsc::channel(64);
    let mut sources = HashSet::new();
    if let Some(client) = client.clone() {
        sources.insert(SourceKind::Api);
        let follow = api::follow(client, config.node_name.clone(), updates.clone());
        spawn(follow, &cancel);
    }
    if let Some(folder) = config.static_pod_path.clone() {
        sources.insert(SourceKind::Manifests);
        spawn(manifests::follow(folder, config.node_name.clone(), updates.clone()), &cancel);
    }
    // The receiver must not end while a source may still speak: the last sender stays here.
    let _keep_open = updates;
    let pulls = PullSlots::new(config.max_parallel_image_pulls);
    let node = Arc::new(Node {
        objects: ObjectCache::new(client.clone()),
        services: ServiceLinks::start(client.clone(), cancel.clone()),
        ledger: Ledger::default(),
        pulls,
        cancel,
        config,
        runtime,
        client,
        events,
        cgroups,
        registry,
    });
    let heartbeat = heartbeats.register("pod dispatcher", dispatcher::SILENCE);
    Dispatcher::new(node, sources).run(receiver, heartbeat).await;
    Ok(())
}

/// A source that ended by a panic would leave the node deaf: the agent ends with it, and is started again.
fn spawn(work: impl Future<Output = ()> + Send + 'static, cancel: &CancellationToken) {
    let cancel = cancel.clone();
    let work = keelson_supervise::caught("pod source", work);
    tokio::spawn(async move {
        if let Some(Err(_)) = cancel.run_until_cancelled(work).await {
            cancel.cancel();
        }
    });
}
