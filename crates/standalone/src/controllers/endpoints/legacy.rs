//! The older `Endpoints` object of a Service: one per Service, one family, at most 1000 addresses.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use super::desired::{Port, address, families, is_headless, is_selected, ports, target_ref};
use super::slices::{HEADLESS_LABEL, TRIGGER_TIME};
use crate::controllers::pods::{has_ended, is_deleting, is_ready};

const MANAGED_BY_LABEL: &str = "endpoints.kubernetes.io/managed-by";
pub(crate) const MANAGED_BY: &str = "endpoint-controller";
/// Beyond this upstream cuts off too, and says so in an annotation.
const CAPACITY: usize = 1000;
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";

type Addresses = (Vec<EndpointAddress>, Vec<EndpointAddress>);

/// The object as it should be, or `None` when `held` is that already.
pub(crate) fn endpoints(
    service: &Service,
    pods: &[Arc<Pod>],
    held: Option<&Endpoints>,
    trigger: Option<Timestamp>,
) -> Option<Endpoints> {
    let (subsets, cut) = subsets(service, pods);
    let subsets = Some(subsets).filter(|subsets| !subsets.is_empty());
    let labels = labels(service);
    let mut new = held.cloned().unwrap_or_else(|| Endpoints {
        metadata: ObjectMeta {
            name: service.metadata.name.clone(),
            namespace: service.metadata.namespace.clone(),
            ..ObjectMeta::default()
        },
        subsets: None,
    });
    let annotations = new.metadata.annotations.get_or_insert_default();
    let was_cut = annotations.contains_key(OVER_CAPACITY);
    if held.is_some_and(|held| {
        held.subsets == subsets && held.metadata.labels.as_ref() == Some(&labels) && cut == was_cut
    }) {
        return None;
    }
    annotations.remove(OVER_CAPACITY);
    if cut {
        annotations.insert(OVER_CAPACITY.to_owned(), "truncated".to_owned());
    }
    annotations.remove(TRIGGER_TIME);
    if let Some(trigger) = trigger {
        annotations.insert(TRIGGER_TIME.to_owned(), trigger.to_string());
    }
    new.metadata.labels = Some(labels);
    new.subsets = subsets;
    Some(new)
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.remove(HEADLESS_LABEL);
    if is_headless(service) {
        labels.insert(HEADLESS_LABEL.to_owned(), String::new());
    }
    labels.insert(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned());
    labels
}

/// Addresses by port: pods that offer the same ports share a subset.
fn subsets(service: &Service, pods: &[Arc<Pod>]) -> (Vec<EndpointSubset>, bool) {
    let spec = service.spec.as_ref();
    let publish = spec.and_then(|spec| spec.publish_not_ready_addresses) == Some(true);
    let family = families(service).into_iter().next().unwrap_or_default();
    let mut by_ports: BTreeMap<Vec<Port>, Addresses> = BTreeMap::new();
    let mut count = 0;
    let mut cut = false;
    for pod in pods.iter().filter(|pod| is_selected(service, pod)) {
        if has_ended(pod) || (is_deleting(pod) && !publish) {
            continue;
        }
        let Some(ip) = address(pod, &family) else { continue };
        let ports = ports(service, pod);
        if ports.is_empty() && !is_headless(service) {
            continue;
        }
        if count == CAPACITY {
            cut = true;
            break;
        }
        count += 1;
        let (ready, not_ready) = by_ports.entry(ports).or_default();
        let list = if publish || is_ready(pod) { ready } else { not_ready };
        list.push(entry(service, pod, ip));
    }
    (by_ports.into_iter().map(|(ports, addresses)| subset(&ports, addresses)).collect(), cut)
}

fn entry(service: &Service, pod: &Pod, ip: &str) -> EndpointAddress {
    let spec = pod.spec.as_ref();
    let subdomain = spec.and_then(|spec| spec.subdomain.as_ref());
    let ours = subdomain.is_some() && subdomain == service.metadata.name.as_ref();
    EndpointAddress {
        ip: ip.to_owned(),
        hostname: spec.and_then(|spec| spec.hostname.clone()).filter(|_| ours),
        node_name: spec.and_then(|spec| spec.node_name.clone()),
        target_ref: Some(target_ref(pod)),
    }
}

fn subset(ports: &[Port], (mut ready, mut not_ready): Addresses) -> EndpointSubset {
    let some = |list: &mut Vec<EndpointAddress>| {
        list.sort_by(|one, other| one.ip.cmp(&other.ip));
        Some(std::mem::take(list)).filter(|list| !list.is_empty())
    };
    let ports: Vec<EndpointPort> = ports
        .iter()
        .map(|port| EndpointPort {
            name: Some(port.name.clone()).filter(|name| !name.is_empty()),
            port: port.number,
            protocol: Some(port.protocol.clone()),
            app_protocol: port.app_protocol.clone(),
        })
        .collect();
    EndpointSubset {
        addresses: some(&mut ready),
        not_ready_addresses: some(&mut not_ready),
        ports: Some(ports).filter(|ports| !ports.is_empty()),
    }
}
