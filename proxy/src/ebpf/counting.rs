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
    /// What was told of each number last: what programs count in the moment in which maps are replaced is lost.
    told: HashMap<u32, Traffic>,
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
        self.with(|state| state.keep(|number| !numbers.contains(&number)));
    }

    /// Everything is in force that shall be, and nothing else. From now on numbers without an owner are nobody's.
    pub(crate) fn complete(&self, maps: &Path, numbers: &HashSet<u32>) {
        self.with(|state| {
            state.keep(|number| numbers.contains(&number));
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
        let (ports, nobodys) = self.with(|state| state.attribute(counted));
        // Connections to a Service that is gone still count.
        nobodys.iter().try_for_each(|number| counters.delete(number))?;
        Ok(Counted { ports, drops: read_drops(&maps)? })
    }
}

impl State {
    fn keep(&mut self, which: impl Fn(u32) -> bool) {
        self.owners.retain(|number, _| which(*number));
        self.told.retain(|number, _| which(*number));
    }

    /// What was counted, by owner, and the numbers that have none.
    fn attribute(&mut self, counted: HashMap<u32, Counters>) -> (Vec<PortTraffic>, Vec<u32>) {
        let (mut ports, mut nobodys) = (Vec::new(), Vec::new());
        for (number, counters) in counted {
            let owner = self.owners.get(&number);
            let Some((owner, port)) = owner.and_then(|owner| Some((owner, owner.port()?))) else {
                nobodys.push(number);
                continue;
            };
            let told = self.told.entry(number).or_default();
            *told = told.or_more(traffic(counters));
            ports.push(PortTraffic {
                service: owner.service.clone(),
                port: port.name.clone(),
                protocol: port.protocol,
                traffic: *told,
            });
        }
        (ports, nobodys)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_is_never_less_later() {
        let port = crate::model::PortPlan {
            name: "http".into(),
            protocol: crate::model::Protocol::Tcp,
            family: crate::model::Family::V4,
            affinity_secs: None,
            cluster: Box::default(),
            local: Box::default(),
            draining: Box::default(),
            here: Box::default(),
            strangers: Box::default(),
            frontends: Box::default(),
        };
        let plan = Arc::new(ServicePlan { ports: [port].into(), guarded: Box::default() });
        let owner = Owner { service: ServiceKey::new("ns", "web"), plan, index: 0 };
        let mut state = State { owners: [(7, owner)].into(), ..State::default() };
        let told = |state: &mut State, number, connections, packets| {
            let counters = Counters { connections, packets, ..Counters::default() };
            let (ports, nobodys) = state.attribute([(number, counters)].into());
            let port = ports.first().map(|port| (port.traffic.connections, port.traffic.packets));
            (port, nobodys)
        };
        assert_eq!(told(&mut state, 7, 5, 20), (Some((5, 20)), vec![]));
        assert_eq!(told(&mut state, 7, 4, 21), (Some((5, 21)), vec![]));
        assert_eq!(told(&mut state, 8, 1, 1), (None, vec![8]));
        state.keep(|_| false);
        assert_eq!(told(&mut state, 7, 6, 22), (None, vec![7]));
    }
}
