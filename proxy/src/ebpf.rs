//! The eBPF backend: maps that BPF programs look Services up in.
//!
//! ```text
//! socket: connect, sendmsg ── programs of a cgroup ──┐
//! packet: tc, every interface ── ingress, egress ────┴─► frontends ─► pools ─► slots: the endpoint
//! ```
//!
//! The programs for sockets translate a destination when a process connects, so that its packets need no
//! translation at all. What they cannot do exactly (sources that must be replaced or checked, connections
//! from outside) the programs for packets do.
//!
//! A Service is elements of these maps; layouts are in `ebpf/abi`. Maps, programs and links are pinned in a
//! BPF file system: Services go on while no proxy runs, and a restart reads the maps and changes what differs.

mod adopt;
mod alarm;
mod attach;
mod clsact;
mod config;
mod connected_udp;
mod cookie;
mod counting;
mod details;
mod direct;
mod drops;
mod ender;
mod error;
mod exempt;
mod filter;
mod follow;
mod gaps;
mod grow;
pub(crate) mod item;
mod leave;
mod maglev;
mod maps;
pub(crate) mod monitor;
mod moving;
mod needs;
mod netfilter;
mod node;
pub(crate) mod numbering;
mod observed;
mod programmed;
mod programs;
mod raw;
mod refusals;
mod sizes;
pub(crate) mod sys;
mod table;
mod tend;
mod xdp;

use std::collections::{HashMap, HashSet};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use keelson_netlink::netns::Netns;

use crate::backend::{
    Applied, Backend, BackendConfig, BackendError, Counting, Difference, Figures,
};
use crate::diff::{Change, Plans};
use crate::model::{ServiceKey, ServicePlan};
use crate::switch::with_sources;
use alarm::Alarm;
use attach::{Links, Way};
pub use config::{Algorithm, EbpfConfig, Sockets};
use counting::Tally;
pub use direct::Forwarding;
pub(crate) use direct::is_direct;
use ender::Ender;
pub use error::EbpfError;
use exempt::Exempt;
use item::Operations;
use maps::Maps;
pub use monitor::{MonitorArgs, monitor};
pub(crate) use netfilter::keep_translating;
use node::NodeState;
use numbering::{Numbers, number};
use programmed::{Pending, Programmed, together, written};
use programs::Programs;
use refusals::{Refusals, Troubles};
use sizes::{Amounts, Needs};
use tend::Tables;
use xdp::Frames;
pub use xdp::XdpChoice;

/// How it is told that the programs for sockets are refused altogether.
const SOCKETS: &str = "sockets";
/// Interfaces whose links are looked at each time.
const LOOK_AT_ONCE: usize = 16;

/// The number by which programs know a network namespace.
fn own_cookie(netns: &Netns) -> Result<u64, EbpfError> {
    Ok(cookie::cookie(netns, &config::cgroup2()?)?)
}

/// Has a thread of its own do something, which nobody waits for.
fn aside(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), EbpfError> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map(drop).map_err(|source| EbpfError::Thread { name, source })
}

/// What is open once something was put in force.
struct Kernel {
    maps: Maps,
    programs: Programs,
    links: Links,
    way: Way,
    frames: Frames,
    ender: Ender,
    tables: Tables,
}

/// The backend. Lives in the network namespace in which it was opened.
pub struct Ebpf {
    config: BackendConfig,
    netns: Netns,
    cookie: u64,
    alarm: Alarm,
    exempt: Exempt,
    /// The interface whose links were looked at last.
    looked_at: u32,
    kernel: Option<Kernel>,
    programmed: HashMap<ServiceKey, Programmed>,
    /// Whose numbers are whose, for those who read counters.
    tally: Arc<Tally>,
    numbers: Numbers,
    node: NodeState,
    /// How many the node has.
    own_addresses: u32,
    troubles: Troubles,
    obstacles: direct::Obstacles,
    /// Where frames shall be forwarded.
    frames_at: Vec<xdp::Wanted>,
    /// What is in the maps of Services.
    used: Amounts,
    /// When maps could not be made larger, the next attempt.
    grow_again_ns: u64,
}

impl Ebpf {
    /// Fails where the kernel does not take the programs.
    pub fn probe() -> Result<(), EbpfError> {
        needs::check()?;
        own_cookie(&Netns::current()?)?;
        Way::try_out(&programs::try_load()?)
    }

    /// What it would not do on this node though it works, one sentence each.
    #[must_use]
    pub fn gaps(config: &EbpfConfig) -> Vec<String> {
        gaps::gaps(config)
    }

    pub fn open(config: BackendConfig) -> Result<Self, EbpfError> {
        needs::check()?;
        let netns = Netns::current()?;
        Ok(Ebpf {
            alarm: Alarm::open(&config.ebpf)?,
            config,
            cookie: own_cookie(&netns)?,
            netns,
            exempt: Exempt::default(),
            looked_at: 0,
            kernel: None,
            programmed: HashMap::new(),
            tally: Arc::default(),
            numbers: Numbers::after(0),
            node: NodeState::default(),
            own_addresses: 0,
            troubles: Troubles::default(),
            obstacles: direct::Obstacles::default(),
            frames_at: Vec::new(),
            used: Amounts::default(),
            grow_again_ns: 0,
        })
    }

    /// The maps, programs and links: those that are pinned, or new ones.
    fn kernel(&self, needs: &Needs) -> Result<(Kernel, usize), EbpfError> {
        let (config, pins) = (&self.config.ebpf, &self.config.ebpf.pins);
        config.make_pins()?;
        let programs = Programs::ready(config, needs)?;
        let operations = usize::from(programs.fresh);
        let folder = Programs::maps_folder(pins);
        let (maps, tables) = (Maps::open(&folder)?, Tables::open(&folder, config)?);
        let ender = Ender::start(&folder, config.namespaces.clone())?;
        let way = Way::find(&programs, &self.netns)?;
        let (links, frames) = (Links::open(pins)?, Frames::default());
        Ok((Kernel { maps, programs, links, way, frames, ender, tables }, operations))
    }

    fn serves_sockets(&self) -> bool {
        self.config.ebpf.sockets != Sockets::None
    }

    fn interfaces(&self) -> HashSet<u32> {
        self.node.interfaces.keys().copied().collect()
    }

    /// Attaches what is not attached yet, and the other way round.
    fn attach(&self, kernel: &mut Kernel, refusals: &mut Refusals) -> Result<usize, EbpfError> {
        let (interfaces, sockets, netns) = (self.interfaces(), self.serves_sockets(), &self.netns);
        let Kernel { maps, links, programs, way, frames, .. } = kernel;
        let mut operations = links.serve_packets(programs, *way, netns, &interfaces, refusals)?;
        if sockets {
            let cgroup = self.config.ebpf.cgroup();
            let served = cgroup.and_then(|cgroup| links.serve_sockets(programs, &cgroup, refusals));
            match served {
                Ok(changed) => operations += changed,
                // Packets of these are served all the same.
                Err(error) => refusals.add(SOCKETS, "sockets that connect", &error),
            }
        }
        operations += frames.serve((links, programs, maps), netns, &self.frames_at, refusals)?;
        Ok(operations + links.remove_others(sockets, &interfaces))
    }

    fn apply_known(&mut self, changes: &[Change]) -> Result<Applied, EbpfError> {
        let Some(mut kernel) = self.kernel.take() else { return Ok(Applied::default()) };
        let mut all = Vec::new();
        for change in changes {
            let before = self.programmed.remove(&change.service);
            let after = change.plan.as_ref().map(|plan| {
                let ports = number(
                    plan,
                    &mut before.as_ref(),
                    &mut self.numbers,
                    self.config.ebpf.algorithm,
                );
                Programmed { plan: Arc::clone(plan), ports }
            });
            all.push(Pending::replace(change.service.clone(), before, after));
        }
        let members_go = all.iter().any(Pending::removes_members);
        let applied = self.perform(&mut kernel, all);
        if members_go {
            kernel.ender.look();
        }
        self.kernel = Some(kernel);
        applied
    }

    /// Puts Services in force together; when the kernel refuses, each on its own, so that one that cannot be
    /// had does not hold up the others.
    fn perform(&mut self, kernel: &mut Kernel, all: Vec<Pending>) -> Result<Applied, EbpfError> {
        self.make_room(kernel, all.iter().fold(Amounts::default(), |sum, one| sum.plus(one.adds)))?;
        if let Some(mark) = self.numbers.reserve() {
            self.write_settings(kernel, mark)?;
        }
        for pending in &all {
            pending.after.iter().for_each(|after| self.tally.add(&pending.service, after));
        }
        let written = written(&all);
        let together = together(&all, &written);
        let mut applied = Applied { operations: together.len(), ..Applied::default() };
        let whole = kernel.maps.perform(&together);
        let mut gone = HashSet::new();
        for pending in all {
            let alone = match &whole {
                Ok(()) => Ok(()),
                Err(_) => kernel.maps.perform(&pending.alone(&written)),
            };
            let (keep, drop) = match alone {
                Ok(()) => {
                    self.used = self.used.plus(pending.adds).minus(pending.removes());
                    (pending.after, pending.before)
                }
                Err(error) => {
                    undo(kernel, &pending)?;
                    applied.refused.push((pending.service.clone(), error.into()));
                    (pending.before, pending.after)
                }
            };
            gone.extend(drop.iter().flat_map(Programmed::numbers));
            if let Some(programmed) = keep {
                programmed.numbers().for_each(|number| _ = gone.remove(&number));
                self.tally.add(&pending.service, &programmed);
                self.programmed.insert(pending.service, programmed);
            }
        }
        self.tally.remove(&gone);
        gone.iter().try_for_each(|number| kernel.maps.counters.delete(number))?;
        Ok(applied)
    }
}

/// Takes back what was done of a change that the kernel refused.
fn undo(kernel: &Kernel, pending: &Pending) -> Result<(), EbpfError> {
    let before = pending.before.as_ref().map(Programmed::items).unwrap_or_default();
    let after = pending.after.as_ref().map(Programmed::items).unwrap_or_default();
    kernel.maps.perform(&Operations::replace(&after, &before))
}

impl Ebpf {
    /// Whether a link is missing; not all of them are looked at each time.
    fn lacks_links(&mut self) -> bool {
        let Some(kernel) = &self.kernel else { return false };
        let interfaces = self.node.interfaces.keys().copied();
        let next: Vec<u32> =
            interfaces.filter(|index| *index > self.looked_at).take(LOOK_AT_ONCE).collect();
        self.looked_at = match next.last() {
            Some(last) if next.len() == LOOK_AT_ONCE => *last,
            _ => 0,
        };
        let Kernel { links, way, frames, .. } = kernel;
        let sockets = self.serves_sockets() && !self.troubles.has(SOCKETS);
        let missing = links.missing(sockets, next.into_iter(), *way, &self.netns);
        missing.iter().any(|pin| !self.troubles.has(pin))
            || frames.pins().any(|pin| !links.works(&pin))
    }
}

impl Backend for Ebpf {
    fn adopt(&mut self, plans: &Plans) -> Result<Applied, BackendError> {
        Ok(self.adopt_all(plans)?)
    }

    fn apply(&mut self, changes: &[Change], plans: &Plans) -> Result<Applied, BackendError> {
        if self.kernel.is_none() {
            return self.adopt(plans);
        }
        Ok(self.apply_known(changes)?)
    }

    fn configure(&mut self, config: BackendConfig) -> bool {
        let changed = self.config != config;
        self.config = config;
        changed
    }

    fn verify(&mut self, plans: &Plans) -> Result<Vec<Difference>, BackendError> {
        Ok(self.differences(plans)?)
    }

    fn alarm(&self) -> BorrowedFd<'_> {
        self.alarm.fd()
    }

    fn disturbed(&mut self) -> Result<bool, BackendError> {
        let moved = self.alarm.acknowledge()?;
        let exempt_differ = self.exempt.may_differ(&self.config.ebpf.exempt);
        if moved || exempt_differ || self.troubles.is_due(alarm::monotonic_ns()?) {
            self.follow_node()?;
        }
        if let Some(kernel) = &self.kernel {
            let maps = Programs::maps_folder(&self.config.ebpf.pins);
            if let Err(error) = monitor::forget_the_dead(&kernel.maps.watched, &maps) {
                tracing::warn!(
                    error = with_sources(&error),
                    "Cannot tell whether a monitor is there"
                );
            }
        }
        if let Err(error) = self.tend() {
            tracing::error!(error = with_sources(&error), "Cannot tend the tables of connections");
            return Ok(true);
        }
        Ok(self.lacks_links())
    }

    fn counting(&self) -> Option<Arc<dyn Counting>> {
        Some(Arc::clone(&self.tally) as Arc<dyn Counting>)
    }

    fn take_figures(&mut self) -> Figures {
        Figures::of_maps(self.fills())
    }

    fn take_troubles(&mut self) -> Vec<String> {
        self.troubles.take_untold()
    }

    fn details(&mut self, plan: &ServicePlan) -> Result<Vec<String>, BackendError> {
        Ok(details::of(&self.config.ebpf, plan)?)
    }

    fn cleanup(&mut self) -> Result<(), BackendError> {
        self.kernel = None;
        self.programmed.clear();
        let removed = self.netns.run(|| Ebpf::remove(&self.config.ebpf));
        Ok(removed.map_err(EbpfError::from)??)
    }
}
