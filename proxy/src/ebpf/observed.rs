//! What the kernel's maps hold, and how that compares with what they should.

use std::collections::{HashMap, HashSet};

use keelson_ebpf_abi::{
    ADDRESS_CLUSTER_IP, Address, Endpoint, Frontend, FrontendKey, MemberKey, Pool, SlotKey,
    SourcePrefix,
};

use super::error::EbpfError;
use super::item::{Item, Key, Operations, frontend_key};
use super::maps::Maps;
use super::numbering::{Before, NumberedPool, scope_of};
use super::sizes::{Amounts, length};
use crate::model::{self, PortPlan, Route, Scope};

/// What the maps of Services hold.
pub(crate) struct Observed {
    frontends: HashMap<FrontendKey, Frontend>,
    pools: HashMap<u32, Pool>,
    slots: HashMap<SlotKey, Endpoint>,
    members: HashMap<MemberKey, u32>,
    sources: HashMap<SourcePrefix, u32>,
    addresses: HashMap<Address, u32>,
    /// What was not accounted for yet is removed from the maps above only at the end: pools are recognised by it.
    settled: HashSet<Key>,
    claimed_pools: HashSet<u32>,
    claimed_numbers: HashSet<u32>,
}

impl Observed {
    pub(crate) fn read(maps: &Maps) -> Result<Self, EbpfError> {
        let mut addresses = maps.addresses.read()?;
        // The others are the node's own.
        addresses.retain(|_, flags| *flags & ADDRESS_CLUSTER_IP != 0);
        Ok(Observed {
            frontends: maps.frontends.read()?,
            pools: maps.pools.read()?,
            slots: maps.slots.read()?,
            members: maps.members.read()?,
            sources: maps.sources.read()?,
            addresses,
            settled: HashSet::new(),
            claimed_pools: HashSet::new(),
            claimed_numbers: HashSet::new(),
        })
    }

    /// Where packets for Services go.
    pub(crate) fn destinations(&self) -> impl Iterator<Item = &Address> {
        self.frontends.keys().map(|key| &key.address).chain(self.addresses.keys())
    }

    fn has(&self, item: &Item) -> bool {
        match item {
            Item::Slot(key, value) => self.slots.get(key) == Some(value),
            Item::Member(key, value) => self.members.get(key) == Some(value),
            Item::Pool(key, value) => self.pools.get(key) == Some(value),
            Item::Source(key, value) => self.sources.get(key) == Some(value),
            Item::Frontend(key, value) => self.frontends.get(key) == Some(value),
            Item::Address(key, value) => self.addresses.get(key) == Some(value),
        }
    }

    fn has_key(&self, key: &Key) -> bool {
        match key {
            Key::Slot(key) => self.slots.contains_key(key),
            Key::Member(key) => self.members.contains_key(key),
            Key::Pool(key) => self.pools.contains_key(key),
            Key::Source(key) => self.sources.contains_key(key),
            Key::Frontend(key) => self.frontends.contains_key(key),
            Key::Address(key) => self.addresses.contains_key(key),
        }
    }

    /// How much it is.
    pub(crate) fn amounts(&self) -> Amounts {
        Amounts {
            slots: length(self.slots.len()),
            members: length(self.members.len()),
            pools: length(self.pools.len()),
            sources: length(self.sources.len()),
            frontends: length(self.frontends.len()),
            addresses: length(self.addresses.len()),
        }
    }

    /// Accounts for an element that is wanted.
    pub(crate) fn settle(&mut self, item: &Item, operations: &mut Operations, adds: &mut Amounts) {
        if !self.has(item) {
            operations.puts.push(*item);
            if !self.has_key(&item.key()) {
                adds.count(&item.key());
            }
        }
        self.settled.insert(item.key());
    }

    /// What nobody accounted for, in the order in which it must go.
    pub(crate) fn leftovers(self) -> Vec<Key> {
        let keys = self.addresses.into_keys().map(Key::Address);
        let keys = keys.chain(self.frontends.into_keys().map(Key::Frontend));
        let keys = keys.chain(self.sources.into_keys().map(Key::Source));
        let keys = keys.chain(self.pools.into_keys().map(Key::Pool));
        let keys = keys.chain(self.members.into_keys().map(Key::Member));
        let keys = keys.chain(self.slots.into_keys().map(Key::Slot));
        keys.filter(|key| !self.settled.contains(key)).collect()
    }

    fn slots_of(&self, number: u32, count: u32) -> Box<[model::Endpoint]> {
        (0..count)
            .map_while(|slot| self.slots.get(&SlotKey { pool: number, slot }))
            .map(|e| model::Endpoint::new(e.address.into(), u16::from_be(e.port_be)))
            .collect()
    }
}

impl Before for Observed {
    fn pool(&mut self, port: &PortPlan, scope: Scope) -> Option<NumberedPool> {
        let candidates = port.frontends.iter().filter_map(|frontend| {
            let found = self.frontends.get(&frontend_key(&frontend.key))?;
            let leads_there = |target| scope_of(target) == scope;
            Some(match frontend.route {
                Route::Same { target, .. } => {
                    [leads_there(target).then_some(found.inside.pool), None]
                }
                Route::BySource { inside, outside } => [
                    leads_there(inside).then_some(found.inside.pool),
                    leads_there(outside).then_some(found.outside.pool),
                ],
            })
        });
        let usable = |number: &u32| {
            let affinity_secs = port.affinity_secs.unwrap_or(0);
            let same = |pool: &Pool| pool.affinity_secs == affinity_secs;
            self.pools.get(number).is_some_and(same) && !self.claimed_pools.contains(number)
        };
        let number = candidates.flatten().flatten().find(usable)?;
        self.claimed_pools.insert(number);
        let count = self.pools.get(&number).map_or(0, |pool| pool.count);
        Some(NumberedPool { number, slots: self.slots_of(number, count) })
    }

    fn number(&mut self, port: &PortPlan) -> Option<u32> {
        let found = port.frontends.iter().filter_map(|f| self.frontends.get(&frontend_key(&f.key)));
        let number = found.map(|frontend| frontend.number).find(|number| {
            // An address may have been another Service's.
            *number != 0 && !self.claimed_numbers.contains(number)
        })?;
        self.claimed_numbers.insert(number);
        Some(number)
    }
}
