//! From plans to virtual servers. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use keelson_netlink::ipvs::Key;

use crate::backend::BackendConfig;
use crate::model::{
    At, Endpoint, Family, Frontend, PortPlan, Protocol, Route, Scope, ServiceKey, ServicePlan,
    Target,
};

/// What a virtual server shall lead to: one list of endpoints of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    plan: Arc<ServicePlan>,
    port: usize,
    scope: Scope,
}

impl Wanted {
    fn port(&self) -> &PortPlan {
        &self.plan.ports[self.port]
    }

    pub(crate) fn reals(&self) -> impl Iterator<Item = SocketAddr> {
        self.port().pool(self.scope).iter().map(socket_address)
    }

    /// Whether an endpoint that gets nothing new keeps its connections. A UDP client would stay with it for ever, so
    /// there only those that still serve do.
    pub(crate) fn lets_drain(&self, at: SocketAddr) -> bool {
        let port = self.port();
        let serving = || [&port.cluster, &port.local, &port.draining].into_iter().flatten();
        port.protocol != Protocol::Udp || serving().any(|endpoint| socket_address(endpoint) == at)
    }
}

fn socket_address(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.address, endpoint.port)
}

/// Why a Service asks for a virtual server; a smaller one wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// For an address of its own.
    Address,
    /// For a node port, on an address of the node.
    NodePort,
}

#[derive(Clone, Debug)]
struct Claim {
    rank: Rank,
    service: ServiceKey,
    wanted: Wanted,
}

/// All virtual servers that plans ask for.
#[derive(Debug, Default)]
pub(crate) struct Servers {
    claims: BTreeMap<Key, Vec<Claim>>,
}

impl Servers {
    /// What is wanted of a virtual server; nothing when nobody asks for it.
    pub(crate) fn wanted(&self, key: Key) -> Option<&Wanted> {
        self.claims.get(&key)?.first().map(|claim| &claim.wanted)
    }

    /// Who asks for it.
    pub(crate) fn owner(&self, key: Key) -> Option<&ServiceKey> {
        self.claims.get(&key)?.first().map(|claim| &claim.service)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = Key> {
        self.claims.keys().copied()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    /// The next `count` virtual servers after that one, in a circle.
    pub(crate) fn after(&self, last: Option<Key>, count: usize) -> Vec<Key> {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let Some(last) = last else { return self.keys().take(count).collect() };
        let rest = self.claims.range((Excluded(last), Unbounded));
        let begin = self.claims.range((Unbounded, Included(last)));
        rest.chain(begin).map(|(key, _)| *key).take(count).collect()
    }

    /// Adds what a plan asks for.
    pub(crate) fn insert(
        &mut self,
        service: &ServiceKey,
        plan: &Arc<ServicePlan>,
        ground: &Ground,
    ) {
        for (key, rank, port, scope) in asked_for(plan, ground) {
            let wanted = Wanted { plan: Arc::clone(plan), port, scope };
            let claims = self.claims.entry(key).or_default();
            claims.push(Claim { rank, service: service.clone(), wanted });
            claims.sort_by(|a, b| (a.rank, &a.service).cmp(&(b.rank, &b.service)));
        }
    }

    /// Takes out what the plan asked for.
    pub(crate) fn remove(&mut self, service: &ServiceKey, plan: &ServicePlan, ground: &Ground) {
        for (key, ..) in asked_for(plan, ground) {
            let Some(claims) = self.claims.get_mut(&key) else { continue };
            claims.retain(|claim| claim.service != *service);
            if claims.is_empty() {
                self.claims.remove(&key);
            }
        }
    }
}

/// What the node adds to the plans.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ground {
    /// The addresses that serve node ports.
    pub(crate) node_ports: Vec<IpAddr>,
}

impl Ground {
    /// Of all addresses of the node those that the configuration wants.
    pub(crate) fn new(config: &BackendConfig, own: impl IntoIterator<Item = IpAddr>) -> Self {
        let serves = |address: &IpAddr| {
            // An address of a single link means nothing without that link.
            let alone = match address {
                IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_unspecified(),
                IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
            };
            alone && config.wants_node_ports_on(*address)
        };
        let mut node_ports: Vec<IpAddr> = own.into_iter().filter(serves).collect();
        node_ports.sort_unstable();
        node_ports.dedup();
        Ground { node_ports }
    }
}

/// The keys that a plan asks for.
pub(crate) fn keys_of(plan: &ServicePlan, ground: &Ground) -> impl Iterator<Item = Key> {
    asked_for(plan, ground).into_iter().map(|(key, ..)| key)
}

/// The keys that a plan asks for, why, and which list of which of its ports they lead to.
fn asked_for(plan: &ServicePlan, ground: &Ground) -> Vec<(Key, Rank, usize, Scope)> {
    let mut asked = Vec::new();
    for (index, port) in plan.ports.iter().enumerate() {
        for frontend in &port.frontends {
            let Some(scope) = scope(frontend) else { continue };
            asked.extend(
                keys(frontend, ground).into_iter().map(|(key, rank)| (key, rank, index, scope)),
            );
        }
    }
    asked
}

/// The list that IPVS chooses from: pods and the node take the short cut of externalTrafficPolicy Local elsewhere.
fn scope(frontend: &Frontend) -> Option<Scope> {
    let (Route::Same { target, .. } | Route::BySource { outside: target, .. }) = frontend.route;
    match target {
        Target::Forward(scope) => Some(scope),
        Target::Reject | Target::Drop => None,
    }
}

fn keys(frontend: &Frontend, ground: &Ground) -> Vec<(Key, Rank)> {
    let (protocol, port) = (frontend.key.protocol as u8, frontend.key.port);
    let key = |address| Key { address, protocol, port };
    match frontend.key.at {
        At::Address(address) => vec![(key(address), Rank::Address)],
        At::NodePort(family) => {
            let own = ground.node_ports.iter().filter(|own| Family::of(**own) == family);
            own.map(|own| (key(*own), Rank::NodePort)).collect()
        }
    }
}
