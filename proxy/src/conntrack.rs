//! Removes connection tracking entries of UDP flows that lead nowhere any more.
//!
//! A UDP client that keeps its source port keeps its translation, too: when the endpoint is gone its
//! packets vanish until it stops sending for a while. And a flow that began while there was no endpoint
//! is never translated at all. Exactly those two kinds of entries are removed; TCP is left to itself,
//! and endpoints that terminate keep their flows as long as they serve.

mod limits;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::{Receiver, Sender, channel};

use keelson_netlink::conntrack::{Conntrack, ConntrackError, Flow};
use prometheus_client::metrics::counter::Counter;

use crate::diff::{Change, Plans};
use crate::model::{
    At, Endpoint, Family, FrontendKey, PortPlan, Protocol, Route, ServicePlan, Target,
};

pub use limits::ConntrackLimits;

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
        // One that another Service took over in the same round is not gone.
        for key in removed {
            let gone = Check { suspect: true, ..Check::default() };
            checks.frontends.entry(key).or_insert(gone);
        }
        checks
    }

    /// True when no flow can be stale.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.frontends.values().any(|check| check.suspect)
    }

    fn merge(&mut self, later: Checks) {
        for (key, check) in later.frontends {
            let suspect = check.suspect || self.frontends.get(&key).is_some_and(|old| old.suspect);
            self.frontends.insert(key, Check { suspect, ..check });
        }
    }

    fn is_stale(&self, flow: &Flow, own_addresses: &[IpAddr]) -> bool {
        let Some(check) = self.find(flow.destination, own_addresses) else { return false };
        if !check.suspect {
            return false;
        }
        if flow.answerer == flow.destination {
            return check.forwards;
        }
        let endpoint = Endpoint::new(flow.answerer.ip(), flow.answerer.port());
        check.endpoints.binary_search(&endpoint).is_err()
    }

    /// A port of some other host that happens to be one of our node ports does not count.
    fn find(&self, destination: SocketAddr, own_addresses: &[IpAddr]) -> Option<&Check> {
        let (address, port) = (destination.ip(), destination.port());
        let key = |at| FrontendKey { at, protocol: Protocol::Udp, port };
        let found = self.frontends.get(&key(At::Address(address)));
        found.or_else(|| {
            let own = own_addresses.contains(&address);
            own.then(|| self.frontends.get(&key(At::NodePort(Family::of(address))))).flatten()
        })
    }
}

fn checks_of(plan: &ServicePlan) -> HashMap<FrontendKey, Check> {
    let udp = plan.ports.iter().filter(|port| port.protocol == Protocol::Udp);
    udp.flat_map(|port| {
        let endpoints = kept_endpoints(port);
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

/// Removes the stale flows; how many those were.
pub fn clean(checks: &Checks) -> Result<u64, ConntrackError> {
    if checks.is_empty() {
        return Ok(0);
    }
    let own_addresses = own_addresses();
    let mut conntrack = Conntrack::open()?;
    let stale =
        conntrack.select(Protocol::Udp as u8, |flow| checks.is_stale(flow, &own_addresses))?;
    let mut deleted = 0;
    for flow in stale {
        deleted += u64::from(conntrack.delete(&flow)?);
    }
    Ok(deleted)
}

fn own_addresses() -> Vec<IpAddr> {
    let interfaces = match nix::ifaddrs::getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            tracing::warn!(%error, "Cannot list the node's addresses, leaving node port flows alone");
            return Vec::new();
        }
    };
    let addresses = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    addresses.collect()
}

/// Walks the connection table on a thread of its own, since it may hold millions of entries and rules
/// must not wait for it.
pub(crate) struct Cleaner {
    jobs: Sender<Checks>,
}

impl Cleaner {
    /// Works in the network namespace of the calling thread, until dropped.
    pub(crate) fn start(deleted: Counter) -> std::io::Result<Self> {
        let (jobs, inbox) = channel();
        std::thread::Builder::new()
            .name("proxy-conntrack".to_owned())
            .spawn(move || work(&inbox, &deleted))?;
        Ok(Cleaner { jobs })
    }

    pub(crate) fn check(&self, checks: Checks) {
        if !checks.frontends.is_empty() && self.jobs.send(checks).is_err() {
            tracing::error!("The connection tracking thread is gone, stale UDP flows stay");
        }
    }
}

fn work(inbox: &Receiver<Checks>, deleted: &Counter) {
    while let Ok(mut checks) = inbox.recv() {
        while let Ok(later) = inbox.try_recv() {
            checks.merge(later);
        }
        match clean(&checks) {
            Ok(count) => {
                deleted.inc_by(count);
            }
            Err(error) => tracing::warn!(%error, "Cannot remove stale UDP flows"),
        }
    }
}
