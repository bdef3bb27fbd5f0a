//! From EndpointSlices to the endpoints of a Service port.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::objects::{Endpoint as EndpointObject, EndpointSlice, Named};
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

#[derive(Clone, Debug, PartialEq, Eq)]
struct SliceEndpoint {
    address: IpAddr,
    state: EndpointState,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EndpointState {
    pub(crate) ready: bool,
    pub(crate) serving: bool,
    pub(crate) terminating: bool,
    pub(crate) local: bool,
    /// On no node of the cluster.
    pub(crate) stranger: bool,
    pub(crate) node_hint: NodeHint,
    pub(crate) zone_hint: ZoneHint,
}

/// Whether an endpoint is meant for certain nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeHint {
    None,
    Mine,
    Others,
}

/// The zones that an endpoint is meant for, if any; one text for each list that occurs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ZoneHint(Option<Arc<str>>);

impl ZoneHint {
    pub(crate) fn is_given(&self) -> bool {
        self.0.is_some()
    }

    pub(crate) fn names(&self, zone: &str) -> bool {
        self.0.as_deref().is_some_and(|all| all.split('\n').any(|name| name == zone))
    }
}

/// What reading slices needs to know.
#[derive(Debug, Default)]
pub(crate) struct SliceReader {
    /// Every list of zones that was ever seen: there are few of them.
    zones: HashSet<Arc<str>>,
}

impl SliceReader {
    fn zone_hint(&mut self, names: &[Named]) -> ZoneHint {
        if names.is_empty() {
            return ZoneHint(None);
        }
        let text = names.iter().map(|zone| zone.name.as_str()).collect::<Vec<_>>().join("\n");
        if let Some(known) = self.zones.get(text.as_str()) {
            return ZoneHint(Some(Arc::clone(known)));
        }
        let new: Arc<str> = text.into();
        self.zones.insert(Arc::clone(&new));
        ZoneHint(Some(new))
    }
}

impl EndpointState {
    /// Of two entries for the same address and port: which one is more alive.
    fn rank(&self) -> (bool, bool, bool) {
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

impl SliceReader {
    /// The facts, or nothing for an address type that is not an IP family; and what was wrong.
    pub(crate) fn read(
        &mut self,
        slice: &EndpointSlice,
        node_name: &str,
    ) -> (Option<SliceFacts>, Vec<String>) {
        let mut problems = Vec::new();
        let family = match slice.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            _ => return (None, problems),
        };
        let endpoints =
            slice.endpoints.iter().flatten().enumerate().filter_map(|(index, endpoint)| match self
                .read_endpoint(endpoint, family, node_name)
            {
                Ok(endpoint) => Some(endpoint),
                Err(problem) => {
                    problems.push(format!("endpoints[{index}].addresses: {problem}"));
                    None
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
        &mut self,
        endpoint: &EndpointObject,
        family: Family,
        node_name: &str,
    ) -> Result<SliceEndpoint, String> {
        let text = endpoint.addresses.first().ok_or("the list is empty")?;
        let address =
            parse_address(text).ok_or_else(|| format!("{text:?} is not an IP address"))?;
        if Family::of(address) != family {
            return Err(format!("{text} is not of the slice's address type"));
        }
        let conditions = endpoint.conditions.clone().unwrap_or_default();
        let hints = endpoint.hints.as_ref();
        let zones = hints.and_then(|hints| hints.for_zones.as_deref()).unwrap_or_default();
        let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).unwrap_or_default();
        let state = EndpointState {
            ready: conditions.ready.unwrap_or(true),
            serving: conditions.serving.unwrap_or(true),
            terminating: conditions.terminating.unwrap_or(false),
            local: endpoint.node_name.as_deref() == Some(node_name),
            stranger: endpoint.node_name.is_none(),
            node_hint: match nodes {
                [] => NodeHint::None,
                _ if nodes.iter().any(|node| node.name == node_name) => NodeHint::Mine,
                _ => NodeHint::Others,
            },
            zone_hint: self.zone_hint(zones),
        };
        Ok(SliceEndpoint { address, state })
    }
}

/// How many addresses on this node are ready, whatever the port: what load balancers want to know.
pub(crate) fn ready_here(slices: &[SliceFacts], family: Family) -> usize {
    let of_family = slices.iter().filter(|slice| slice.family == family && !slice.ports.is_empty());
    let ready =
        of_family.flat_map(|slice| &slice.endpoints).filter(|e| e.state.ready && e.state.local);
    ready.map(|endpoint| endpoint.address).collect::<HashSet<_>>().len()
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
                slice
                    .endpoints
                    .iter()
                    .map(|e| (Endpoint::new(e.address, port.port), e.state.clone())),
            );
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.rank().cmp(&a.1.rank())));
    found.dedup_by_key(|(endpoint, _)| *endpoint);
    found
}
