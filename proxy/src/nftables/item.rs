//! Elements of the maps, and how a Service's plan becomes such elements. Pure.

use std::collections::HashMap;
use std::net::IpAddr;

use super::layout::{Chain, Forward, Kind, Map, Setup, Sticky, View};
use super::ranges::merged;
use crate::diff::place;
use crate::model::{
    At, Endpoint, Family, Frontend, FrontendKey, Masquerade, PortPlan, Route, Scope, Target,
};

const KEY_CAPACITY: usize = 40;

/// A key in the kernel's form: parts padded to four bytes each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    bytes: [u8; KEY_CAPACITY],
    len: u8,
}

impl Key {
    pub(crate) fn new() -> Self {
        Key { bytes: [0; KEY_CAPACITY], len: 0 }
    }

    /// A key as the kernel gave it.
    pub(crate) fn from_kernel(bytes: &[u8]) -> Self {
        Key::new().and(bytes)
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Appends a part. A longer key than any map has is cut and so never matches.
    pub(crate) fn and(mut self, part: &[u8]) -> Self {
        let start = usize::from(self.len);
        let part = &part[..part.len().min(KEY_CAPACITY - start)];
        self.bytes[start..start + part.len()].copy_from_slice(part);
        self.len = u8::try_from((start + part.len()).next_multiple_of(4)).unwrap_or(0);
        self
    }

    pub(crate) fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => self.and(&v4.octets()),
            IpAddr::V6(v6) => self.and(&v6.octets()),
        }
    }

    pub(crate) fn number(self, number: u32) -> Self {
        self.and(&number.to_ne_bytes())
    }

    fn frontend(key: &FrontendKey) -> Self {
        let start = match key.at {
            At::Address(address) => Key::new().address(address),
            At::NodePort(_) => Key::new(),
        };
        start.and(&[key.protocol as u8]).and(&key.port.to_be_bytes())
    }

    pub(crate) fn endpoint(self, endpoint: Endpoint) -> Self {
        self.address(endpoint.address).and(&endpoint.port.to_be_bytes())
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_bytes().fmt(f)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Val {
    None,
    /// A pool number or a place.
    Number(u32),
    Endpoint(Endpoint),
    Goto(Chain),
    Drop,
    /// In the kernel, but nothing that we would put there.
    Foreign,
}

/// An element of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Item {
    pub(crate) family: Family,
    pub(crate) map: Map,
    pub(crate) key: Key,
    /// Last key of a range.
    pub(crate) last: Option<Key>,
    pub(crate) val: Val,
}

impl std::fmt::Display for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: ", self.map.name(self.family))?;
        self.key.as_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        match self.val {
            Val::None => Ok(()),
            Val::Number(number) => write!(f, " -> {number}"),
            Val::Endpoint(endpoint) => write!(f, " -> {endpoint}"),
            Val::Goto(chain) => write!(f, " -> {chain}"),
            Val::Drop => write!(f, " -> drop"),
            Val::Foreign => write!(f, " -> something foreign"),
        }
    }
}

/// A list of endpoints in the kernel: its number and what is in its slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pool {
    pub(crate) number: u32,
    pub(crate) slots: Box<[Endpoint]>,
    /// Where clients stick: the place of each slot's endpoint. An endpoint keeps its place as long as it
    /// lives, and a place is not given to another one.
    pub(crate) places: Option<Places>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Places {
    pub(crate) of_slots: Box<[u32]>,
    pub(crate) next: u32,
}

impl Pool {
    /// The pool with other endpoints; those that stay keep their slots and places.
    pub(crate) fn with(&self, wanted: &[Endpoint]) -> Pool {
        let before: Vec<_> = self.slots.iter().copied().map(Some).collect();
        let slots = place(&before, wanted);
        let places = self.places.as_ref().map(|old| {
            let known: HashMap<&Endpoint, u32> =
                self.slots.iter().zip(old.of_slots.iter().copied()).collect();
            let mut next = old.next;
            let mut place_of = |endpoint| {
                known.get(endpoint).copied().unwrap_or_else(|| {
                    next = next.wrapping_add(1);
                    next.wrapping_sub(1)
                })
            };
            let of_slots = slots.iter().map(&mut place_of).collect();
            Places { of_slots, next }
        });
        Pool { number: self.number, slots: slots.into(), places }
    }

    pub(crate) fn empty(number: u32, sticky: bool) -> Pool {
        Pool { number, slots: Box::default(), places: sticky.then(Places::default) }
    }
}

/// The pools of one Service port, by [`Scope`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pools {
    pub(crate) cluster: Option<Pool>,
    pub(crate) local: Option<Pool>,
}

impl Pools {
    pub(crate) fn get(&self, scope: Scope) -> Option<&Pool> {
        match scope {
            Scope::Cluster => self.cluster.as_ref(),
            Scope::Local => self.local.as_ref(),
        }
    }
}

/// The endpoints that the table itself forwards to; nothing when it needs none of them.
pub(crate) fn wanted_pool<'p>(
    setup: &Setup,
    plan: &'p PortPlan,
    scope: Scope,
) -> Option<&'p [Endpoint]> {
    let wanted = plan.pool(scope);
    let needed = !setup.leaves_to_ipvs() || pool_items(setup, plan, scope).next().is_some();
    (!wanted.is_empty() && needed).then_some(wanted)
}

/// A ClusterIP whose other ports are refused.
pub(crate) fn guard_item(address: IpAddr) -> Item {
    Item {
        family: Family::of(address),
        map: Map::ClusterIps,
        key: Key::new().address(address),
        last: None,
        val: Val::None,
    }
}

/// A pod that may meet itself through a Service.
pub(crate) fn hairpin_item(address: IpAddr) -> Item {
    Item {
        family: Family::of(address),
        map: Map::Hairpin,
        key: Key::new().address(address).address(address),
        last: None,
        val: Val::None,
    }
}

/// All elements of a Service port.
pub(crate) fn items_of(setup: &Setup, plan: &PortPlan, pools: &Pools, out: &mut Vec<Item>) {
    for frontend in &plan.frontends {
        frontend_items(setup, plan, frontend, pools, out);
        if serves_loopback(setup, frontend) {
            loopback_items(plan, frontend, pools, out);
        }
    }
    for pool in [&pools.cluster, &pools.local].into_iter().flatten() {
        let mut push = |map, key, val| {
            out.push(Item { family: plan.family, map, key, last: None, val });
        };
        let numbered = |second| Key::new().number(pool.number).number(second);
        for (slot, endpoint) in (0u32..).zip(&pool.slots) {
            let place = match &pool.places {
                None => slot,
                Some(places) => places.of_slots[slot as usize],
            };
            push(Map::Endpoints, numbered(place), Val::Endpoint(*endpoint));
            if pool.places.is_some() {
                push(Map::Places, numbered(slot), Val::Number(place));
            }
            if pool.places.is_some() && setup.remembers_for_ipvs(plan) {
                let key = Key::new().number(pool.number).endpoint(*endpoint);
                push(Map::PlacesOf, key, Val::Number(place));
            }
        }
    }
}

/// Where packets to a frontend of some kind go.
struct Course<'p> {
    plan: &'p PortPlan,
    pools: &'p Pools,
    kind: Kind,
}

impl Course<'_> {
    fn verdict(&self, target: Target, view: View, masquerade: Masquerade) -> Val {
        match target {
            Target::Reject => Val::Goto(Chain::Reject),
            Target::Drop => Val::Drop,
            Target::Forward(scope) => match self.pools.get(scope) {
                None => Val::Goto(Chain::Reject),
                Some(pool) => Val::Goto(Chain::Forward(Forward {
                    family: self.plan.family,
                    kind: self.kind,
                    view,
                    masquerade,
                    sticky_secs: self.plan.affinity_secs,
                    size: u32::try_from(pool.slots.len()).unwrap_or(u32::MAX),
                })),
            },
        }
    }

    fn pool(&self, target: Target) -> Option<Val> {
        match target {
            Target::Forward(scope) => self.pools.get(scope).map(|pool| Val::Number(pool.number)),
            Target::Reject | Target::Drop => None,
        }
    }

    fn sticky(&self, masquerade: Masquerade) -> Option<Sticky> {
        let (family, kind) = (self.plan.family, self.kind);
        self.plan.affinity_secs.map(|secs| Sticky { family, kind, masquerade, secs })
    }

    /// As [`Course::verdict`] and [`Course::pool`], where IPVS may do it.
    fn direct(&self, setup: &Setup, target: Target, masquerade: Masquerade) -> (Val, Option<Val>) {
        match target {
            Target::Forward(_) if setup.leaves_to_ipvs() => match self.sticky(masquerade) {
                Some(sticky) => (Val::Goto(Chain::StickOrToIpvs(sticky)), self.pool(target)),
                None => (Val::Goto(Chain::ToIpvs(self.plan.family, masquerade)), None),
            },
            _ => (self.verdict(target, View::Direct, masquerade), self.pool(target)),
        }
    }
}

fn frontend_items(
    setup: &Setup,
    plan: &PortPlan,
    frontend: &Frontend,
    pools: &Pools,
    out: &mut Vec<Item>,
) {
    let (family, key) = (plan.family, Key::frontend(&frontend.key));
    let kind = kind_of(&frontend.key);
    let course = Course { plan, pools, kind };
    let mut push = |map, val| out.push(Item { family, map, key, last: None, val });
    match frontend.route {
        Route::Same { target, masquerade } => {
            let (verdict, pool) = course.direct(setup, target, masquerade);
            push(Map::Frontends(kind), verdict);
            if let Some(number) = pool {
                push(Map::Pools(kind, View::Direct), number);
            }
        }
        Route::BySource { inside, outside } => {
            let (verdict, pool) = course.direct(setup, outside, Masquerade::Never);
            push(Map::Frontends(kind), Val::Goto(Chain::BySource(family, kind)));
            push(Map::Inside(kind), course.verdict(inside, View::Inside, Masquerade::Never));
            push(Map::Outside(kind), verdict);
            if let Some(number) = course.pool(inside) {
                push(Map::Pools(kind, View::Inside), number);
            }
            if let Some(number) = pool {
                push(Map::Pools(kind, View::Direct), number);
            }
        }
    }
    let forwards = |target| matches!(target, Target::Forward(_));
    let (Route::Same { target, .. } | Route::BySource { outside: target, .. }) = frontend.route;
    if setup.leaves_to_ipvs()
        && forwards(target)
        && let Some(sticky) = course.sticky(Masquerade::Never)
    {
        push(Map::Remembering(kind), Val::Goto(Chain::Remember(sticky)));
    }
    if let Some(sources) = &frontend.sources {
        push(Map::Restricted, Val::None);
        for (first, end) in merged(sources) {
            let item = Item {
                family,
                map: Map::Allowed,
                key: key.address(first),
                last: Some(Key::frontend(&frontend.key).address(end)),
                val: Val::None,
            };
            out.push(item);
        }
    }
}

/// 127.0.0.1 can only be reached by the node itself, from 127.0.0.1.
fn loopback_items(plan: &PortPlan, frontend: &Frontend, pools: &Pools, out: &mut Vec<Item>) {
    let (family, key, kind) = (plan.family, Key::frontend(&frontend.key), Kind::Loopback);
    let course = Course { plan, pools, kind };
    let target = loopback_target(frontend);
    let verdict = course.verdict(target, View::Direct, Masquerade::Always);
    let frontends = (Map::Frontends(kind), verdict);
    let pool = course.pool(target).map(|number| (Map::Pools(kind, View::Direct), number));
    out.extend(std::iter::once(frontends).chain(pool).map(|(map, val)| Item {
        family,
        map,
        key,
        last: None,
        val,
    }));
}

fn loopback_target(frontend: &Frontend) -> Target {
    match frontend.route {
        Route::Same { target, .. } => target,
        Route::BySource { inside, .. } => inside,
    }
}

fn serves_loopback(setup: &Setup, frontend: &Frontend) -> bool {
    setup.has_loopback_ports() && frontend.key.at == At::NodePort(Family::V4)
}

pub(crate) fn kind_of(key: &FrontendKey) -> Kind {
    match key.at {
        At::Address(_) => Kind::Address,
        At::NodePort(_) => Kind::NodePort,
    }
}

/// Where a frontend's pool of that scope is looked up: these maps tell its number after a restart.
pub(crate) fn pool_items(
    setup: &Setup,
    plan: &PortPlan,
    scope: Scope,
) -> impl Iterator<Item = (Map, Key)> {
    let pool_less = setup.leaves_to_ipvs() && !setup.remembers_for_ipvs(plan);
    plan.frontends.iter().flat_map(move |frontend| {
        let (kind, key) = (kind_of(&frontend.key), Key::frontend(&frontend.key));
        let wanted = Target::Forward(scope);
        let (direct, inside) = match frontend.route {
            Route::Same { target, .. } => (target == wanted, false),
            Route::BySource { inside, outside } => (outside == wanted, inside == wanted),
        };
        let loopback = serves_loopback(setup, frontend) && loopback_target(frontend) == wanted;
        [
            (direct && !pool_less, Map::Pools(kind, View::Direct)),
            (inside, Map::Pools(kind, View::Inside)),
            (loopback, Map::Pools(Kind::Loopback, View::Direct)),
        ]
        .into_iter()
        .filter_map(move |(used, map)| used.then_some((map, key)))
    })
}
