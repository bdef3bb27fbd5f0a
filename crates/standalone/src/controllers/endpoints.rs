//! EndpointSlices and Endpoints: which pods stand behind a Service.

mod desired;
mod legacy;
mod slices;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::try_join_all;
use k8s_openapi::api::core::v1::{Endpoints, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::jiff::Timestamp;

use self::slices::{MANAGED_BY, MANAGED_BY_LABEL, SERVICE_LABEL};
use super::cluster::{Change, Cluster, Delta, Key};
use super::expectations::Expectations;
use super::pods::{condition, ready_since};
use super::queue::Outcome;
use super::revision_of;
use super::worker::Controller;
use crate::{Api, ApiError, DeleteOptions, Object, Registry};

/// The controller of both kinds of endpoints.
pub(crate) struct ServiceEndpoints {
    cluster: Arc<Cluster>,
    slices: Api<EndpointSlice>,
    endpoints: Api<Endpoints>,
    owed: Expectations<Key>,
}

/// Whether a slice is one of those that this controller keeps.
pub(crate) fn is_ours(object: &Object) -> bool {
    object.labels.iter().any(|(key, value)| &**key == MANAGED_BY_LABEL && &**value == MANAGED_BY)
}

/// Whether an `Endpoints` object is one of those that this controller keeps.
pub(crate) fn is_our_endpoints(object: &Object) -> bool {
    object.labels.iter().any(|(_, value)| &**value == legacy::MANAGED_BY)
}

impl ServiceEndpoints {
    pub(crate) fn new(registry: &Registry, cluster: &Arc<Cluster>) -> Result<Self, ApiError> {
        Ok(Self {
            cluster: cluster.clone(),
            slices: registry.api()?,
            endpoints: registry.api()?,
            owed: Expectations::new(),
        })
    }

    /// The slices of one Service that are ours.
    fn held_slices(&self, key: &Key) -> Vec<Arc<EndpointSlice>> {
        let mut slices = self.cluster.endpoint_slices.in_namespace(&key.namespace);
        slices.retain(|slice| service_of(slice) == Some(&key.name));
        slices
    }

    async fn write_slices(
        &self,
        key: &Key,
        service: &Service,
        pods: &[Arc<Pod>],
        trigger: Option<Timestamp>,
    ) -> Result<(), ApiError> {
        let held = self.held_slices(key);
        let live = |uid: &str| held.iter().any(|slice| slice.metadata.uid.as_deref() == Some(uid));
        if !self.owed.are_met(key, self.cluster.endpoint_slices.revision(), live) {
            // The event of the slice that is still to come brings us back.
            return Ok(());
        }
        let node = |name: &str| self.cluster.nodes.get(&Key::new("", name));
        let wanted: BTreeMap<_, _> = desired::families(service)
            .into_iter()
            .map(|family| {
                let found = desired::endpoints(service, &family, pods, node);
                (family, found)
            })
            .collect();
        let writes = slices::compare(service, wanted, &held, trigger);
        // New endpoints first, so that no moment has fewer than before or after.
        try_join_all(writes.create.iter().map(|slice| self.create(key, slice))).await?;
        try_join_all(writes.update.iter().map(|slice| self.update(key, slice))).await?;
        try_join_all(writes.delete.iter().map(|slice| self.delete(key, slice))).await?;
        Ok(())
    }

    async fn create(&self, key: &Key, slice: &EndpointSlice) -> Result<(), ApiError> {
        let written = self.slices.create(slice).await?;
        self.owed.written(key, revision_of(&written.metadata));
        Ok(())
    }

    async fn update(&self, key: &Key, slice: &EndpointSlice) -> Result<(), ApiError> {
        let written = self.slices.update(slice).await?;
        self.owed.written(key, revision_of(&written.metadata));
        Ok(())
    }

    async fn delete(&self, key: &Key, slice: &EndpointSlice) -> Result<(), ApiError> {
        let name = slice.metadata.name.as_deref().unwrap_or_default();
        match self.slices.delete(&key.namespace, name, &DeleteOptions::default()).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => {
                self.owed.deleted(key, slice.metadata.uid.as_deref().unwrap_or_default());
                Ok(())
            }
        }
    }

    async fn write_endpoints(
        &self,
        key: &Key,
        service: &Service,
        pods: &[Arc<Pod>],
        trigger: Option<Timestamp>,
    ) -> Result<(), ApiError> {
        let held = match self.endpoints.get(&key.namespace, &key.name) {
            Ok(held) => Some(held),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(error),
        };
        let Some(wanted) = legacy::endpoints(service, pods, held.as_ref(), trigger) else {
            return Ok(());
        };
        if held.is_some() {
            self.endpoints.update(&wanted).await?;
        } else {
            self.endpoints.create(&wanted).await?;
        }
        Ok(())
    }

    /// The Service is gone, or no longer selects pods: what we made goes, what others made stays.
    async fn clear(&self, key: &Key, gone: bool) -> Result<(), ApiError> {
        for slice in self.held_slices(key) {
            self.delete(key, &slice).await?;
        }
        if gone && self.cluster.endpoints.get(key).is_some() {
            let options = DeleteOptions::default();
            match self.endpoints.delete(&key.namespace, &key.name, &options).await {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn services_of(&self, delta: &Delta<Pod>, add: &mut dyn FnMut(Key)) {
        if let (Some(old), Some(new)) = (&delta.old, &delta.new)
            && endpoint_facts(old) == endpoint_facts(new)
        {
            return;
        }
        let Some(latest) = delta.latest() else { return };
        let namespace = latest.metadata.namespace.as_deref().unwrap_or_default();
        for service in self.cluster.services.in_namespace(namespace) {
            if delta.both().any(|pod| desired::is_selected(&service, pod)) {
                add(Key::of(&service.metadata));
            }
        }
    }
}

impl Controller for ServiceEndpoints {
    const NAME: &'static str = "endpoints";
    type Key = Key;

    fn affected(&self, change: &Change, add: &mut dyn FnMut(Key)) {
        match change {
            Change::Service(delta) => {
                if let Some(service) = delta.latest() {
                    add(Key::of(&service.metadata));
                }
            }
            Change::Pod(delta) => self.services_of(delta, add),
            Change::EndpointSlice(delta) => {
                if let Some(slice) = delta.latest()
                    && let Some(service) = service_of(slice)
                {
                    add(Key::new(slice.metadata.namespace.as_deref().unwrap_or_default(), service));
                }
            }
            Change::Endpoints(delta) => {
                if let Some(endpoints) = delta.latest() {
                    add(Key::of(&endpoints.metadata));
                }
            }
            Change::Node(delta) => {
                let zone = |node: Option<&Arc<k8s_openapi::api::core::v1::Node>>| {
                    let labels = node?.metadata.labels.as_ref()?;
                    labels.get("topology.kubernetes.io/zone").cloned()
                };
                if zone(delta.old.as_ref()) != zone(delta.new.as_ref()) {
                    for key in self.cluster.services.keys() {
                        add(key);
                    }
                }
            }
            _ => {}
        }
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, ApiError> {
        let service = self.cluster.services.get(key);
        let Some(service) = service.filter(|service| service.metadata.deletion_timestamp.is_none())
        else {
            self.clear(key, true).await?;
            self.owed.forget(key);
            return Ok(Outcome::Done);
        };
        if desired::pod_selector(&service).is_none() {
            self.clear(key, false).await?;
            return Ok(Outcome::Done);
        }
        let mut pods = self.cluster.pods.in_namespace(&key.namespace);
        pods.retain(|pod| desired::is_selected(&service, pod));
        let trigger = trigger_time(&service, &pods);
        self.write_slices(key, &service, &pods, trigger).await?;
        self.write_endpoints(key, &service, &pods, trigger).await?;
        Ok(Outcome::Done)
    }
}

fn service_of(slice: &EndpointSlice) -> Option<&String> {
    slice.metadata.labels.as_ref()?.get(SERVICE_LABEL)
}

/// The newest cause of a change: a pod that became ready or not, or else the Service itself.
fn trigger_time(service: &Service, pods: &[Arc<Pod>]) -> Option<Timestamp> {
    let changed = pods.iter().filter_map(|pod| {
        let ready = condition(pod, "Ready")?.last_transition_time.as_ref().map(|time| time.0);
        ready_since(pod).or(ready)
    });
    let created = service.metadata.creation_timestamp.as_ref().map(|time| time.0);
    changed.chain(created).max()
}

/// What of a pod shows in endpoints.
fn endpoint_facts(pod: &Pod) -> impl PartialEq + '_ {
    let status = pod.status.as_ref();
    (
        pod.metadata.labels.as_ref(),
        pod.metadata.deletion_timestamp.is_some(),
        status.and_then(|status| status.pod_ip.as_ref()),
        status.and_then(|status| status.pod_ips.as_ref()),
        super::pods::is_ready(pod),
        super::pods::has_ended(pod),
        pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()),
    )
}
