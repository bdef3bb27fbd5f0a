//! All Service semantics: which frontends a Service has, which endpoints they use and who is masqueraded.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::NodeFacts;
use super::endpoints::{self, Lists};
use super::plan::{
    At, Endpoint, Family, Frontend, FrontendKey, Masquerade, PortPlan, Protocol, Route, Scope,
    ServicePlan, Target,
};
use super::service::{PortFacts, ServiceFacts, SourceRanges};
use super::slice::{EndpointState, SliceFacts, endpoints_of};

/// Every frontend that the Service asks for, whether or not another Service has it already.
pub(crate) fn frontend_keys(service: &ServiceFacts) -> impl Iterator<Item = FrontendKey> {
    let guards = service.cluster_ips.iter().map(|address| guard_key(*address));
    guards.chain(service.ports.iter().flat_map(move |port| {
        let families = Family::BOTH.into_iter().filter(|f| service.cluster_ip(*f).is_some());
        families.flat_map(move |family| {
            asked_for(service, port, family).into_iter().map(|(key, _)| key)
        })
    }))
}

/// Stands for all ports of a ClusterIP that are no frontend.
fn guard_key(address: IpAddr) -> FrontendKey {
    FrontendKey { at: At::Address(address), protocol: Protocol::Tcp, port: 0 }
}

/// Which policy a frontend follows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    ClusterIp,
    ExternalIp,
    LoadBalancer,
    NodePort,
}

fn asked_for(service: &ServiceFacts, port: &PortFacts, family: Family) -> Vec<(FrontendKey, Kind)> {
    let at = |address: &IpAddr, kind| {
        let key =
            FrontendKey { at: At::Address(*address), protocol: port.protocol, port: port.port };
        (Family::of(*address) == family).then_some((key, kind))
    };
    let mut asked = Vec::new();
    // One address per family: a Service has no more.
    asked.extend(service.cluster_ip(family).and_then(|ip| at(&ip, Kind::ClusterIp)));
    // The first of equal keys counts: an address that is also in externalIPs keeps its source ranges.
    asked.extend(service.load_balancer_ips.iter().filter_map(|ip| at(ip, Kind::LoadBalancer)));
    asked.extend(service.external_ips.iter().filter_map(|ip| at(ip, Kind::ExternalIp)));
    asked.extend(port.node_port.map(|number| {
        let at = At::NodePort(family);
        (FrontendKey { at, protocol: port.protocol, port: number }, Kind::NodePort)
    }));
    asked
}

/// The plan of one Service. `owns` says whether a frontend belongs to it (two may ask for the same).
pub(crate) fn plan_service(
    service: &ServiceFacts,
    slices: &[SliceFacts],
    node: &NodeFacts,
    owns: impl Fn(&FrontendKey) -> bool,
) -> ServicePlan {
    let mut ports = Vec::new();
    let mut seen = HashSet::new();
    for port in &service.ports {
        for family in Family::BOTH {
            if service.cluster_ip(family).is_none() {
                continue;
            }
            let mine: Vec<(FrontendKey, Kind)> = asked_for(service, port, family)
                .into_iter()
                .filter(|(key, _)| owns(key) && seen.insert(*key))
                .collect();
            ports.push(plan_port(service, port, family, &mine, slices, node));
        }
    }
    let guarded = service.cluster_ips.iter().copied().filter(|address| owns(&guard_key(*address)));
    ServicePlan { ports: ports.into(), guarded: guarded.collect() }
}

fn plan_port(
    service: &ServiceFacts,
    port: &PortFacts,
    family: Family,
    mine: &[(FrontendKey, Kind)],
    slices: &[SliceFacts],
    node: &NodeFacts,
) -> PortPlan {
    let endpoints = endpoints_of(slices, family, &port.name, port.protocol);
    let endpoints::Chosen { cluster, local } = endpoints::choose(&endpoints, node.zone.as_deref());
    let lists = Lists { cluster: !cluster.is_empty(), local: !local.is_empty() };
    let frontends: Box<[Frontend]> = mine
        .iter()
        .map(|(key, kind)| Frontend {
            key: *key,
            route: route(*kind, service, lists, node),
            sources: allowed_sources(*kind, *key, service, node),
        })
        .collect();
    let used = |scope| frontends.iter().any(|frontend| forwards_to(frontend.route, scope));
    let (cluster, local) = (
        if used(Scope::Cluster) { cluster } else { Vec::new() },
        if used(Scope::Local) { local } else { Vec::new() },
    );
    PortPlan {
        name: port.name.clone(),
        protocol: port.protocol,
        family,
        affinity_secs: service.affinity_secs,
        draining: draining(port.protocol, &endpoints, &cluster),
        here: addresses(&endpoints, &[&cluster, &local], |state| state.local),
        strangers: addresses(&endpoints, &[&cluster], |state| state.stranger),
        cluster: cluster.into(),
        local: local.into(),
        frontends,
    }
}

fn draining(
    protocol: Protocol,
    endpoints: &[(Endpoint, EndpointState)],
    cluster: &[Endpoint],
) -> Box<[Endpoint]> {
    if protocol != Protocol::Udp {
        return Box::default();
    }
    let serving =
        endpoints.iter().filter(|(_, state)| state.ready || (state.serving && state.terminating));
    serving
        .map(|(endpoint, _)| *endpoint)
        .filter(|endpoint| cluster.binary_search(endpoint).is_err())
        .collect()
}

/// Addresses of those endpoints in `lists` that are such.
fn addresses(
    endpoints: &[(Endpoint, EndpointState)],
    lists: &[&[Endpoint]],
    is_such: impl Fn(&EndpointState) -> bool,
) -> Box<[IpAddr]> {
    let used = |endpoint: &Endpoint| lists.iter().any(|list| list.binary_search(endpoint).is_ok());
    let mut addresses: Vec<IpAddr> = endpoints
        .iter()
        .filter(|(endpoint, state)| is_such(state) && used(endpoint))
        .map(|(endpoint, _)| endpoint.address)
        .collect();
    addresses.dedup();
    addresses.into()
}

/// The table of destination and masquerade by source and policy.
fn route(kind: Kind, service: &ServiceFacts, lists: Lists, node: &NodeFacts) -> Route {
    let cluster = if lists.cluster { Target::Forward(Scope::Cluster) } else { Target::Reject };
    let local = match lists {
        Lists { local: true, .. } => Target::Forward(Scope::Local),
        Lists { cluster: true, .. } => Target::Drop,
        Lists { .. } => Target::Reject,
    };
    if kind == Kind::ClusterIp {
        let target = if service.internal_local { local } else { cluster };
        let masquerade = match node {
            NodeFacts { masquerade_all: true, .. } => Masquerade::Always,
            NodeFacts { knows_pods: true, .. } => Masquerade::UnlessPod,
            NodeFacts { .. } => Masquerade::Never,
        };
        return Route::Same { target, masquerade };
    }
    if !service.external_local {
        return Route::Same { target: cluster, masquerade: Masquerade::Always };
    }
    if !lists.cluster && !lists.local {
        return Route::Same { target: Target::Reject, masquerade: Masquerade::Never };
    }
    Route::BySource { inside: cluster, outside: local }
}

fn forwards_to(route: Route, scope: Scope) -> bool {
    let wanted = Target::Forward(scope);
    match route {
        Route::Same { target, .. } => target == wanted,
        Route::BySource { inside, outside } => inside == wanted || outside == wanted,
    }
}

/// Source ranges hold for load balancer addresses only, never for node ports.
fn allowed_sources(
    kind: Kind,
    key: FrontendKey,
    service: &ServiceFacts,
    node: &NodeFacts,
) -> Option<Box<[IpNetwork]>> {
    let At::Address(address) = key.at else { return None };
    if kind != Kind::LoadBalancer {
        return None;
    }
    let SourceRanges { readable, some_unreadable } = &service.source_ranges;
    let of_family = readable.iter().filter(|range| range.is_ipv4() == address.is_ipv4());
    let mut ranges: Vec<IpNetwork> = of_family.copied().collect();
    if ranges.is_empty() {
        // A filter was wanted. Without knowing which, everybody stays outside.
        return some_unreadable.then(Box::default);
    }
    if ranges.iter().any(|range| range.prefix() == 0) {
        return None;
    }
    // The node's own connections to the address may carry the address itself as their source.
    if node.addresses.iter().any(|own| ranges.iter().any(|range| range.contains(*own))) {
        ranges.push(IpNetwork::from(address));
    }
    ranges.sort_unstable();
    ranges.dedup();
    Some(ranges.into())
}
