//! Which endpoints a Service port uses on this node, and why not the others.

use super::NodeFacts;
use super::plan::{Endpoint, Family, Protocol};
use super::service::ServiceFacts;
use super::slice::{EndpointState, NodeHint, SliceFacts, endpoints_of};

/// The two lists of endpoints of a Service port.
pub(crate) struct Chosen {
    pub(crate) cluster: Vec<Endpoint>,
    pub(crate) local: Vec<Endpoint>,
}

/// Which of the two have something in them.
#[derive(Clone, Copy)]
pub(crate) struct Lists {
    pub(crate) cluster: bool,
    pub(crate) local: bool,
}

/// How the hints are followed: only if every ready endpoint has one, and one is for this node or zone.
/// Anything else could leave a part of the cluster without endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology<'z> {
    Ignored,
    Node,
    Zone(&'z str),
}

impl Topology<'_> {
    fn allows(self, state: &EndpointState) -> bool {
        match self {
            Topology::Ignored => true,
            Topology::Node => state.node_hint == NodeHint::Mine,
            Topology::Zone(zone) => state.zone_hint.names(zone),
        }
    }
}

fn topology<'z>(endpoints: &[(Endpoint, EndpointState)], zone: Option<&'z str>) -> Topology<'z> {
    let ready = || endpoints.iter().map(|(_, state)| state).filter(|state| state.ready);
    let all_for_nodes = ready().all(|state| state.node_hint != NodeHint::None);
    if all_for_nodes && ready().any(|state| state.node_hint == NodeHint::Mine) {
        return Topology::Node;
    }
    let all_for_zones = ready().all(|state| state.zone_hint.is_given());
    match zone {
        Some(zone) if all_for_zones && ready().any(|state| state.zone_hint.names(zone)) => {
            Topology::Zone(zone)
        }
        _ => Topology::Ignored,
    }
}

pub(crate) fn choose(endpoints: &[(Endpoint, EndpointState)], zone: Option<&str>) -> Chosen {
    let topology = topology(endpoints, zone);
    Chosen {
        cluster: usable(endpoints, |state| topology.allows(state), |_| true),
        local: usable(endpoints, |state| state.local, |state| state.local),
    }
}

/// The ready ones; where there is none, those that terminate but still serve, wherever hints point.
fn usable(
    endpoints: &[(Endpoint, EndpointState)],
    ready_counts: impl Fn(&EndpointState) -> bool,
    going_counts: impl Fn(&EndpointState) -> bool,
) -> Vec<Endpoint> {
    let list = |wanted: &dyn Fn(&EndpointState) -> bool| {
        let chosen = endpoints.iter().filter(|(_, state)| wanted(state));
        chosen.map(|(endpoint, _)| *endpoint).collect::<Vec<_>>()
    };
    let ready = list(&|state| state.ready && ready_counts(state));
    if !ready.is_empty() {
        return ready;
    }
    list(&|state| state.serving && state.terminating && going_counts(state))
}

/// What became of an endpoint of a Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The port's name, empty when it has none.
    pub port: Box<str>,
    pub protocol: Protocol,
    pub endpoint: Endpoint,
    pub reason: Reason,
    /// It runs on this node: also part of the list for traffic policy Local if it is ready (or the
    /// only kind left).
    pub here: bool,
}

/// Why an endpoint is used, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    Ready,
    /// It terminates but serves, and no ready one is left.
    LastResort,
    /// It terminates, and there are ready ones.
    Terminating,
    NotReady,
    /// Hints keep it for other nodes.
    OtherNode,
    /// Hints keep it for other zones.
    OtherZone,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reason::Ready => "used: ready",
            Reason::LastResort => "used: it terminates but serves, and no ready endpoint is left",
            Reason::Terminating => "left out: it terminates, and others are ready",
            Reason::NotReady => "left out: not ready",
            Reason::OtherNode => "left out: its hints name other nodes",
            Reason::OtherZone => "left out: its hints name other zones",
        })
    }
}

pub(crate) fn explain(
    service: &ServiceFacts,
    slices: &[SliceFacts],
    node: &NodeFacts,
) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for port in &service.ports {
        let families = Family::BOTH.into_iter().filter(|f| service.cluster_ip(*f).is_some());
        for family in families {
            let endpoints = endpoints_of(slices, family, &port.name, port.protocol);
            let topology = topology(&endpoints, node.zone.as_deref());
            let chosen = choose(&endpoints, node.zone.as_deref());
            verdicts.extend(endpoints.iter().map(|(endpoint, state)| Verdict {
                port: port.name.clone(),
                protocol: port.protocol,
                endpoint: *endpoint,
                reason: reason(state, chosen.cluster.binary_search(endpoint).is_ok(), topology),
                here: state.local,
            }));
        }
    }
    verdicts
}

fn reason(state: &EndpointState, used: bool, topology: Topology<'_>) -> Reason {
    match (used, state.ready, topology) {
        (true, true, _) => Reason::Ready,
        (true, false, _) => Reason::LastResort,
        (false, true, Topology::Zone(_)) => Reason::OtherZone,
        (false, true, _) => Reason::OtherNode,
        (false, false, _) if state.serving && state.terminating => Reason::Terminating,
        (false, false, _) => Reason::NotReady,
    }
}
