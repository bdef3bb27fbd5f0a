//! What all workers of a node share.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::admission::Ledger;
use super::config::PodsConfig;
use super::objects::ObjectCache;
use super::pull_slots::PullSlots;
use super::registry::PodRegistry;
use super::services::ServiceLinks;
use crate::cgroup::CgroupTree;
use crate::dns::Resolver;
use crate::events::EventRecorder;
use crate::runtime::Runtime;

pub(super) struct Node {
    pub config: PodsConfig,
    pub runtime: Runtime,
    pub client: Option<kube::Client>,
    pub objects: ObjectCache,
    pub services: ServiceLinks,
    pub events: EventRecorder,
    pub cgroups: CgroupTree,
    pub registry: PodRegistry,
    pub ledger: Ledger,
    /// Images that are fetched at the same time.
    pub pulls: PullSlots,
    pub cancel: CancellationToken,
}

impl Node {
    /// The node's own resolver configuration, read anew for each pod: it changes with the network.
    pub(super) fn host_resolver(&self) -> Resolver {
        if self.config.resolv_conf.as_os_str().is_empty() {
            return Resolver::default();
        }
        match std::fs::read_to_string(&self.config.resolv_conf) {
            Ok(text) => Resolver::parse(&text),
            Err(error) => {
                let path = self.config.resolv_conf.display();
                tracing::warn!(%path, %error, "Resolver configuration not readable, pods get none");
                Resolver::default()
            }
        }
    }

    /// Sets the class weights to what the admitted pods ask for.
    pub(super) fn update_class_shares(self: &Arc<Self>) {
        if let Err(error) = self.cgroups.set_class_shares(self.ledger.cpu_requests_milli()) {
            tracing::debug!(%error, "CPU weights of the QoS classes not set");
        }
    }

    pub(super) fn memory_capacity(&self) -> i64 {
        let memory = self.config.capacity.get("memory");
        memory.and_then(crate::cgroup::resources::whole).unwrap_or(i64::MAX)
    }
}
