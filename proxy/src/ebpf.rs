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

mod alarm;
mod attach;
mod clsact;
mod config;
mod connected_udp;
mod ender;
mod error;
mod item;
mod leave;
mod maps;
mod monitor;
mod node;
mod numbering;
mod observed;
mod programs;
mod sys;
mod table;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::Hash;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use keelson_ebpf_abi::{ADDRESS_NODE, SETTING_EVENTS, Settings};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::Rtnl;

use crate::backend::{Applied, Backend, BackendConfig, BackendError, Difference};
use crate::diff::{Change, Plans};
use crate::model::{FrontendKey, PortPlan, Scope, ServiceKey, ServicePlan};
use alarm::Alarm;
use attach::{Links, Way};
pub use config::EbpfConfig;
use ender::Ender;
pub use error::EbpfError;
use item::{Item, Key, Operations, guard_item, items_of};
use maps::Maps;
pub use monitor::{MonitorArgs, monitor};
use node::NodeState;
use numbering::{Before, NumberedPool, NumberedPort, Numbers, number};
use observed::Observed;
use programs::Programs;
use table::Table;

/// Interfaces whose links are looked at each time.
const LOOK_AT_ONCE: usize = 16;

/// What is in force for one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Programmed {
    plan: Arc<ServicePlan>,
    ports: Box<[NumberedPort]>,
}

impl Programmed {
    /// Its elements, in order.
    fn items(&self) -> Vec<Item> {
        let mut items = Vec::new();
        for (plan, numbers) in self.plan.ports.iter().zip(&self.ports) {
            items_of(plan, numbers, &mut items);
        }
        items.extend(self.plan.guarded.iter().map(|address| guard_item(*address)));
        items.sort_unstable();
        items
    }
}

impl Before for Option<&Programmed> {
    fn pool(&mut self, port: &PortPlan, scope: Scope) -> Option<NumberedPool> {
        let before = self.as_ref()?;
        let same = |p: &PortPlan| {
            (&p.name, p.protocol, p.family, p.affinity_secs)
                == (&port.name, port.protocol, port.family, port.affinity_secs)
        };
        let index = before.plan.ports.iter().position(same)?;
        before.ports.get(index)?.pool(scope).cloned()
    }

    fn frontend(&self, key: &FrontendKey) -> Option<u32> {
        let ports = self.as_ref().map(|before| before.plan.ports.iter().zip(&before.ports));
        ports.into_iter().flatten().find_map(|(plan, numbers)| {
            let index = plan.frontends.iter().position(|frontend| frontend.key == *key)?;
            numbers.frontends.get(index).copied()
        })
    }
}

/// What is open once something was put in force.
struct Kernel {
    maps: Maps,
    programs: Programs,
    links: Links,
    way: Way,
    ender: Ender,
}

/// The backend. Lives in the network namespace in which it was opened.
pub struct Ebpf {
    config: BackendConfig,
    netns: Netns,
    cookie: u64,
    alarm: Alarm,
    /// The interface whose links were looked at last.
    looked_at: u32,
    kernel: Option<Kernel>,
    programmed: HashMap<ServiceKey, Programmed>,
    numbers: Numbers,
    node: NodeState,
}

impl Ebpf {
    /// Fails where the kernel does not take the programs.
    pub fn probe() -> Result<(), EbpfError> {
        sys::netns_cookie().map_err(EbpfError::Cookie)?;
        EbpfConfig::default().cgroup()?;
        programs::try_load()
    }

    pub fn open(config: BackendConfig) -> Result<Self, EbpfError> {
        Ok(Ebpf {
            config,
            netns: Netns::current()?,
            cookie: sys::netns_cookie().map_err(EbpfError::Cookie)?,
            alarm: Alarm::open()?,
            looked_at: 0,
            kernel: None,
            programmed: HashMap::new(),
            numbers: Numbers::after(0),
            node: NodeState::default(),
        })
    }

    /// The maps, programs and links: those that are pinned, or new ones.
    fn kernel(&mut self) -> Result<(Kernel, usize), EbpfError> {
        let pins = &self.config.ebpf.pins;
        self.config.ebpf.make_pins()?;
        let programs = Programs::ready(pins)?;
        let operations = usize::from(programs.fresh);
        let folder = Programs::maps_folder(pins);
        let maps = Maps::open(&folder)?;
        let ender = Ender::start(&folder, self.config.ebpf.namespaces.clone())?;
        let way = Way::find(&programs, &self.netns)?;
        Ok((Kernel { maps, programs, links: Links::open(pins)?, way, ender }, operations))
    }

    fn adopt_all(&mut self, plans: &Plans) -> Result<Applied, EbpfError> {
        // The old descriptors are of no use if somebody removed the pins.
        self.kernel = None;
        let (kernel, mut operations) = self.kernel()?;
        let settings = kernel.maps.settings.get(&0)?.unwrap_or_default();
        self.numbers = Numbers::after(settings.numbers);
        self.node = NodeState::default();
        operations += self.adopt_node(&kernel, settings)?;
        let mut observed = Observed::read(&kernel.maps)?;
        let mut applied = self.adopt_services(&kernel, plans, &mut observed)?;
        let leftovers = Operations { puts: Vec::new(), deletes: observed.leftovers() };
        kernel.maps.perform(&leftovers)?;
        // Last: now every connection finds its Service.
        operations += leftovers.len() + self.attach(&kernel)?;
        applied.operations += operations;
        // Endpoints may have gone while no proxy ran.
        kernel.ender.look();
        self.kernel = Some(kernel);
        self.alarm.start_clock()?;
        Ok(applied)
    }

    fn adopt_services(
        &mut self,
        kernel: &Kernel,
        plans: &Plans,
        observed: &mut Observed,
    ) -> Result<Applied, EbpfError> {
        self.programmed.clear();
        let mut wanted: Vec<_> = plans.iter().collect();
        wanted.sort_unstable_by_key(|(service, _)| *service);
        let mut all = Vec::new();
        for (service, plan) in wanted {
            let ports = number(plan, observed, &mut self.numbers);
            let programmed = Programmed { plan: Arc::clone(plan), ports };
            let mut operations = Operations::default();
            for item in programmed.items() {
                observed.settle(&item, &mut operations);
            }
            all.push(Pending {
                service: service.clone(),
                before: None,
                after: Some(programmed),
                operations,
            });
        }
        self.perform(kernel, all)
    }

    /// Writes what belongs to the node itself.
    fn adopt_node(&mut self, kernel: &Kernel, found: Settings) -> Result<usize, EbpfError> {
        self.node = read_node(&kernel.maps, found)?;
        let mut operations = self.refresh_node(kernel)?;
        if found.host_cookie != self.cookie {
            self.write_settings(kernel, found.numbers)?;
            operations += 1;
        }
        Ok(operations)
    }

    /// Follows changes of interfaces and addresses.
    fn refresh_node(&mut self, kernel: &Kernel) -> Result<usize, EbpfError> {
        let wanted = self.observe_node()?;
        let maps = &kernel.maps;
        let mut operations = replace(&maps.addresses, &self.node.addresses, &wanted.addresses)?;
        operations += replace(&maps.interfaces, &self.node.interfaces, &wanted.interfaces)?;
        operations += replace(&maps.pod_ranges, &self.node.pod_ranges, &wanted.pod_ranges)?;
        operations +=
            replace(&maps.service_ranges, &self.node.service_ranges, &wanted.service_ranges)?;
        let settings = |node: &NodeState| (node.flags, node.address4, node.address6);
        let changed = settings(&self.node) != settings(&wanted);
        self.node = wanted;
        if changed {
            let found = kernel.maps.settings.get(&0)?.unwrap_or_default();
            self.write_settings(kernel, found.numbers)?;
            operations += 1;
        }
        Ok(operations)
    }

    fn observe_node(&self) -> Result<NodeState, EbpfError> {
        let mut rtnl = Rtnl::open_in(&self.netns)?;
        let (links, addresses) = node::observe(&mut rtnl).map_err(EbpfError::Observe)?;
        Ok(NodeState::new(&self.config, &links, &addresses))
    }

    fn write_settings(&self, kernel: &Kernel, numbers: u32) -> Result<(), EbpfError> {
        let NodeState { flags, address4, address6, .. } = self.node;
        let settings = Settings { host_cookie: self.cookie, flags, numbers, address4, address6 };
        kernel.maps.settings.put(&0, &settings)
    }

    fn interfaces(&self) -> HashSet<u32> {
        self.node.interfaces.keys().copied().collect()
    }

    /// Attaches what is not attached yet, and the other way round.
    fn attach(&self, kernel: &Kernel) -> Result<usize, EbpfError> {
        let (interfaces, sockets) = (self.interfaces(), self.config.ebpf.sockets);
        let Kernel { links, programs, way, .. } = kernel;
        let mut operations = links.serve_packets(programs, *way, &self.netns, &interfaces)?;
        if sockets {
            let cgroup = self.config.ebpf.cgroup()?;
            operations += links.serve_sockets(programs, &cgroup)?;
        }
        Ok(operations + links.remove_others(sockets, &interfaces))
    }

    fn apply_known(&mut self, changes: &[Change]) -> Result<Applied, EbpfError> {
        let Some(kernel) = self.kernel.take() else { return Ok(Applied::default()) };
        let mut all = Vec::new();
        for change in changes {
            let before = self.programmed.remove(&change.service);
            let after = change.plan.as_ref().map(|plan| {
                let ports = number(plan, &mut before.as_ref(), &mut self.numbers);
                Programmed { plan: Arc::clone(plan), ports }
            });
            let items = |of: Option<&Programmed>| of.map(Programmed::items).unwrap_or_default();
            let operations = Operations::replace(&items(before.as_ref()), &items(after.as_ref()));
            all.push(Pending { service: change.service.clone(), before, after, operations });
        }
        let members_go = all.iter().any(Pending::removes_members);
        let applied = self.perform(&kernel, all);
        if members_go {
            kernel.ender.look();
        }
        self.kernel = Some(kernel);
        applied
    }

    /// Puts Services in force together; when the kernel refuses, each on its own, so that one that cannot be
    /// had does not hold up the others.
    fn perform(&mut self, kernel: &Kernel, all: Vec<Pending>) -> Result<Applied, EbpfError> {
        if let Some(mark) = self.numbers.reserve() {
            self.write_settings(kernel, mark)?;
        }
        let together = together(&all);
        let mut applied = Applied { operations: together.len(), ..Applied::default() };
        let whole = kernel.maps.perform(&together);
        for pending in all {
            let alone = match &whole {
                Ok(()) => Ok(()),
                Err(_) => kernel.maps.perform(&pending.operations),
            };
            let keep = match alone {
                Ok(()) => pending.after,
                Err(error) => {
                    undo(kernel, &pending)?;
                    applied.refused.push((pending.service.clone(), error.into()));
                    pending.before
                }
            };
            if let Some(programmed) = keep {
                self.programmed.insert(pending.service, programmed);
            }
        }
        Ok(applied)
    }
}

/// What the maps say of the node.
fn read_node(maps: &Maps, settings: Settings) -> Result<NodeState, EbpfError> {
    let addresses = maps.addresses.read()?.into_iter();
    Ok(NodeState {
        addresses: addresses.filter(|(_, flags)| flags & ADDRESS_NODE != 0).collect(),
        interfaces: maps.interfaces.read()?.into_iter().collect(),
        pod_ranges: maps.pod_ranges.read()?.into_iter().collect(),
        service_ranges: maps.service_ranges.read()?.into_iter().collect(),
        // Somebody may listen.
        flags: settings.flags & !SETTING_EVENTS,
        address4: settings.address4,
        address6: settings.address6,
    })
}

/// A Service's change on its way into the kernel.
struct Pending {
    service: ServiceKey,
    before: Option<Programmed>,
    after: Option<Programmed>,
    operations: Operations,
}

impl Pending {
    fn removes_members(&self) -> bool {
        self.operations.deletes.iter().any(|key| matches!(key, Key::Member(_)))
    }
}

/// All changes at once: everything is written before anything is removed.
fn together(all: &[Pending]) -> Operations {
    let mut puts: Vec<Item> = all.iter().flat_map(|p| p.operations.puts.iter().copied()).collect();
    puts.sort_unstable();
    // A key that one Service gives up may be another one's now.
    let written: HashSet<Key> = puts.iter().map(Item::key).collect();
    let deletes = all.iter().flat_map(|pending| pending.operations.deletes.iter().copied());
    let mut deletes: Vec<Key> = deletes.filter(|key| !written.contains(key)).collect();
    deletes.sort_unstable_by(|a, b| b.cmp(a));
    Operations { puts, deletes }
}

/// Takes back what was done of a change that the kernel refused.
fn undo(kernel: &Kernel, pending: &Pending) -> Result<(), EbpfError> {
    let before = pending.before.as_ref().map(Programmed::items).unwrap_or_default();
    let after = pending.after.as_ref().map(Programmed::items).unwrap_or_default();
    kernel.maps.perform(&Operations::replace(&after, &before))
}

/// From one content of a map to another; says how many elements that took.
fn replace<K, V>(
    table: &Table<K, V>,
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
) -> Result<usize, EbpfError>
where
    K: aya::Pod + Default + Ord + Hash,
    V: aya::Pod + Default + Eq,
{
    let mut operations = 0;
    for (key, value) in after.iter().filter(|(key, value)| before.get(key) != Some(value)) {
        table.put(key, value)?;
        operations += 1;
    }
    for key in before.keys().filter(|key| !after.contains_key(key)) {
        table.delete(key)?;
        operations += 1;
    }
    Ok(operations)
}

impl Ebpf {
    /// Follows what happened to interfaces and addresses.
    fn follow_node(&mut self) -> Result<(), EbpfError> {
        let Some(kernel) = self.kernel.take() else { return Ok(()) };
        let followed = self.refresh_node(&kernel).and_then(|_| self.attach(&kernel));
        self.kernel = Some(kernel);
        followed.map(drop)
    }

    /// Whether a link is missing; not all of them are looked at each time.
    fn lacks_links(&mut self) -> bool {
        let Some(kernel) = &self.kernel else { return false };
        let interfaces = self.node.interfaces.keys().copied();
        let next: Vec<u32> =
            interfaces.clone().filter(|index| *index > self.looked_at).take(LOOK_AT_ONCE).collect();
        self.looked_at = match next.last() {
            Some(last) if next.len() == LOOK_AT_ONCE => *last,
            _ => 0,
        };
        let Kernel { links, way, .. } = kernel;
        let missing = links.missing(self.config.ebpf.sockets, next.into_iter(), *way, &self.netns);
        !missing.is_empty()
    }

    fn differences(&mut self, plans: &Plans) -> Result<Vec<Difference>, EbpfError> {
        let mut found = Vec::new();
        let mut differs = |service: Option<&ServiceKey>, what: String| {
            found.push(Difference { service: service.cloned(), what });
        };
        let pins = self.config.ebpf.pins.clone();
        let Ok(maps) = Maps::open(&Programs::maps_folder(&pins)) else {
            differs(None, "no maps are pinned".to_owned());
            return Ok(found);
        };
        let Some(programs) = Programs::found(&pins)? else {
            differs(None, "no programs are pinned".to_owned());
            return Ok(found);
        };
        let node = self.observe_node()?;
        let (links, way) = (Links::open(&pins)?, Way::find(&programs, &self.netns)?);
        let interfaces = node.interfaces.keys().copied();
        for pin in links.missing(self.config.ebpf.sockets, interfaces, way, &self.netns) {
            differs(None, format!("{pin} is not attached"));
        }
        if read_node(&maps, maps.settings.get(&0)?.unwrap_or_default())? != node {
            differs(
                None,
                "what the programs know of the node's interfaces and addresses".to_owned(),
            );
        }
        let mut observed = Observed::read(&maps)?;
        let mut numbers = self.numbers;
        let mut wanted: Vec<_> = plans.iter().collect();
        wanted.sort_unstable_by_key(|(service, _)| *service);
        for (service, plan) in wanted {
            let ports = number(plan, &mut observed, &mut numbers);
            let mut operations = Operations::default();
            for item in (Programmed { plan: Arc::clone(plan), ports }).items() {
                observed.settle(&item, &mut operations);
            }
            operations.puts.iter().for_each(|i| differs(Some(service), format!("missing in {i}")));
        }
        for key in observed.leftovers() {
            differs(None, format!("belongs to no Service: {key:?}"));
        }
        Ok(found)
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
        if self.alarm.acknowledge()? {
            self.follow_node()?;
        }
        Ok(self.lacks_links())
    }

    fn cleanup(&mut self) -> Result<(), BackendError> {
        self.kernel = None;
        self.programmed.clear();
        let removed = self.netns.run(|| Ebpf::remove(&self.config.ebpf));
        Ok(removed.map_err(EbpfError::from)??)
    }
}
