//! The nftables backend: one table, shared maps, no rules per Service.
//!
//! ```text
//! prerouting, output ─► find-service ─ address.protocol.port ─► @services ─┬► forwarding chain
//!                          │                                               ├► reject-all, drop
//!                          └ own address ► find-node-port ─► @node-ports ──┤
//!                                                                          └► local-service
//!                    (externalTrafficPolicy Local: @service-inside for pods and the node,
//!                                                  @service-outside for everybody else)
//!
//! forwarding chain "service4-hide-of-3":   set the mark bit (hide = masquerade)
//!     address.protocol.port ─ @service-pools ─► pool ┐
//!                                 numgen mod 3 ─► slot ┴─ @endpoints4 ─► dnat to address.port
//!
//! postrouting ─ mark bit, or @hairpin ─► masquerade
//! ```
//!
//! A Service is nothing but elements of these maps. Forwarding chains differ by pool size, masquerade
//! and affinity only, so that a change never adds a rule (which costs the kernel a walk over all maps)
//! unless it brings a pool size that no Service had before.
//!
//! A client that sticks is remembered in `@affinity`: pool.client to place, with a timeout. An endpoint
//! keeps its place in the pool while it lives and takes it along when it goes, so that its clients find
//! nothing there and choose anew. Pool numbers are never used again while somebody may remember them: a
//! pool whose affinity changes gets a new number.
//!
//! The same machinery keeps the table beside IPVS ([`Role::BesideIpvs`]), where other chains forward.
//!
//! Invariant: the kernel's elements are a function of the plans, the pool numbers and the order of
//! slots; the latter two are read back from the kernel, so a restart changes nothing.

mod adopt;
mod commit;
mod error;
pub(crate) mod item;
pub(crate) mod layout;
mod ranges;
mod transaction;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use keelson_netlink::netns::Netns;
use keelson_netlink::nft::{Batch, Monitor, Nft};

use crate::backend::{Applied, Backend, BackendConfig, BackendError, Difference, Figures};
use crate::diff::{Change, Plans};
use crate::model::{PortPlan, Scope, ServiceKey, ServicePlan};
pub use error::NftablesError;
use error::is_out_of_step;
use item::{Item, Pool, Pools, guard_item, hairpin_item, items_of, wanted_pool};
pub(crate) use layout::Role;
use layout::{Chain, Setup};
use transaction::Operations;

/// A Service's change on its way into the kernel.
struct Pending {
    service: ServiceKey,
    before: Option<Programmed>,
    after: Option<Programmed>,
    operations: Operations,
}

/// What is in force for one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Programmed {
    plan: Arc<ServicePlan>,
    /// One entry for each port of the plan.
    pools: Box<[Pools]>,
}

/// The backend. Lives in the network namespace in which it was opened.
pub struct Nftables {
    nft: Nft,
    /// Where it was opened.
    netns: Netns,
    monitor: Monitor,
    setup: Setup,
    programmed: HashMap<ServiceKey, Programmed>,
    chains: HashSet<Chain>,
    /// How many pools have an endpoint with that address on this node.
    hairpin: HashMap<IpAddr, u32>,
    next_pool: u32,
    suspicious: bool,
    /// Reading the table again has not helped: look for the Service that is to blame.
    isolating: bool,
    figures: Figures,
}

impl Nftables {
    /// Fails on a kernel without nf_tables, or without the right to use it.
    pub fn probe() -> Result<(), NftablesError> {
        Nftables::probe_as(Role::Whole)
    }

    pub(crate) fn probe_as(role: Role) -> Result<(), NftablesError> {
        let mut nft = Nft::open().map_err(NftablesError::Open)?;
        nft.generation().map_err(NftablesError::Open)?;
        nft.commit(layout::trial(role)).map_err(NftablesError::Probe)
    }

    pub fn open(config: BackendConfig) -> Result<Self, NftablesError> {
        Nftables::open_as(Role::Whole, config)
    }

    pub(crate) fn open_as(role: Role, config: BackendConfig) -> Result<Self, NftablesError> {
        let mut nft = Nft::open().map_err(NftablesError::Open)?;
        // Fails on a kernel without nf_tables, before anything else is tried.
        nft.generation().map_err(NftablesError::Open)?;
        let monitor = Monitor::open().map_err(NftablesError::Watch)?;
        Ok(Nftables {
            nft,
            netns: Netns::current()?,
            monitor,
            setup: Setup { role, config },
            programmed: HashMap::new(),
            chains: HashSet::new(),
            hairpin: HashMap::new(),
            next_pool: 1,
            suspicious: false,
            isolating: false,
            figures: Figures::default(),
        })
    }

    /// Does not listen to announcements until [`Nftables::resume`].
    pub(crate) fn pause(&self) -> Result<(), NftablesError> {
        self.monitor.pause().map_err(NftablesError::Watch)
    }

    pub(crate) fn resume(&self) -> Result<(), NftablesError> {
        self.monitor.resume().map_err(NftablesError::Watch)
    }

    fn table(&self) -> keelson_netlink::nft::Table<'static> {
        self.setup.role.table()
    }

    /// Takes the packets away from the table. While a table goes that packets still come through, its maps
    /// are empty for some of them and its sets are not: they would be refused (seen on Linux 6.18), even if
    /// another mode serves them already.
    fn unhook(&mut self) -> Result<(), NftablesError> {
        let table = self.table();
        let chains = match self.nft.chains(table) {
            Err(error) if error.is_not_found() => return Ok(()),
            chains => chains.map_err(NftablesError::Observe)?,
        };
        let mut batch = Batch::new();
        for chain in &chains {
            if Chain::parse(&chain.name).is_some_and(|chain| chain.base().is_some()) {
                batch.delete_chain(table, &chain.name);
            }
        }
        self.nft.commit(batch).map_err(NftablesError::Apply)
    }

    /// Gives the pools of a new plan their numbers and slots, keeping those of the old one.
    fn assign_pools(&mut self, before: Option<&Programmed>, plan: &ServicePlan) -> Box<[Pools]> {
        plan.ports
            .iter()
            .map(|port| {
                let old = before.and_then(|before| {
                    let same = |p: &PortPlan| {
                        (&p.name, p.protocol, p.family) == (&port.name, port.protocol, port.family)
                    };
                    let index = before.plan.ports.iter().position(same)?;
                    let unchanged = before.plan.ports[index].affinity_secs == port.affinity_secs;
                    unchanged.then(|| &before.pools[index])
                });
                Pools {
                    cluster: self.assign_pool(old, port, Scope::Cluster),
                    local: self.assign_pool(old, port, Scope::Local),
                }
            })
            .collect()
    }

    fn assign_pool(&mut self, old: Option<&Pools>, port: &PortPlan, scope: Scope) -> Option<Pool> {
        let wanted = wanted_pool(&self.setup, port, scope)?;
        Some(match old.and_then(|old| old.get(scope)) {
            Some(old) => old.with(wanted),
            None => self.new_pool(port).with(wanted),
        })
    }

    fn new_pool(&mut self, port: &PortPlan) -> Pool {
        let number = self.next_pool;
        self.next_pool = self.next_pool.checked_add(1).unwrap_or(1);
        Pool::empty(number, port.affinity_secs.is_some())
    }

    /// Puts changes in force without looking at the kernel first.
    fn apply_known(&mut self, changes: &[Change]) -> Result<Applied, NftablesError> {
        let mut applied = Applied::default();
        let mut waiting = Vec::new();
        for change in changes {
            let before = self.programmed.remove(&change.service);
            let after = change.plan.as_ref().map(|plan| Programmed {
                plan: Arc::clone(plan),
                pools: self.assign_pools(before.as_ref(), plan),
            });
            let mut operations = Operations::replace(
                &self.all_items(before.as_ref()),
                &self.all_items(after.as_ref()),
            );
            self.count_hairpins(before.as_ref(), after.as_ref(), &mut operations);
            let service = change.service.clone();
            waiting.push(Pending { service, before, after, operations });
            self.commit_if_full(&mut waiting, &mut applied)?;
        }
        self.commit_all(&mut waiting, &mut applied)?;
        Ok(applied)
    }

    /// All elements of a Service, in order.
    fn all_items(&self, programmed: Option<&Programmed>) -> Vec<Item> {
        let mut items = Vec::new();
        if let Some(programmed) = programmed {
            for (port, pools) in programmed.plan.ports.iter().zip(&programmed.pools) {
                items_of(&self.setup, port, pools, &mut items);
            }
            items.extend(programmed.plan.guarded.iter().map(|address| guard_item(*address)));
        }
        items.sort_unstable();
        items
    }

    /// Several pools may have an endpoint on the same pod, but the element exists once.
    fn count_hairpins(
        &mut self,
        before: Option<&Programmed>,
        after: Option<&Programmed>,
        operations: &mut Operations,
    ) {
        let addresses = |programmed: &Programmed| -> Vec<IpAddr> {
            programmed.plan.ports.iter().flat_map(|port| port.here.iter().copied()).collect()
        };
        for address in after.map(addresses).unwrap_or_default() {
            let count = self.hairpin.entry(address).or_default();
            *count += 1;
            if *count == 1 {
                operations.adds.push(hairpin_item(address));
            }
        }
        for address in before.map(addresses).unwrap_or_default() {
            let Some(count) = self.hairpin.get_mut(&address) else { continue };
            *count -= 1;
            if *count == 0 {
                self.hairpin.remove(&address);
                operations.deletes.push(hairpin_item(address));
            }
        }
    }
}

impl Backend for Nftables {
    fn adopt(&mut self, plans: &Plans) -> Result<Applied, BackendError> {
        const ATTEMPTS: u32 = 5;
        crate::localhost::arrange(&self.netns, self.setup.config.localhost_node_ports);
        self.suspicious = false;
        for attempt in 1.. {
            self.isolating = attempt == ATTEMPTS;
            match self.adopt_once(plans) {
                // Somebody changes the table while it is being repaired.
                Err(error) if is_out_of_step(&error) && attempt < ATTEMPTS => {}
                result => {
                    self.isolating = false;
                    return Ok(result?);
                }
            }
        }
        Ok(Applied::default())
    }

    fn apply(&mut self, changes: &[Change], plans: &Plans) -> Result<Applied, BackendError> {
        match self.apply_known(changes) {
            Ok(applied) => Ok(applied),
            Err(error) => {
                tracing::warn!(
                    error = crate::switch::with_sources(&error),
                    "Reading the table again after a refused change"
                );
                self.adopt(plans)
            }
        }
    }

    fn configure(&mut self, config: BackendConfig) -> bool {
        let changed = self.setup.config != config;
        self.setup.config = config;
        changed
    }

    fn verify(&mut self, plans: &Plans) -> Result<Vec<Difference>, BackendError> {
        // While the kernel lets a large map grow, a listing of it misses elements and repeats others.
        const LOOKS: u32 = 10;
        let mut found = self.differences(plans)?;
        for _ in 1..LOOKS {
            if found.is_empty() {
                break;
            }
            found = self.differences(plans)?;
        }
        Ok(found)
    }

    fn alarm(&self) -> BorrowedFd<'_> {
        self.monitor.as_fd()
    }

    fn disturbed(&mut self) -> Result<bool, BackendError> {
        let seen =
            self.monitor.read(self.table(), self.nft.port()).map_err(NftablesError::Watch)?;
        Ok(std::mem::take(&mut self.suspicious) || seen.table_changed)
    }

    fn cleanup(&mut self) -> Result<(), BackendError> {
        self.unhook()?;
        let mut batch = Batch::new();
        // Deleting what may not be there: make it first, in the same transaction.
        batch.add_table(self.table());
        batch.delete_table(self.table());
        self.nft.commit(batch).map_err(NftablesError::Apply)?;
        self.programmed.clear();
        self.chains.clear();
        self.hairpin.clear();
        Ok(())
    }

    fn take_figures(&mut self) -> Figures {
        std::mem::take(&mut self.figures)
    }
}
