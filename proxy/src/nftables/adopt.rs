//! Start and repair: reads the table, keeps what is right, mends what is not.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use keelson_netlink::nft::{Batch, ElementFound, NftError, SetFound, Verdict};

use super::item::{Item, Key, Places, Pool, Pools, Val, items_of, merged, pool_items};
use super::layout::{Chain, Map, STAMP, TABLE, stamps_of};
use super::transaction::Operations;
use super::{Nftables, NftablesConfig, NftablesError, Pending, Programmed, hairpin_item};
use crate::backend::Applied;
use crate::diff::Plans;
use crate::model::{Endpoint, Family, PortPlan, Scope, ServicePlan};

/// What the maps hold, apart from those that only depend on the configuration.
#[derive(Default)]
struct Observed {
    elements: HashMap<(Family, Map, Key, Option<Key>), Val>,
    /// Sorted, since there are so many of them.
    endpoints: Vec<Slot>,
    /// Allowed sources by frontend: old ranges may overlap new ones and so must go along with them.
    sources: HashMap<(Family, Key), Vec<Item>>,
    greatest_pool: u32,
}

/// An element of the endpoint map.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Slot {
    family: Family,
    pool: u32,
    place: u32,
    endpoint: Endpoint,
    settled: bool,
}

impl Observed {
    fn pool_number(&self, family: Family, (map, key): (Map, Key)) -> Option<u32> {
        match self.elements.get(&(family, map, key, None)) {
            Some(Val::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// Takes the element out: it is accounted for. Returns what must change.
    fn settle(&mut self, item: &Item, operations: &mut Operations) {
        let found = match (item.map, slot_of(item)) {
            (Map::Endpoints, Some((pool, place))) => {
                self.find(item.family, pool, place).map(|slot| {
                    slot.settled = true;
                    Val::Endpoint(slot.endpoint)
                })
            }
            _ => self.elements.remove(&(item.family, item.map, item.key, item.last)),
        };
        match found {
            Some(val) if val == item.val => {}
            Some(val) => {
                operations.deletes.push(Item { val, ..*item });
                operations.adds.push(*item);
            }
            None => operations.adds.push(*item),
        }
    }

    fn remove_other_sources(
        &mut self,
        restricted: &Item,
        wanted: &[Item],
        operations: &mut Operations,
    ) {
        let old = self.sources.remove(&(restricted.family, restricted.key)).unwrap_or_default();
        for item in old.into_iter().filter(|item| !wanted.contains(item)) {
            self.elements.remove(&(item.family, item.map, item.key, item.last));
            operations.deletes.push(item);
        }
    }

    fn find(&mut self, family: Family, pool: u32, place: u32) -> Option<&mut Slot> {
        let wanted = (family, pool, place);
        let index =
            self.endpoints.binary_search_by_key(&wanted, |s| (s.family, s.pool, s.place)).ok()?;
        self.endpoints.get_mut(index)
    }

    /// The pool as the kernel has it.
    fn pool(&self, family: Family, number: u32, sticky: bool) -> Pool {
        let start = self.endpoints.partition_point(|s| (s.family, s.pool) < (family, number));
        let found: Vec<&Slot> = self.endpoints[start..]
            .iter()
            .take_while(|s| (s.family, s.pool) == (family, number))
            .collect();
        let next = found.last().map_or(0, |slot| slot.place.wrapping_add(1));
        if !sticky {
            let slots = found.iter().map(|slot| slot.endpoint).collect();
            return Pool { number, slots, places: None };
        }
        let (mut slots, mut of_slots) = (Vec::new(), Vec::new());
        for slot in 0.. {
            let key = Key::new().number(number).number(slot);
            let place = match self.elements.get(&(family, Map::Places, key, None)) {
                Some(Val::Number(place)) => *place,
                _ => break,
            };
            let Some(at) = found.iter().find(|found| found.place == place) else { break };
            slots.push(at.endpoint);
            of_slots.push(place);
        }
        let places = Some(Places { of_slots: of_slots.into(), next });
        Pool { number, slots: slots.into(), places }
    }

    /// What nobody accounted for.
    fn leftovers(self) -> Vec<Item> {
        let elements = self.elements.into_iter().map(|((family, map, key, last), val)| Item {
            family,
            map,
            key,
            last,
            val,
        });
        let slots = self.endpoints.into_iter().filter(|slot| !slot.settled).map(|slot| {
            let key = Key::new().number(slot.pool).number(slot.place);
            let val = Val::Endpoint(slot.endpoint);
            Item { family: slot.family, map: Map::Endpoints, key, last: None, val }
        });
        elements.chain(slots).collect()
    }
}

impl Nftables {
    /// One attempt to make the kernel's table equal to the plans.
    pub(super) fn adopt_once(&mut self, plans: &Plans) -> Result<Applied, NftablesError> {
        let repairs = self.repair_structure()?;
        let mut observed = self.observe()?;
        self.programmed.clear();
        self.hairpin.clear();
        self.next_pool = observed.greatest_pool.wrapping_add(1).max(1);
        let mut claimed = HashSet::new();
        let mut waiting = Vec::new();
        let mut applied = Applied { operations: repairs, ..Applied::default() };
        let mut names: Vec<_> = plans.keys().collect();
        names.sort_unstable();
        for service in names {
            let plan = &plans[service];
            let pools = self.recognise_pools(plan, &observed, &mut claimed);
            let mut items = Vec::new();
            for (port, pools) in plan.ports.iter().zip(&pools) {
                items_of(port, pools, &mut items);
            }
            let mut operations = Operations::default();
            for address in plan.ports.iter().flat_map(|port| &port.here) {
                let count = self.hairpin.entry(*address).or_default();
                *count += 1;
                if *count == 1 {
                    items.push(hairpin_item(*address));
                }
            }
            for item in &items {
                observed.settle(item, &mut operations);
            }
            for item in items.iter().filter(|item| item.map == Map::Restricted) {
                observed.remove_other_sources(item, &items, &mut operations);
            }
            let after = Some(Programmed { plan: Arc::clone(plan), pools });
            waiting.push(Pending { service: service.clone(), before: None, after, operations });
            self.commit_if_full(&mut waiting, &mut applied)?;
        }
        self.commit_all(&mut waiting, &mut applied)?;
        applied.operations += self.delete_all(observed.leftovers())?;
        Ok(applied)
    }

    /// Numbers and slots as the kernel has them, where the pool can be recognised by its frontends.
    fn recognise_pools(
        &mut self,
        plan: &ServicePlan,
        observed: &Observed,
        claimed: &mut HashSet<u32>,
    ) -> Box<[Pools]> {
        plan.ports
            .iter()
            .map(|port| {
                let mut recognise = |scope| self.recognise_pool(port, scope, observed, claimed);
                Pools { cluster: recognise(Scope::Cluster), local: recognise(Scope::Local) }
            })
            .collect()
    }

    fn recognise_pool(
        &mut self,
        port: &PortPlan,
        scope: Scope,
        observed: &Observed,
        claimed: &mut HashSet<u32>,
    ) -> Option<Pool> {
        let wanted = port.pool(scope);
        if wanted.is_empty() {
            return None;
        }
        let number = pool_items(port, scope)
            .filter(|(map, key)| was_sticky(observed, port, *map, *key) == port.affinity_secs)
            .filter_map(|item| observed.pool_number(port.family, item))
            .find(|number| !claimed.contains(number));
        let found = match number {
            Some(number) => observed.pool(port.family, number, port.affinity_secs.is_some()),
            None => self.new_pool(port),
        };
        claimed.insert(found.number);
        Some(found.with(wanted))
    }

    fn observe(&mut self) -> Result<Observed, NftablesError> {
        const ATTEMPTS: u32 = 20;
        for _ in 0..ATTEMPTS {
            match self.try_observe() {
                // Somebody changed some table meanwhile: what was read may be half old, half new.
                Err(NftError::Interrupted) => {}
                Ok(observed) => return Ok(observed),
                Err(error) => return Err(NftablesError::Observe(error)),
            }
        }
        Err(NftablesError::Observe(NftError::Interrupted))
    }

    fn try_observe(&mut self) -> Result<Observed, NftError> {
        let before = self.nft.generation()?;
        let mut observed = Observed::default();
        let programmed = |map: &Map| !matches!(map, Map::ClusterCidrs | Map::NodePortAddresses);
        for family in Family::BOTH {
            for map in Map::all().filter(programmed) {
                self.nft.elements(TABLE, map.name(family), |element| {
                    observed.take_in(family, map, &element);
                })?;
            }
        }
        observed.endpoints.sort_unstable();
        if self.nft.generation()? == before { Ok(observed) } else { Err(NftError::Interrupted) }
    }

    /// Makes sure that table, maps, chains and rules are there and as this version wants them.
    fn repair_structure(&mut self) -> Result<usize, NftablesError> {
        let observe = NftablesError::Observe;
        let found = self.nft.table(TABLE).map_err(observe)?;
        let mut batch = Batch::new();
        self.chains.clear();
        let usable = match &found {
            Some(table) => table.stamp.as_deref() == Some(STAMP) && self.maps_fit()?,
            None => false,
        };
        if !usable {
            if found.is_some() {
                tracing::warn!("Replacing the table of another version");
                batch.delete_table(TABLE);
            }
            batch.create_table(TABLE, STAMP);
        }
        self.repair_maps(&mut batch, usable)?;
        let chains = self.repair_chains(&mut batch, usable)?;
        let operations = batch.operations();
        self.send(batch)?;
        self.chains = chains;
        Ok(operations)
    }

    fn maps_fit(&mut self) -> Result<bool, NftablesError> {
        let found = self.nft.sets(TABLE).map_err(NftablesError::Observe)?;
        let fits = |set: &SetFound| match described(&set.name) {
            Some(wanted) => wanted == (set.flags, set.key_len),
            None => true,
        };
        Ok(found.iter().all(fits))
    }

    fn repair_maps(&mut self, batch: &mut Batch, usable: bool) -> Result<(), NftablesError> {
        let found = match usable {
            true => self.nft.sets(TABLE).map_err(NftablesError::Observe)?,
            false => Vec::new(),
        };
        for family in Family::BOTH {
            for map in Map::all() {
                let name = map.name(family);
                let exists = found.iter().any(|set| set.name == name);
                if !exists {
                    map.describe(family, |set| batch.add_set(TABLE, set));
                }
                let wanted = match map {
                    Map::ClusterCidrs => keys(&self.config.cluster_cidrs, family),
                    Map::NodePortAddresses => node_port_ranges(&self.config, family),
                    _ => continue,
                };
                if exists && self.ranges(name)? == boundaries(&wanted) {
                    continue;
                }
                if exists {
                    batch.flush_set(TABLE, name);
                }
                let ranges = wanted.iter().map(|(a, b)| (a.as_bytes(), b.as_bytes()));
                if !wanted.is_empty() {
                    batch.add_ranges(TABLE, name, ranges);
                }
            }
        }
        Ok(())
    }

    /// The boundaries that a map of ranges has: key, and whether a range ends there.
    fn ranges(&mut self, name: &str) -> Result<Vec<(Vec<u8>, bool)>, NftablesError> {
        let mut found = Vec::new();
        let visit = |e: ElementFound<'_>| found.push((e.key.to_vec(), e.ends_range));
        self.nft.elements(TABLE, name, visit).map_err(NftablesError::Observe)?;
        found.sort();
        Ok(found)
    }

    fn repair_chains(
        &mut self,
        batch: &mut Batch,
        usable: bool,
    ) -> Result<HashSet<Chain>, NftablesError> {
        let mark = self.config.mark();
        let mut found: HashMap<String, Vec<Option<Vec<u8>>>> = HashMap::new();
        if usable {
            for chain in self.nft.chains(TABLE).map_err(NftablesError::Observe)? {
                found.insert(chain.name, Vec::new());
            }
            for rule in self.nft.rules(TABLE).map_err(NftablesError::Observe)? {
                found.entry(rule.chain).or_default().push(rule.stamp);
            }
        }
        let mut chains: HashSet<Chain> =
            found.keys().filter_map(|name| Chain::parse(name)).collect();
        // In the order in which they may refer to each other.
        let fixed: Vec<Chain> = Chain::fixed().collect();
        let forwarding = chains.iter().filter(|chain| !fixed.contains(chain)).copied();
        let all: Vec<Chain> = forwarding.chain(fixed.iter().copied()).collect();
        let missing = |chain: &&Chain| !found.contains_key(&chain.to_string());
        for chain in all.iter().filter(missing) {
            batch.add_chain(TABLE, &chain.to_string(), chain.base());
        }
        for chain in &all {
            let name = chain.to_string();
            let wanted = stamps_of(*chain, mark).into_iter().map(Some).collect::<Vec<_>>();
            match found.get(&name) {
                Some(rules) if *rules == wanted => continue,
                Some(rules) if !rules.is_empty() => batch.flush_chain(TABLE, &name),
                _ => {}
            }
            for rule in chain.rules(mark) {
                batch.add_rule(TABLE, &name, &rule);
            }
        }
        chains.extend(fixed);
        Ok(chains)
    }

    fn delete_all(&mut self, items: Vec<Item>) -> Result<usize, NftablesError> {
        let mut operations = 0;
        for chunk in items.chunks(super::OPERATIONS_PER_TRANSACTION) {
            let part = Operations { deletes: chunk.to_vec(), adds: Vec::new() };
            let (batch, _) = super::transaction::encode([&part], &self.chains, self.config.mark());
            operations += batch.operations();
            self.send(batch)?;
        }
        Ok(operations)
    }
}

impl Observed {
    fn take_in(&mut self, family: Family, map: Map, element: &ElementFound<'_>) {
        let key = Key::from_kernel(element.key);
        match map {
            Map::Endpoints => {
                let item = Item { family, map, key, last: None, val: Val::None };
                let (Some((pool, place)), Some(endpoint)) =
                    (slot_of(&item), read_endpoint(family, element.value))
                else {
                    return;
                };
                self.greatest_pool = self.greatest_pool.max(pool);
                self.endpoints.push(Slot { family, pool, place, endpoint, settled: false });
            }
            // The kernel's own: only its numbers must not be given to others.
            Map::Affinity => {
                self.greatest_pool = self.greatest_pool.max(number_at(element.key, 0).unwrap_or(0));
            }
            _ => {
                let val = read_val(map, element);
                if let (Map::Pools(..), Val::Number(number)) = (map, val) {
                    self.greatest_pool = self.greatest_pool.max(number);
                }
                let last = element.last.map(Key::from_kernel);
                if map == Map::Allowed {
                    let width = if family == Family::V4 { 12 } else { 24 };
                    let frontend = element.key.get(..width).unwrap_or(&[]);
                    let of_frontend =
                        self.sources.entry((family, Key::from_kernel(frontend))).or_default();
                    of_frontend.push(Item { family, map, key, last, val });
                }
                self.elements.insert((family, map, key, last), val);
            }
        }
    }
}

fn read_val(map: Map, element: &ElementFound<'_>) -> Val {
    match map {
        Map::Pools(..) | Map::Places => {
            number_at(element.value, 0).map_or(Val::Foreign, Val::Number)
        }
        Map::Frontends(_) | Map::Inside(_) | Map::Outside(_) => match element.verdict {
            Some(Verdict::Drop) => Val::Drop,
            Some(Verdict::Goto(name)) => Chain::parse(name).map_or(Val::Foreign, Val::Goto),
            _ => Val::Foreign,
        },
        _ => Val::None,
    }
}

fn number_at(bytes: &[u8], start: usize) -> Option<u32> {
    bytes.get(start..start + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Pool and place of an element of the endpoint map.
fn slot_of(item: &Item) -> Option<(u32, u32)> {
    Some((number_at(item.key.as_bytes(), 0)?, number_at(item.key.as_bytes(), 4)?))
}

fn read_endpoint(family: Family, value: &[u8]) -> Option<Endpoint> {
    let width = if family == Family::V4 { 4 } else { 16 };
    let (address, port) = (value.get(..width)?, value.get(width..width + 2)?);
    let address = match family {
        Family::V4 => IpAddr::from(<[u8; 4]>::try_from(address).ok()?),
        Family::V6 => IpAddr::from(<[u8; 16]>::try_from(address).ok()?),
    };
    Some(Endpoint::new(address, u16::from_be_bytes([port[0], port[1]])))
}

/// The affinity that the kernel has for a frontend, by the chain that it goes to.
fn was_sticky(observed: &Observed, port: &PortPlan, map: Map, key: Key) -> Option<u32> {
    let Map::Pools(kind, view) = map else { return None };
    let candidates = match view {
        super::layout::View::Inside => [Map::Inside(kind), Map::Inside(kind)],
        super::layout::View::Direct => [Map::Frontends(kind), Map::Outside(kind)],
    };
    candidates.iter().find_map(|verdicts| {
        match observed.elements.get(&(port.family, *verdicts, key, None)) {
            Some(Val::Goto(Chain::Forward(forward))) => forward.sticky_secs,
            _ => None,
        }
    })
}

fn described(name: &str) -> Option<(u32, u32)> {
    Family::BOTH.into_iter().find_map(|family| {
        let map = Map::all().find(|map| map.name(family) == name)?;
        Some(map.describe(family, |set| set.expected()))
    })
}

fn keys(ranges: &[IpNetwork], family: Family) -> Vec<(Key, Key)> {
    let of_family: Vec<IpNetwork> =
        ranges.iter().filter(|range| range.is_ipv4() == (family == Family::V4)).copied().collect();
    let key = |address| Key::new().address(address);
    merged(&of_family).into_iter().map(|(first, last)| (key(first), key(last))).collect()
}

/// In a family that the configuration does not mention, all addresses serve node ports.
fn node_port_ranges(config: &NftablesConfig, family: Family) -> Vec<(Key, Key)> {
    let wanted = keys(&config.node_port_ranges, family);
    if !wanted.is_empty() {
        return wanted;
    }
    let all = match family {
        Family::V4 => IpNetwork::from(IpAddr::from([0u8; 4])),
        Family::V6 => IpNetwork::from(IpAddr::from([0u8; 16])),
    };
    let everything = IpNetwork::new(all.ip(), 0).unwrap_or(all);
    keys(&[everything], family)
}

/// How the kernel lists ranges: each start, and each end as the first key after it.
fn boundaries(ranges: &[(Key, Key)]) -> Vec<(Vec<u8>, bool)> {
    let mut found = Vec::new();
    for (first, last) in ranges {
        found.push((first.as_bytes().to_vec(), false));
        let mut end = last.as_bytes().to_vec();
        let carry = end.iter_mut().rev().all(|byte| {
            *byte = byte.wrapping_add(1);
            *byte == 0
        });
        if !carry {
            found.push((end, true));
        }
    }
    found.sort();
    found
}
