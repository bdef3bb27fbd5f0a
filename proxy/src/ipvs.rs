//! The IPVS backend: a virtual server per address, port and protocol; a small nftables table for the rest.
//!
//! ```text
//! arriving packet                                                    the node's own packet
//!    │ prerouting                                                       │ output
//!    ▼                                                                  ▼
//! inet keelson-proxy-ipvs: find-service ─┬► reject-all, drop        the same table
//!    (first packet of a connection)      ├► 127.0.0.1, the short cut of externalTrafficPolicy Local,
//!    │                                   │  clients that are remembered ──► dnat
//!    │                                   └► ipvs, ipvs-hide: connection mark bit 13, packet mark bit 14 (masquerade)
//!    ▼                                                                  │
//! inet keelson-proxy-ipvs-flows: to-ipvs   bit 13 to the packet         │
//!    ▼                                                                  ▼
//! routing: bit 13 ─► local default ─► input ─► IPVS ─► real server ◄─ IPVS
//!                                        │        └► output, postrouting: bit 14 ─► masquerade
//!                                        └ after-ipvs: reset. No port of a Service's address reaches the node's programs
//! ```
//!
//! The table is the one of the nftables mode with other chains where IPVS chooses ([`Role::BesideIpvs`]). Virtual servers
//! are a function of the plans and the node's addresses ([`servers`]); what the kernel has beyond that is known by a mark
//! ([`steps::MARK`]), so that a restart finds what an earlier process left.
//!
//! An endpoint that goes gets weight 0 and is removed when its last connection has ended, and the virtual server
//! with the last of them. New connections are kept away by the table meanwhile.

mod alarm;
mod drain;
mod error;
mod leave;
mod observe;
mod routing;
pub(crate) mod servers;
mod settings;
mod steps;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use keelson_netlink::ipvs::{Command, Ipvs as Kernel, Key};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::Rtnl;

use crate::backend::{Applied, Backend, BackendConfig, BackendError, Difference, Figures};
use crate::diff::{Change, Plans};
use crate::model::{ServiceKey, ServicePlan};
use crate::nftables::{Nftables, Role};
use alarm::Alarm;
use routing::Gaps;
use servers::{Ground, Servers};
use steps::{Known, Steps, known_after};

pub use error::IpvsError;
pub(crate) use leave::{KUBE_PROXYS_LINK, remove_kube_proxys};
pub use settings::{IpvsConfig, SCHEDULERS};

/// How many virtual servers are compared at each look, and how many of those that drain are asked whether they are done:
/// some milliseconds of work a second, however many there are.
const LOOKED_AT: usize = 128;

/// The backend. Lives in the network namespace in which it was opened.
pub struct Ipvs {
    kernel: Kernel,
    rtnl: Rtnl,
    netns: Netns,
    table: Nftables,
    flows: Nftables,
    alarm: Alarm,
    config: BackendConfig,
    /// The scheduler in use: another one than configured where the kernel lacks that.
    scheduler: Option<String>,
    programmed: HashMap<ServiceKey, Arc<ServicePlan>>,
    ground: Ground,
    servers: Servers,
    draining: BTreeMap<Key, BTreeSet<SocketAddr>>,
    /// Where the last look ended, and where among those that drain.
    looked_at: Option<Key>,
    drained_at: Option<Key>,
    /// The kernel had something else than was thought.
    suspicious: bool,
    /// What the kernel refused since everything was compared: to look at it again and again is of no use.
    refused: BTreeSet<Key>,
}

impl Ipvs {
    /// Fails on a kernel without IPVS or nf_tables, or without the right to use them.
    pub fn probe() -> Result<(), IpvsError> {
        let mut kernel = Kernel::open().map_err(IpvsError::Open)?;
        let scheduler = IpvsConfig::default().scheduler;
        observe::try_scheduler(&mut kernel, &scheduler)?;
        Nftables::probe_as(Role::BesideIpvs)?;
        Ok(Nftables::probe_as(Role::IpvsFlows)?)
    }

    pub fn open(config: BackendConfig) -> Result<Self, IpvsError> {
        let kernel = Kernel::open().map_err(IpvsError::Open)?;
        let rtnl = Rtnl::open().map_err(IpvsError::Routing)?;
        let table = Nftables::open_as(Role::BesideIpvs, config.clone())?;
        let flows = Nftables::open_as(Role::IpvsFlows, config.clone())?;
        let alarm = Alarm::open(&[table.alarm(), flows.alarm()])?;
        Ok(Ipvs {
            kernel,
            rtnl,
            netns: Netns::current()?,
            table,
            flows,
            alarm,
            config,
            scheduler: None,
            programmed: HashMap::new(),
            ground: Ground::default(),
            servers: Servers::default(),
            draining: BTreeMap::new(),
            looked_at: None,
            drained_at: None,
            suspicious: false,
            refused: BTreeSet::new(),
        })
    }

    fn adopt_all(&mut self, plans: &Plans) -> Result<Applied, BackendError> {
        self.refused.clear();
        self.alarm.acknowledge()?;
        self.alarm.routing_changed()?;
        self.config.ipvs.apply(&self.netns);
        let timeouts = Command::SetTimeouts(self.config.ipvs.timeouts());
        self.kernel.perform(&[timeouts]).map_err(IpvsError::Apply)?;
        let gaps = self.gaps()?;
        gaps.close(&mut self.rtnl).map_err(IpvsError::Routing)?;
        self.ground = self.look_around()?;
        self.servers = servers_of(plans, &self.ground);
        self.programmed.clone_from(plans);
        self.draining.clear();
        let steps = self.steps()?;
        let flows = self.flows.adopt(&Plans::new())?;
        let keys = self.servers.keys().collect();
        let mut applied = self.take_steps(steps, keys, |backend| backend.table.adopt(plans))?;
        applied.operations += gaps.len() + flows.operations;
        self.suspicious = false;
        Ok(applied)
    }

    fn apply_changes(
        &mut self,
        changes: &[Change],
        plans: &Plans,
    ) -> Result<Applied, BackendError> {
        let scheduler = self.scheduler()?;
        let mut touched: BTreeMap<Key, Option<Known>> = BTreeMap::new();
        for change in changes {
            let before = self.programmed.remove(&change.service);
            for plan in before.iter().chain(&change.plan) {
                for key in servers::keys_of(plan, &self.ground) {
                    touched.entry(key).or_insert_with(|| {
                        known_after(self.servers.wanted(key), self.draining.get(&key), &scheduler)
                    });
                }
            }
            if let Some(before) = before {
                self.servers.remove(&change.service, &before, &self.ground);
            }
            if let Some(plan) = &change.plan {
                self.servers.insert(&change.service, plan, &self.ground);
                self.programmed.insert(change.service.clone(), Arc::clone(plan));
            }
        }
        let steps = self.steps_from(&touched, &scheduler);
        let keys = touched.into_keys().collect();
        self.take_steps(steps, keys, |backend| backend.table.apply(changes, plans))
    }

    fn steps_from(&mut self, known: &BTreeMap<Key, Option<Known>>, scheduler: &str) -> Steps {
        let mut steps = Steps::default();
        for (key, known) in known {
            self.draining.remove(key);
            steps.lead(*key, known.as_ref(), self.servers.wanted(*key), scheduler);
        }
        steps
    }

    /// New servers, then the table that leads to them, then what nobody is led to any more. When the kernel refuses
    /// something, each virtual server is looked at and mended alone.
    fn take_steps(
        &mut self,
        mut steps: Steps,
        keys: Vec<Key>,
        table: impl FnOnce(&mut Self) -> Result<Applied, BackendError>,
    ) -> Result<Applied, BackendError> {
        let operations = steps.operations();
        let first = self.kernel.perform(&steps.first);
        // What happens to the table is announced to all who listen, and too much at once would look like a loss.
        self.flows.pause()?;
        let applied = table(self);
        self.flows.resume()?;
        let mut applied = applied?;
        let done = first.and_then(|()| self.kernel.perform(&steps.last));
        applied.operations += operations;
        self.draining.append(&mut steps.draining);
        if let Err(error) = done {
            self.suspicious |= error.is_out_of_step();
            let error = crate::switch::with_sources(&error);
            tracing::warn!(%error, "Reading virtual servers again after a refused change");
            self.mend(&keys, &mut applied)?;
        }
        self.drain(keys.into_iter());
        self.alarm.set_clock(!self.servers.is_empty() || !self.draining.is_empty())?;
        Ok(applied)
    }

    /// Makes these virtual servers as they shall be, one by one.
    fn mend(&mut self, keys: &[Key], applied: &mut Applied) -> Result<(), IpvsError> {
        const ATTEMPTS: u32 = 3;
        for key in keys {
            let mut left = ATTEMPTS;
            loop {
                left -= 1;
                match self.mend_one(*key)? {
                    Ok(()) => break,
                    // Somebody else is at work, too.
                    Err(error) if error.is_out_of_step() && left > 0 => {}
                    Err(error) => {
                        self.refused.insert(*key);
                        let owner = self.servers.owner(*key).cloned();
                        let known = |service: &ServiceKey| {
                            applied.refused.iter().any(|(refused, _)| refused == service)
                        };
                        if let Some(owner) = owner.filter(|owner| !known(owner)) {
                            applied.refused.push((owner, IpvsError::Apply(error).into()));
                        }
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    fn mend_one(
        &mut self,
        key: Key,
    ) -> Result<Result<(), keelson_netlink::ipvs::IpvsError>, IpvsError> {
        let scheduler = self.scheduler()?;
        let known = self.observe(key)?;
        let mut steps = Steps::default();
        steps.lead(key, known.as_ref(), self.servers.wanted(key), &scheduler);
        let done =
            self.kernel.perform(&steps.first).and_then(|()| self.kernel.perform(&steps.last));
        self.draining.append(&mut steps.draining);
        Ok(done)
    }

    /// Takes over the node's addresses as they are now: node ports come and go with them.
    fn follow_addresses(&mut self) -> Result<(), BackendError> {
        let ground = self.look_around()?;
        if ground == self.ground {
            return Ok(());
        }
        let scheduler = self.scheduler()?;
        let servers = servers_of(&self.programmed, &ground);
        let keys: BTreeSet<Key> = self.servers.keys().chain(servers.keys()).collect();
        let known = keys.into_iter().map(|key| {
            let draining = self.draining.get(&key);
            (key, known_after(self.servers.wanted(key), draining, &scheduler))
        });
        let known: BTreeMap<Key, Option<Known>> = known.collect();
        (self.ground, self.servers) = (ground, servers);
        let steps = self.steps_from(&known, &scheduler);
        let keys = known.into_keys().collect();
        let applied = self.take_steps(steps, keys, |_| Ok(Applied::default()))?;
        let operations = applied.operations;
        tracing::debug!(operations, "The node's addresses changed");
        match applied.refused.into_iter().next() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    fn look_around(&mut self) -> Result<Ground, IpvsError> {
        let addresses = self.rtnl.addresses(None).map_err(IpvsError::Routing)?;
        let kube_proxys = self.rtnl.link(leave::KUBE_PROXYS_LINK).map_err(IpvsError::Routing)?;
        let kube_proxys = kube_proxys.map(|link| link.index);
        let own = addresses.into_iter().filter(|address| Some(address.link) != kube_proxys);
        Ok(Ground::new(&self.config, own.map(|address| -> IpAddr { address.network.ip() })))
    }

    fn gaps(&mut self) -> Result<Gaps, IpvsError> {
        Gaps::find(&mut self.rtnl, self.config.ipvs_mark()).map_err(IpvsError::Routing)
    }

    fn is_disturbed(&mut self) -> Result<bool, BackendError> {
        self.alarm.acknowledge()?;
        let mut disturbed = std::mem::take(&mut self.suspicious);
        // All are read, also when the first one says so already.
        disturbed |= self.table.disturbed()?;
        disturbed |= self.flows.disturbed()?;
        let routing_changed = self.alarm.routing_changed()?;
        // What cannot be read or mended here is left to a repair of everything, and that may be tried again.
        let looked = self.look_after(routing_changed).unwrap_or_else(|error| {
            let error = crate::switch::with_sources(&error);
            tracing::warn!(%error, "Cannot compare virtual servers");
            true
        });
        Ok(disturbed || looked)
    }

    /// What is done regularly; true when somebody changed something.
    fn look_after(&mut self, routing_changed: bool) -> Result<bool, BackendError> {
        if routing_changed {
            self.follow_addresses()?;
        }
        self.drain_some();
        Ok(self.gaps()?.len() > 0 || self.look()?)
    }
}

fn servers_of<'p>(
    plans: impl IntoIterator<Item = (&'p ServiceKey, &'p Arc<ServicePlan>)>,
    ground: &Ground,
) -> Servers {
    let mut servers = Servers::default();
    for (service, plan) in plans {
        servers.insert(service, plan, ground);
    }
    servers
}

impl Backend for Ipvs {
    fn adopt(&mut self, plans: &Plans) -> Result<Applied, BackendError> {
        self.adopt_all(plans)
    }

    fn apply(&mut self, changes: &[Change], plans: &Plans) -> Result<Applied, BackendError> {
        if self.alarm.routing_changed()? {
            self.follow_addresses()?;
        }
        self.apply_changes(changes, plans)
    }

    fn configure(&mut self, config: BackendConfig) -> bool {
        let changed = self.config != config;
        self.table.configure(config.clone());
        self.flows.configure(config.clone());
        self.scheduler = None;
        self.config = config;
        changed
    }

    fn verify(&mut self, plans: &Plans) -> Result<Vec<Difference>, BackendError> {
        self.differences(plans)
    }

    fn alarm(&self) -> BorrowedFd<'_> {
        self.alarm.fd()
    }

    fn disturbed(&mut self) -> Result<bool, BackendError> {
        self.is_disturbed()
    }

    fn take_figures(&mut self) -> Figures {
        self.table.take_figures()
    }

    fn cleanup(&mut self) -> Result<(), BackendError> {
        self.remove_everything()
    }
}
