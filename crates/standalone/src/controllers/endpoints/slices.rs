//! From wanted endpoints and existing slices to writes, touching as few slices as possible.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use super::desired::{ByPorts, Port, is_headless};
use crate::controllers::ownership::controller_reference;

/// Who is named as keeper of the slices; the same as upstream, so that consumers treat them alike.
pub(crate) const MANAGED_BY: &str = "endpointslice-controller.k8s.io";
pub(crate) const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
pub(crate) const SERVICE_LABEL: &str = "kubernetes.io/service-name";
pub(crate) const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
pub(crate) const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Upstream's default for `--max-endpoints-per-slice`.
const PER_SLICE: usize = 100;

/// What to write.
#[derive(Debug, Default)]
pub(crate) struct Writes {
    pub(crate) create: Vec<EndpointSlice>,
    pub(crate) update: Vec<EndpointSlice>,
    pub(crate) delete: Vec<Arc<EndpointSlice>>,
}

/// Compares. `existing` are the slices of this Service that are ours, of all families; `wanted` is by family.
pub(crate) fn compare(
    service: &Service,
    wanted: BTreeMap<String, ByPorts>,
    existing: &[Arc<EndpointSlice>],
    trigger: Option<Timestamp>,
) -> Writes {
    let mut writes = Writes::default();
    let frame = Frame { service, labels: labels(service), trigger };
    for slice in existing.iter().filter(|slice| !wanted.contains_key(&slice.address_type)) {
        writes.delete.push(slice.clone());
    }
    for (family, mut by_ports) in wanted {
        if by_ports.is_empty() {
            // One empty slice says that somebody looked and found nothing.
            by_ports.insert(Vec::new(), Vec::new());
        }
        let mut held: BTreeMap<Vec<Port>, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
        for slice in existing.iter().filter(|slice| slice.address_type == family) {
            held.entry(ports_of(slice)).or_default().push(slice.clone());
        }
        for (ports, endpoints) in by_ports {
            let slices = held.remove(&ports).unwrap_or_default();
            frame.pack(&family, &ports, endpoints, &slices, &mut writes);
        }
        writes.delete.extend(held.into_values().flatten());
    }
    frame.reuse(&mut writes);
    writes
}

/// The labels of a Service's slices: its own, and those that say whose they are.
pub(crate) fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.remove(HEADLESS_LABEL);
    if is_headless(service) {
        labels.insert(HEADLESS_LABEL.to_owned(), String::new());
    }
    let name = service.metadata.name.clone().unwrap_or_default();
    labels.insert(SERVICE_LABEL.to_owned(), name);
    labels.insert(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned());
    labels
}

fn ports_of(slice: &EndpointSlice) -> Vec<Port> {
    let read = |port: &EndpointPort| Port {
        name: port.name.clone().unwrap_or_default(),
        protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
        number: port.port.unwrap_or(0),
        app_protocol: port.app_protocol.clone(),
    };
    let mut ports: Vec<Port> = slice.ports.iter().flatten().map(read).collect();
    ports.sort();
    ports
}

/// What all slices of a Service share.
struct Frame<'a> {
    service: &'a Service,
    labels: BTreeMap<String, String>,
    trigger: Option<Timestamp>,
}

impl Frame<'_> {
    /// Places the endpoints of one port set: each stays in its slice, new ones fill what room there is.
    fn pack(
        &self,
        family: &str,
        ports: &[Port],
        endpoints: Vec<Endpoint>,
        slices: &[Arc<EndpointSlice>],
        writes: &mut Writes,
    ) {
        let mut wanted: HashMap<String, Endpoint> =
            endpoints.into_iter().map(|endpoint| (identity(&endpoint), endpoint)).collect();
        let mut kept: Vec<(Arc<EndpointSlice>, Vec<Endpoint>)> = Vec::new();
        for slice in slices {
            let stay = slice.endpoints.iter().flatten();
            let stay = stay.filter_map(|held| wanted.remove(&identity(held))).collect();
            kept.push((slice.clone(), stay));
        }
        let mut new: Vec<Endpoint> = wanted.into_values().collect();
        new.sort_by(|one, other| other.addresses.cmp(&one.addresses));
        // Slices that change anyway are filled first, then others that have room.
        kept.sort_by_key(|(slice, stay)| slice.endpoints.as_ref() == Some(stay));
        for (_, stay) in &mut kept {
            while stay.len() < PER_SLICE
                && let Some(endpoint) = new.pop()
            {
                stay.push(endpoint);
            }
        }
        let empty_set = kept.iter().all(|(_, stay)| stay.is_empty()) && new.is_empty();
        let mut placeholder = empty_set && ports.is_empty();
        if placeholder && kept.is_empty() {
            writes.create.push(self.slice(family, ports, Vec::new()));
        }
        for (slice, stay) in kept {
            if stay.is_empty() && !std::mem::take(&mut placeholder) {
                writes.delete.push(slice);
            } else if let Some(changed) = self.changed(&slice, stay) {
                writes.update.push(changed);
            }
        }
        new.reverse();
        for chunk in new.chunks(PER_SLICE) {
            writes.create.push(self.slice(family, ports, chunk.to_vec()));
        }
    }

    /// A slice to be deleted is rewritten where one of the same family is to be made: one write less, and consumers
    /// never see a moment with neither.
    fn reuse(&self, writes: &mut Writes) {
        let mut create = Vec::new();
        for new in writes.create.drain(..) {
            let old = writes.delete.iter().position(|old| {
                old.address_type == new.address_type && old.metadata.deletion_timestamp.is_none()
            });
            let Some(old) = old.map(|at| writes.delete.remove(at)) else {
                create.push(new);
                continue;
            };
            let mut slice = EndpointSlice::clone(&old);
            slice.ports = new.ports;
            slice.endpoints = new.endpoints;
            self.stamp(&mut slice.metadata);
            writes.update.push(slice);
        }
        writes.create = create;
    }

    fn slice(&self, family: &str, ports: &[Port], endpoints: Vec<Endpoint>) -> EndpointSlice {
        let name = self.service.metadata.name.as_deref().unwrap_or_default();
        let mut metadata = ObjectMeta {
            generate_name: Some(format!("{name}-")),
            namespace: self.service.metadata.namespace.clone(),
            labels: Some(self.labels.clone()),
            owner_references: Some(vec![controller_reference::<Service>(&self.service.metadata)]),
            ..ObjectMeta::default()
        };
        self.stamp(&mut metadata);
        EndpointSlice {
            metadata,
            address_type: family.to_owned(),
            endpoints: Some(endpoints),
            ports: Some(ports.iter().map(Port::to_slice_port).collect()),
        }
    }

    /// The slice with these endpoints, if that is any different.
    fn changed(&self, slice: &EndpointSlice, endpoints: Vec<Endpoint>) -> Option<EndpointSlice> {
        let same = slice.endpoints.as_deref().unwrap_or_default() == endpoints
            && slice.metadata.labels.as_ref() == Some(&self.labels);
        if same {
            return None;
        }
        let mut slice = slice.clone();
        slice.endpoints = Some(endpoints);
        slice.metadata.labels = Some(self.labels.clone());
        self.stamp(&mut slice.metadata);
        Some(slice)
    }

    /// Since when the change behind this write has been true: what programming latencies are measured from.
    fn stamp(&self, meta: &mut ObjectMeta) {
        let annotations = meta.annotations.get_or_insert_default();
        match self.trigger {
            Some(trigger) => {
                annotations.insert(TRIGGER_TIME.to_owned(), trigger.to_string());
            }
            None => {
                annotations.remove(TRIGGER_TIME);
            }
        }
    }
}

/// What makes two endpoints the same one: the pod, else the address.
fn identity(endpoint: &Endpoint) -> String {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref());
    format!("{}|{}", uid.unwrap_or_default(), endpoint.addresses.join(","))
}
