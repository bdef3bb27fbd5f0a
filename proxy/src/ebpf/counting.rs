//! What the programs count of each Service port.
//!
//! Programs count under a number; whose it is, is known here. Reading needs neither the engine nor its thread: whoever
//! asks opens the pinned maps, so that nothing is read unless somebody wants to know.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use keelson_ebpf_abi::{Counters, DROP_REASONS};

use super::drops;
use super::error::EbpfError;
use super::numbering::is_same_port;
use super::programmed::Programmed;
use super::table::PerCpu;
use crate::backend::{BackendError, Counted, Counting, Names, PortTraffic, Traffic};
use crate::model::{PortPlan, ServiceKey, ServicePlan};

/// Whose numbers are whose. At any moment it has all numbers that the kernel's frontends carry.
#[derive(Default)]
pub(crate) struct Tally {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Where the maps are pinned, once something is in force.
    maps: Option<PathBuf>,
    owners: HashMap<u32, Owner>,
}

/// A Service port.
#[derive(Clone)]
struct Owner {
    service: ServiceKey,
    plan: Arc<ServicePlan>,
    index: usize,
}

impl Owner {
    fn port(&self) -> Option<&PortPlan> {
        self.plan.ports.get(self.index)
    }

    fn name(&self) -> String {
        match self.port() {
            Some(port) if !port.name.is_empty() => format!("{}:{}", self.service, port.name),
            _ => self.service.to_string(),
        }
    }
}

impl Tally {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Before the kernel gets to know the numbers.
    pub(crate) fn add(&self, service: &ServiceKey, programmed: &Programmed) {
        self.with(|state| {
            for (index, port) in programmed.ports.iter().enumerate() {
                let plan = Arc::clone(&programmed.plan);
                let owner = Owner { service: service.clone(), plan, index };
                if port.number != 0 {
                    state.owners.insert(port.number, owner);
                }
            }
        });
    }

    /// After the kernel has forgotten them.
    pub(crate) fn remove(&self, numbers: &HashSet<u32>) {
        self.with(|state| state.owners.retain(|number, _| !numbers.contains(number)));
    }

    /// Everything is in force that shall be, and nothing else. From now on numbers without an owner are nobody's.
    pub(crate) fn complete(&self, maps: &Path, numbers: &HashSet<u32>) {
        self.with(|state| {
            state.owners.retain(|number, _| numbers.contains(number));
            state.maps = Some(maps.to_owned());
        });
    }

    fn read_maps(&self) -> Result<Counted, EbpfError> {
        let Some(maps) = self.with(|state| state.maps.clone()) else {
            return Ok(Counted::default());
        };
        let counters: PerCpu<u32, Counters> = PerCpu::open(&maps, "counters")?;
        // Read before owners are looked up: what was counted had an owner already.
        let counted = counters.read()?;
        let (ports, nobodys) = self.with(|state| attribute(counted, &state.owners));
        // Connections to a Service that is gone still count.
        nobodys.iter().try_for_each(|number| counters.delete(number))?;
        Ok(Counted { ports, drops: read_drops(&maps)? })
    }
}

/// What was counted, by owner, and the numbers that have none.
fn attribute(
    counted: HashMap<u32, Counters>,
    owners: &HashMap<u32, Owner>,
) -> (Vec<PortTraffic>, Vec<u32>) {
    let (mut ports, mut nobodys) = (Vec::new(), Vec::new());
    for (number, counters) in counted {
        let owner = owners.get(&number);
        let Some((owner, port)) = owner.and_then(|owner| Some((owner, owner.port()?))) else {
            nobodys.push(number);
            continue;
        };
        ports.push(PortTraffic {
            service: owner.service.clone(),
            port: port.name.clone(),
            protocol: port.protocol,
            traffic: traffic(counters),
        });
    }
    (ports, nobodys)
}

pub(crate) fn traffic(counters: Counters) -> Traffic {
    let Counters { connections, packets, bytes, refused } = counters;
    Traffic { connections, packets, bytes, refused }
}

/// Dropped packets, by reason.
fn read_drops(maps: &Path) -> Result<Vec<(&'static str, u64)>, EbpfError> {
    let drops: PerCpu<u32, u64> = PerCpu::open(maps, "drops")?;
    let numbers = 0..u32::try_from(DROP_REASONS).unwrap_or(0);
    numbers.map(|number| Ok((drops::reason(number).0, drops.get(&number)?))).collect()
}

impl Counting for Tally {
    fn read(&self) -> Result<Counted, BackendError> {
        Ok(self.read_maps()?)
    }

    fn names(&self) -> Names {
        let owners = self.with(|state| state.owners.clone());
        let ports = owners.iter().map(|(number, owner)| (*number, owner.name())).collect();
        let addresses = owners.values().flat_map(|owner| {
            // Each Service once.
            let first = owner.plan.ports.first().zip(owner.port());
            let is_first = first.is_some_and(|(first, port)| is_same_port(first, port));
            let guarded = is_first.then_some(&owner.plan.guarded).into_iter().flatten();
            guarded.map(|address| (*address, owner.service.to_string()))
        });
        Names { ports, addresses: addresses.collect() }
    }
}
