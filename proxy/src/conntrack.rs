//! Removes connection tracking entries of flows that lead nowhere.
//!
//! A UDP client that keeps its source port keeps its translation, too: when the endpoint is gone its
//! packets vanish until it stops sending for a while. And a flow that began while there was no endpoint
//! is never translated at all, also a TCP connection that nobody has answered: its client would try in vain.
//! Exactly those kinds of entries are removed; other TCP connections are left to themselves, and endpoints
//! that terminate keep their flows as long as they serve.

mod cleaner;
mod limits;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use keelson_netlink::conntrack::{Conntrack, ConntrackError, Flow};

use crate::diff::{Change, Plans};
use crate::model::{
    At, Endpoint, Family, FrontendKey, PortPlan, Protocol, Route, ServicePlan, Target,
};

pub(crate) use cleaner::Cleaner;
pub use limits::ConntrackLimits;

const TCP: u8 = Protocol::Tcp as u8;
const UDP: u8 = Protocol::Udp as u8;

/// What to look for: frontends whose flows may be stale.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checks {
    frontends: HashMap<FrontendKey, Check>,
}

/// Which flows of a frontend are in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Check {
    /// Sorted.
    endpoints: Box<[Endpoint]>,
    /// The frontend forwards: a flow that is not translated is stale.
    forwards: bool,
    /// There may be stale flows. Others are here to bring older checks up to date.
    suspect: bool,
}

impl Checks {
    /// Everything, for the start: nobody knows what happened before.
    #[must_use]
    pub fn all(plans: &Plans) -> Self {
        let mut checks = Checks::default();
        for plan in plans.values() {
            let all = checks_of(plan).into_iter();
            checks
                .frontends
                .extend(all.map(|(key, check)| (key, Check { suspect: true, ..check })));
        }
        checks
    }

    /// The frontends that lost an endpoint or got their first one.
    #[must_use]
    pub fn after(changes: &[Change]) -> Self {
        let mut checks = Checks::default();
        let mut removed = Vec::new();
        for change in changes {
            let before: HashMap<_, _> = change.before.as_deref().map(checks_of).unwrap_or_default();
            let after: HashMap<_, _> = change.plan.as_deref().map(checks_of).unwrap_or_default();
            removed.extend(before.keys().filter(|key| !after.contains_key(key)).copied());
            checks.frontends.extend(after.into_iter().map(|(key, check)| {
                let old = before.get(&key).cloned().unwrap_or_default();
                let lost = old.endpoints.iter().any(|e| check.endpoints.binary_search(e).is_err());
                let suspect = lost || (check.forwards && !old.forwards);
                (key, Check { suspect, ..check })
            }));
        }
        checks.frontends.retain(|key, check| check.suspect || key.protocol == Protocol::Udp);
        // One that another Service took over in the same round is not gone.
        for key in removed.into_iter().filter(|key| key.protocol == Protocol::Udp) {
            let gone = Check { suspect: true, ..Check::default() };
            checks.frontends.entry(key).or_insert(gone);
        }
        checks
    }

    /// True when some flow of a family may be stale.
    fn suspects(&self, family: Family) -> bool {
        self.frontends.iter().any(|(key, check)| check.suspect && key.at.family() == family)
    }

    fn merge(&mut self, later: Checks) {
        for (key, check) in later.frontends {
            let suspect = check.suspect || self.frontends.get(&key).is_some_and(|old| old.suspect);
            self.frontends.insert(key, Check { suspect, ..check });
        }
    }

    fn is_stale(&self, flow: &Flow, own_addresses: &[IpAddr]) -> bool {
        let protocol = match flow.protocol {
            UDP => Protocol::Udp,
            TCP if !flow.answered && flow.answerer == flow.destination => Protocol::Tcp,
            _ => return false,
        };
        let found = self.find(protocol, flow.destination, own_addresses);
        let Some(check) = found.filter(|check| check.suspect) else { return false };
        if flow.answerer == flow.destination {
            return check.forwards;
        }
        let endpoint = Endpoint::new(flow.answerer.ip(), flow.answerer.port());
        check.endpoints.binary_search(&endpoint).is_err()
    }

    /// A port of some other host that happens to be one of our node ports does not count.
    fn find(
        &self,
        protocol: Protocol,
        destination: SocketAddr,
        own_addresses: &[IpAddr],
    ) -> Option<&Check> {
        let (address, port) = (destination.ip(), destination.port());
        let key = |at| FrontendKey { at, protocol, port };
        let found = self.frontends.get(&key(At::Address(address)));
        found.or_else(|| {
            let own = own_addresses.contains(&address);
            own.then(|| self.frontends.get(&key(At::NodePort(Family::of(address))))).flatten()
        })
    }
}

fn checks_of(plan: &ServicePlan) -> HashMap<FrontendKey, Check> {
    let ports = plan.ports.iter().filter(|port| port.protocol != Protocol::Sctp);
    ports
        .flat_map(|port| {
            // Of TCP only what began before there was an endpoint matters.
            let endpoints = match port.protocol {
                Protocol::Udp => kept_endpoints(port),
                Protocol::Tcp | Protocol::Sctp => Box::default(),
            };
            port.frontends.iter().map(move |frontend| {
                let forwards = forwards(frontend.route);
                (frontend.key, Check { endpoints: endpoints.clone(), forwards, suspect: false })
            })
        })
        .collect()
}

fn kept_endpoints(port: &PortPlan) -> Box<[Endpoint]> {
    let mut all: Vec<Endpoint> =
        [&port.cluster, &port.local, &port.draining].into_iter().flatten().copied().collect();
    all.sort_unstable();
    all.dedup();
    all.into()
}

fn forwards(route: Route) -> bool {
    let forwards = |target| matches!(target, Target::Forward(_));
    match route {
        Route::Same { target, .. } => forwards(target),
        Route::BySource { inside, outside } => forwards(inside) || forwards(outside),
    }
}

/// What a walk through the connection table did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cleaned {
    deleted: u64,
    /// False when the kernel cut the walk short: there may be more.
    whole: bool,
}

/// Removes the stale flows; how many those were.
pub fn clean(checks: &Checks) -> Result<u64, ConntrackError> {
    let families = Family::BOTH.into_iter().filter(|family| checks.suspects(*family));
    families.map(|family| Ok(clean_family(checks, family)?.deleted)).sum()
}

fn clean_family(checks: &Checks, family: Family) -> Result<Cleaned, ConntrackError> {
    let own_addresses = own_addresses();
    let mut conntrack = Conntrack::open()?;
    let number = if family == Family::V4 { libc::AF_INET } else { libc::AF_INET6 };
    let number = u8::try_from(number).unwrap_or_default();
    let stale = |flow: &Flow| checks.is_stale(flow, &own_addresses);
    let found = conntrack.select(number, stale)?;
    let mut deleted = 0;
    for flow in &found.flows {
        deleted += u64::from(conntrack.delete(flow)?);
    }
    Ok(Cleaned { deleted, whole: found.whole })
}

fn own_addresses() -> Vec<IpAddr> {
    crate::addresses::own().unwrap_or_else(|error| {
        tracing::warn!(%error, "Cannot list the node's addresses, leaving node port flows alone");
        Vec::new()
    })
}
