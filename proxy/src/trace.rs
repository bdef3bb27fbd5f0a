//! Where a packet goes: the answer of the plans, computed without a kernel.
//!
//! This is what every backend must do with a real packet. `explain` shows it, and the behaviour suite
//! compares it with what the packet met.

use std::net::IpAddr;

use crate::backend::{BackendConfig, PodSources};
use crate::diff::Plans;
use crate::ebpf::is_direct;
use crate::model::{
    At, Endpoint, Family, Frontend, FrontendKey, Masquerade, PortPlan, Protocol, Route, ServiceKey,
    Target,
};

/// The first packet of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub source: IpAddr,
    /// The interface that it came in through; nothing when the node made it.
    pub interface: Option<String>,
    pub destination: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
}

/// What happens to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Services do not concern it.
    Untouched,
    /// The sender is told that nobody is there.
    Rejected,
    /// The sender is told nothing.
    Dropped,
    Forwarded {
        /// One of these is chosen.
        to: Box<[Endpoint]>,
        /// The source address is replaced by the node's. To the sender itself, and with direct server return to
        /// endpoints on no node, it is in any case.
        masqueraded: bool,
        /// The choice is remembered for so long.
        affinity_secs: Option<u32>,
    },
}

/// The fate and how it came about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    pub fate: Fate,
    /// The Service that decides.
    pub service: Option<ServiceKey>,
    /// The decisions on the way, in words.
    pub steps: Vec<String>,
}

/// What the node adds to the plans.
#[derive(Clone, Copy, Debug)]
pub struct Ground<'a> {
    pub config: &'a BackendConfig,
    /// All addresses of the node, loopback included.
    pub own: &'a [IpAddr],
}

/// Follows a packet through the plans.
#[must_use]
pub fn trace(plans: &Plans, ground: Ground<'_>, packet: &Packet) -> Trace {
    let mut walk = Walk { plans, ground, packet, steps: Vec::new() };
    let (fate, service) = walk.fate();
    Trace { fate, service, steps: walk.steps }
}

struct Walk<'a> {
    plans: &'a Plans,
    ground: Ground<'a>,
    packet: &'a Packet,
    steps: Vec<String>,
}

type Found<'a> = (&'a ServiceKey, &'a PortPlan, &'a Frontend);

impl<'a> Walk<'a> {
    fn fate(&mut self) -> (Fate, Option<ServiceKey>) {
        let destination = self.packet.destination;
        if let Some(found) = self.find(At::Address(destination)) {
            return self.follow(found);
        }
        if let Some(owner) = self.guardian() {
            self.note(format!("{destination} is the ClusterIP of {owner}, which has no such port"));
            return (Fate::Rejected, Some(owner));
        }
        if self.serves_node_ports(destination) {
            self.note(format!("{destination} is an address of this node that serves node ports"));
            if let Some(found) = self.find(At::NodePort(Family::of(destination))) {
                return self.follow(found);
            }
        }
        let ranges = &self.ground.config.service_ranges;
        if let Some(range) = ranges.iter().find(|range| range.contains(destination)) {
            self.note(format!(
                "{destination} is in the Service range {range}, and no Service has it"
            ));
            return (Fate::Dropped, None);
        }
        self.note(format!("no Service has {destination} port {}", self.packet.port));
        (Fate::Untouched, None)
    }

    fn note(&mut self, step: String) {
        self.steps.push(step);
    }

    fn find(&self, at: At) -> Option<Found<'a>> {
        let key = FrontendKey { at, protocol: self.packet.protocol, port: self.packet.port };
        self.plans.iter().find_map(|(service, plan)| {
            plan.ports.iter().find_map(|port| {
                let frontend = port.frontends.iter().find(|frontend| frontend.key == key)?;
                Some((service, port, frontend))
            })
        })
    }

    fn guardian(&self) -> Option<ServiceKey> {
        let destination = self.packet.destination;
        let guards = self.plans.iter().find(|(_, plan)| plan.guarded.contains(&destination));
        guards.map(|(service, _)| service.clone())
    }

    fn serves_node_ports(&self, address: IpAddr) -> bool {
        let config = self.ground.config;
        if !self.ground.own.contains(&address) {
            return false;
        }
        if address.is_loopback() {
            return config.localhost_node_ports && address.is_ipv4();
        }
        config.wants_node_ports_on(address)
    }

    fn is_pod(&self) -> bool {
        let interface = self.packet.interface.as_deref();
        match &self.ground.config.pods {
            PodSources::Unknown => false,
            PodSources::Ranges(ranges) => ranges.iter().any(|r| r.contains(self.packet.source)),
            PodSources::Bridge(name) => interface == Some(name),
            PodSources::InterfacePrefix(prefix) => {
                interface.is_some_and(|name| name.starts_with(prefix.as_str()))
            }
        }
    }

    fn follow(&mut self, (service, port, frontend): Found<'a>) -> (Fate, Option<ServiceKey>) {
        let owner = Some(service.clone());
        self.note(format!("{} belongs to {service}", frontend.key));
        let source = self.packet.source;
        if let Some(sources) = &frontend.sources
            && !sources.iter().any(|range| range.contains(source))
        {
            self.note(format!("{source} is in none of its loadBalancerSourceRanges"));
            return (Fate::Dropped, owner);
        }
        let (target, masqueraded) = self.route(frontend.route);
        let masqueraded = masqueraded && !self.is_answered_directly(port, frontend);
        let fate = match target {
            Target::Reject => {
                self.note("it has no endpoint".to_owned());
                Fate::Rejected
            }
            Target::Drop => {
                self.note("its traffic policy is Local and no endpoint is here".to_owned());
                Fate::Dropped
            }
            Target::Forward(scope) => Fate::Forwarded {
                to: port.pool(scope).into(),
                masqueraded,
                affinity_secs: port.affinity_secs,
            },
        };
        (fate, owner)
    }

    /// Whether endpoints answer a client outside by themselves.
    fn is_answered_directly(&mut self, port: &PortPlan, frontend: &Frontend) -> bool {
        let source = self.packet.source;
        let on_nodes = port.cluster.iter().any(|e| !port.strangers.contains(&e.address));
        let is_direct =
            matches!(frontend.route, Route::Same { masquerade: Masquerade::Always, .. })
                && is_direct(self.ground.config, port.protocol)
                && !(self.is_pod() || self.ground.own.contains(&source))
                && self.guardian().is_none();
        if !is_direct || !on_nodes {
            return false;
        }
        self.note(format!(
            "direct server return: {source} is from outside, and the endpoint's node answers it"
        ));
        if !port.strangers.is_empty() {
            self.note("endpoints that are on no node see this node's address instead".to_owned());
        }
        true
    }

    fn route(&mut self, route: Route) -> (Target, bool) {
        let source = self.packet.source;
        match route {
            Route::Same { target, masquerade: Masquerade::Never } => (target, false),
            Route::Same { target, masquerade: Masquerade::Always } => (target, true),
            Route::Same { target, masquerade: Masquerade::UnlessPod } => {
                let is_pod = self.is_pod();
                let what = if is_pod { "is a pod's" } else { "is not a pod's" };
                self.note(format!("the source {source} {what}"));
                (target, !is_pod)
            }
            Route::BySource { inside, outside } => {
                if self.is_pod() {
                    self.note(format!(
                        "externalTrafficPolicy Local: {source} is a pod's, short cut"
                    ));
                    (inside, false)
                } else if self.ground.own.contains(&source) {
                    self.note(format!(
                        "externalTrafficPolicy Local: {source} is our own, short cut"
                    ));
                    (inside, true)
                } else {
                    self.note(format!("externalTrafficPolicy Local: {source} is from outside"));
                    (outside, false)
                }
            }
        }
    }
}
