//! From EndpointSlices to the endpoints of a Service port.

use std::net::IpAddr;

use super::objects::{Endpoint as EndpointObject, EndpointSlice};
use super::plan::{Endpoint, Family, Protocol, ServiceKey};
use super::service::parse_address;

const SERVICE_LABEL: &str = "kubernetes.io/service-name";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// What the model keeps of one slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SliceFacts {
    pub(crate) name: Box<str>,
    pub(crate) family: Family,
    ports: Box<[SlicePort]>,
    endpoints: Box<[SliceEndpoint]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct SlicePort {
    name: Box<str>,
    protocol: Protocol,
    port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SliceEndpoint {
    address: IpAddr,
    state: EndpointState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndpointState {
    pub(crate) ready: bool,
    pub(crate) serving: bool,
    pub(crate) terminating: bool,
    pub(crate) local: bool,
}

impl EndpointState {
    /// Of two entries for the same address and port: which one is more alive.
    fn rank(self) -> (bool, bool, bool) {
        (!self.terminating, self.ready, self.serving)
    }
}

/// The Service that a slice belongs to, from its label.
pub(crate) fn owner(slice: &EndpointSlice) -> Option<ServiceKey> {
    let labels = slice.metadata.labels.as_ref()?;
    if labels.contains_key(HEADLESS_LABEL) {
        return None;
    }
    let service = labels.get(SERVICE_LABEL).filter(|name| !name.is_empty())?;
    Some(ServiceKey::new(slice.metadata.namespace.as_deref().unwrap_or(""), service))
}

/// The facts, or nothing for an address type that is not an IP family; and what was wrong.
pub(crate) fn read_slice(
    slice: &EndpointSlice,
    node_name: &str,
) -> (Option<SliceFacts>, Vec<String>) {
    let mut problems = Vec::new();
    let family = match slice.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        _ => return (None, problems),
    };
    let endpoints = slice.endpoints.iter().flatten().enumerate().filter_map(|(index, endpoint)| {
        match read_endpoint(endpoint, family, node_name) {
            Ok(endpoint) => Some(endpoint),
            Err(problem) => {
                problems.push(format!("endpoints[{index}].addresses: {problem}"));
                None
            }
        }
    });
    let facts = SliceFacts {
        name: slice.metadata.name.clone().unwrap_or_default().into_boxed_str(),
        family,
        endpoints: endpoints.collect(),
        ports: slice
            .ports
            .iter()
            .flatten()
            .filter_map(|port| {
                Some(SlicePort {
                    name: port.name.clone().unwrap_or_default().into_boxed_str(),
                    protocol: Protocol::parse(port.protocol.as_deref())?,
                    // No port does not mean any port.
                    port: u16::try_from(port.port?).ok().filter(|port| *port > 0)?,
                })
            })
            .collect(),
    };
    (Some(facts), problems)
}

/// Only the first address counts: the others are for fail-over by other consumers.
fn read_endpoint(
    endpoint: &EndpointObject,
    family: Family,
    node_name: &str,
) -> Result<SliceEndpoint, String> {
    let text = endpoint.addresses.first().ok_or("the list is empty")?;
    let address = parse_address(text).ok_or_else(|| format!("{text:?} is not an IP address"))?;
    if Family::of(address) != family {
        return Err(format!("{text} is not of the slice's address type"));
    }
    let conditions = endpoint.conditions.clone().unwrap_or_default();

    let state = EndpointState {
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        local: endpoint.node_name.as_deref() == Some(node_name),
    };
    Ok(SliceEndpoint { address, state })
}

/// Collects a Service port's endpoints from all slices: sorted, each once.
pub(crate) fn endpoints_of(
    slices: &[SliceFacts],
    family: Family,
    port_name: &str,
    protocol: Protocol,
) -> Vec<(Endpoint, EndpointState)> {
    let mut found = Vec::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        let ports =
            slice.ports.iter().filter(|port| port.protocol == protocol && *port.name == *port_name);
        for port in ports {
            found.extend(
                slice.endpoints.iter().map(|e| (Endpoint::new(e.address, port.port), e.state)),
            );
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.rank().cmp(&a.1.rank())));
    found.dedup_by_key(|(endpoint, _)| *endpoint);
    found
}
