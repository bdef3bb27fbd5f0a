//! Elements of the BPF maps, and how a Service's plan becomes such elements. Pure.

use std::collections::BTreeSet;

use keelson_ebpf_abi::{
    ADDRESS_CLUSTER_IP, Address, ENDPOINT_HERE, ENDPOINT_STRANGER, Endpoint, FRONTEND_HAS_SOURCES,
    FRONTEND_HASHED, FRONTEND_STICKY, Frontend, FrontendKey, MASQUERADE_ALWAYS, MASQUERADE_NEVER,
    MASQUERADE_UNLESS_POD, MEMBER_DRAINING, MEMBER_SERVING, MemberKey, Pool, Route, SlotKey,
    SourceKey, SourcePrefix, VERDICT_DROP, VERDICT_FORWARD, VERDICT_REJECT,
};

use super::numbering::{NumberedPool, NumberedPort, scope_of};
use super::sizes::length;
use crate::model::{self, At, Family, Masquerade, PortPlan, Protocol, Target};

/// Where an element is. In the order in which elements are published; they are taken away in reverse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Key {
    Slot(SlotKey),
    Member(MemberKey),
    Pool(u32),
    Source(SourcePrefix),
    Frontend(FrontendKey),
    Address(Address),
}

/// An element. The order is that of [`Key`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Item {
    Slot(SlotKey, Endpoint),
    Member(MemberKey, u32),
    Pool(u32, Pool),
    Source(SourcePrefix, u32),
    Frontend(FrontendKey, Frontend),
    Address(Address, u32),
}

impl Item {
    pub(crate) fn key(&self) -> Key {
        match *self {
            Item::Slot(key, _) => Key::Slot(key),
            Item::Member(key, _) => Key::Member(key),
            Item::Pool(key, _) => Key::Pool(key),
            Item::Source(key, _) => Key::Source(key),
            Item::Frontend(key, _) => Key::Frontend(key),
            Item::Address(key, _) => Key::Address(key),
        }
    }

    /// Where packets for it go, if that is an address of its own.
    pub(crate) fn destination(&self) -> Option<&Address> {
        match self {
            Item::Frontend(key, _) => Some(&key.address),
            Item::Address(address, _) => Some(address),
            _ => None,
        }
    }
}

impl std::fmt::Display for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Item::Slot(key, to) => write!(f, "slots: {} . {} -> {}", key.pool, key.slot, shown(to)),
            Item::Member(key, flags) => {
                write!(f, "members: {} . {} -> {flags}", key.pool, shown(&key.endpoint))
            }
            Item::Pool(number, pool) => {
                write!(
                    f,
                    "pools: {number} -> {} endpoints, sticky {} s",
                    pool.count, pool.affinity_secs
                )
            }
            Item::Source(key, _) => {
                let address = std::net::IpAddr::from(key.key.address);
                write!(f, "sources: {} . {address}, {} bits", key.key.frontend, key.prefix_len)
            }
            Item::Frontend(key, to) => {
                let (address, port) =
                    (std::net::IpAddr::from(key.address), u16::from_be(key.port_be));
                write!(f, "frontends: {address} . {port} . {} -> ", key.protocol)?;
                write!(f, "inside {:?}, outside {:?}", to.inside, to.outside)
            }
            Item::Address(address, flags) => {
                write!(f, "addresses: {} -> {flags}", std::net::IpAddr::from(*address))
            }
        }
    }
}

fn shown(endpoint: &Endpoint) -> model::Endpoint {
    model::Endpoint::new(endpoint.address.into(), u16::from_be(endpoint.port_be))
}

/// What to write and then what to remove, each in the order in which it must happen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Operations {
    pub(crate) puts: Vec<Item>,
    pub(crate) deletes: Vec<Key>,
}

impl Operations {
    pub(crate) fn len(&self) -> usize {
        self.puts.len() + self.deletes.len()
    }

    /// From one sorted list of elements to another.
    pub(crate) fn replace(before: &[Item], after: &[Item]) -> Operations {
        let puts =
            after.iter().filter(|item| before.binary_search(item).is_err()).copied().collect();
        let kept = |key: &Key| after.binary_search_by_key(key, Item::key).is_ok();
        let deletes = before.iter().rev().map(Item::key).filter(|key| !kept(key)).collect();
        Operations { puts, deletes }
    }
}

/// The key that a packet to that frontend carries.
pub(crate) fn frontend_key(key: &model::FrontendKey) -> FrontendKey {
    let address = match key.at {
        At::Address(address) => address.into(),
        At::NodePort(Family::V4) => Address::ANY4,
        At::NodePort(Family::V6) => Address::ANY6,
    };
    FrontendKey { address, port_be: key.port.to_be(), protocol: key.protocol as u8, zero: 0 }
}

/// A ClusterIP whose other ports are refused.
pub(crate) fn guard_item(address: std::net::IpAddr) -> Item {
    Item::Address(address.into(), ADDRESS_CLUSTER_IP)
}

/// All elements of a Service port.
pub(crate) fn items_of(plan: &PortPlan, numbers: &NumberedPort, out: &mut Vec<Item>) {
    for frontend in &plan.frontends {
        let (inside, outside) = routes(frontend.route, numbers);
        let mut flags = if frontend.sources.is_some() { FRONTEND_HAS_SOURCES } else { 0 };
        if plan.affinity_secs.is_some() {
            flags |= FRONTEND_STICKY;
        }
        if numbers.hashed {
            flags |= FRONTEND_HASHED;
        }
        let value = Frontend { inside, outside, number: numbers.number, flags };
        out.push(Item::Frontend(frontend_key(&frontend.key), value));
        for range in frontend.sources.iter().flatten() {
            let key = SourceKey { frontend: numbers.number, address: range.network().into() };
            let prefix_len = 32 + prefix_len(range);
            out.push(Item::Source(SourcePrefix { prefix_len, key }, 1));
        }
    }
    for pool in [&numbers.cluster, &numbers.local].into_iter().flatten() {
        pool_items(plan, pool, out);
    }
}

/// The length of a range's prefix among the 128 bits of an [`Address`].
pub(crate) fn prefix_len(range: &ipnetwork::IpNetwork) -> u32 {
    u32::from(range.prefix()) + if range.is_ipv4() { 96 } else { 0 }
}

fn pool_items(plan: &PortPlan, pool: &NumberedPool, out: &mut Vec<Item>) {
    let affinity_secs = plan.affinity_secs.unwrap_or(0);
    let count = length(pool.slots.len());
    out.push(Item::Pool(pool.number, Pool { count, affinity_secs }));
    let of = |endpoint: &model::Endpoint, flags| Endpoint {
        address: endpoint.address.into(),
        port_be: endpoint.port.to_be(),
        flags,
    };
    for (slot, endpoint) in (0u32..).zip(&pool.slots) {
        let mut flags = 0;
        if plan.here.contains(&endpoint.address) {
            flags |= ENDPOINT_HERE;
        }
        if plan.strangers.contains(&endpoint.address) {
            flags |= ENDPOINT_STRANGER;
        }
        out.push(Item::Slot(SlotKey { pool: pool.number, slot }, of(endpoint, flags)));
    }
    if plan.protocol != Protocol::Udp && affinity_secs == 0 {
        return;
    }
    let member = |endpoint| MemberKey { pool: pool.number, endpoint: of(endpoint, 0) };
    // An endpoint may have many slots.
    let serving: BTreeSet<&model::Endpoint> = pool.slots.iter().collect();
    out.extend(serving.iter().map(|e| Item::Member(member(e), MEMBER_SERVING)));
    let draining = plan.draining.iter().filter(|endpoint| !serving.contains(endpoint));
    out.extend(draining.map(|e| Item::Member(member(e), MEMBER_DRAINING)));
}

fn routes(route: model::Route, numbers: &NumberedPort) -> (Route, Route) {
    let to = |target, masquerade| {
        let verdict = match target {
            Target::Forward(_) => VERDICT_FORWARD,
            Target::Reject => VERDICT_REJECT,
            Target::Drop => VERDICT_DROP,
        };
        let pool = numbers.pool(scope_of(target));
        Route { pool: pool.map_or(0, |pool| pool.number), verdict, masquerade, zero: 0 }
    };
    match route {
        model::Route::Same { target, masquerade } => {
            let masquerade = match masquerade {
                Masquerade::Never => MASQUERADE_NEVER,
                Masquerade::UnlessPod => MASQUERADE_UNLESS_POD,
                Masquerade::Always => MASQUERADE_ALWAYS,
            };
            let route = to(target, masquerade);
            (route, route)
        }
        model::Route::BySource { inside, outside } => {
            (to(inside, MASQUERADE_UNLESS_POD), to(outside, MASQUERADE_NEVER))
        }
    }
}
