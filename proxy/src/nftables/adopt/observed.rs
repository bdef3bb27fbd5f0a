//! What the kernel's maps hold, and how that compares with what they should.

use std::collections::HashMap;
use std::net::IpAddr;

use keelson_netlink::nft::{ElementFound, Verdict};

use crate::model::{Endpoint, Family, PortPlan};
use crate::nftables::item::{Item, Key, Places, Pool, Val};
use crate::nftables::layout::{Chain, Map, View};
use crate::nftables::transaction::Operations;

/// What the maps hold, apart from those that only depend on the configuration.
#[derive(Default)]
pub(super) struct Observed {
    elements: HashMap<(Family, Map, Key, Option<Key>), Val>,
    /// Sorted, since there are so many of them.
    endpoints: Vec<Slot>,
    /// Allowed sources by frontend: old ranges may overlap new ones and so must go along with them.
    sources: HashMap<(Family, Key), Vec<Item>>,
    pub(super) greatest_pool: u32,
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
    pub(super) fn pool_number(&self, family: Family, (map, key): (Map, Key)) -> Option<u32> {
        match self.elements.get(&(family, map, key, None)) {
            Some(Val::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// Takes the element out: it is accounted for. Returns what must change.
    pub(super) fn settle(&mut self, item: &Item, operations: &mut Operations) {
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

    pub(super) fn remove_other_sources(
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
    pub(super) fn pool(&self, family: Family, number: u32, sticky: bool) -> Pool {
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
            let Ok(at) = found.binary_search_by_key(&place, |slot| slot.place) else { break };
            slots.push(found[at].endpoint);
            of_slots.push(place);
        }
        let places = Some(Places { of_slots: of_slots.into(), next });
        Pool { number, slots: slots.into(), places }
    }

    /// What nobody accounted for.
    pub(super) fn leftovers(self) -> Vec<Item> {
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

impl Observed {
    /// All elements were taken in.
    pub(super) fn finish(&mut self) {
        self.endpoints.sort_unstable();
    }

    pub(super) fn take_in(&mut self, family: Family, map: Map, element: &ElementFound<'_>) {
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
        Map::Pools(..) | Map::Places | Map::PlacesOf => {
            number_at(element.value, 0).map_or(Val::Foreign, Val::Number)
        }
        Map::Frontends(_) | Map::Inside(_) | Map::Outside(_) | Map::Remembering(_) => {
            match element.verdict {
                Some(Verdict::Drop) => Val::Drop,
                Some(Verdict::Goto(name)) => Chain::parse(name).map_or(Val::Foreign, Val::Goto),
                _ => Val::Foreign,
            }
        }
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
pub(super) fn was_sticky(observed: &Observed, port: &PortPlan, map: Map, key: Key) -> Option<u32> {
    let Map::Pools(kind, view) = map else { return None };
    let candidates = match view {
        View::Inside => [Map::Inside(kind), Map::Inside(kind)],
        View::Direct => [Map::Frontends(kind), Map::Outside(kind)],
    };
    candidates.iter().find_map(|verdicts| {
        match observed.elements.get(&(port.family, *verdicts, key, None)) {
            Some(Val::Goto(Chain::Forward(forward))) => forward.sticky_secs,
            Some(Val::Goto(Chain::StickOrToIpvs(sticky))) => Some(sticky.secs),
            _ => None,
        }
    })
}
