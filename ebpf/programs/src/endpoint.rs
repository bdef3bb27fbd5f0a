//! From a pool to one of its endpoints.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use keelson_ebpf_abi::{
    Address, Affinity, AffinityKey, Endpoint, MEMBER_SERVING, MemberKey, Pool, SlotKey,
};

use crate::maps::{AFFINITY, MEMBERS, POOLS, SLOTS};

const NS_PER_SEC: u64 = 1_000_000_000;

/// Chooses an endpoint for a new connection of `client`: the one that it sticks to, or any.
#[inline(always)]
pub fn choose(pool: u32, client: &Address) -> Option<Endpoint> {
    // SAFETY: the helper has no preconditions.
    choose_by(pool, client, unsafe { bpf_get_prandom_u32() })
}

/// Chooses the endpoint that `client` sticks to, or that of the slot which is as far in the list as `pick` is among all
/// numbers.
#[inline(always)]
pub fn choose_by(pool: u32, client: &Address, pick: u32) -> Option<Endpoint> {
    // SAFETY: the map is not preallocated, so an element is freed only after a grace period.
    let Pool { count, affinity_secs } = *unsafe { POOLS.get(pool) }?;
    if affinity_secs == 0 {
        return at(pool, count, pick);
    }
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let key = AffinityKey { pool, client: *client };
    let endpoint = match stuck_to(&key, now, affinity_secs) {
        Some(endpoint) => endpoint,
        None => at(pool, count, pick)?,
    };
    let value = Affinity { endpoint, zero: 0, last_used_ns: now };
    // A full LRU map makes room; when it cannot, this client is not remembered.
    let _ = AFFINITY.insert(key, value, u64::from(BPF_ANY));
    Some(endpoint)
}

/// The endpoint that a client was sent to before, if that was not too long ago and it is still there.
#[inline(always)]
fn stuck_to(key: &AffinityKey, now: u64, secs: u32) -> Option<Endpoint> {
    // SAFETY: a torn read is possible when another CPU writes; the endpoint is checked below.
    let Affinity { endpoint, last_used_ns, .. } = *unsafe { AFFINITY.get(key) }?;
    let fresh = now.saturating_sub(last_used_ns) < u64::from(secs) * NS_PER_SEC;
    (fresh && membership(key.pool, &endpoint) & MEMBER_SERVING != 0).then_some(endpoint)
}

/// `MEMBER_*` of an endpoint in a pool whose members are kept (UDP, affinity); 0 when it is none.
#[inline(always)]
pub fn membership(pool: u32, endpoint: &Endpoint) -> u32 {
    let key = MemberKey { pool, endpoint: Endpoint { flags: 0, ..*endpoint } };
    // SAFETY: as in `choose`.
    unsafe { MEMBERS.get(key) }.copied().unwrap_or(0)
}

#[inline(always)]
fn at(pool: u32, count: u32, pick: u32) -> Option<Endpoint> {
    let slot = u32::try_from((u64::from(pick) * u64::from(count)) >> 32).unwrap_or(0);
    // SAFETY: as in `choose`.
    let at = |slot| unsafe { SLOTS.get(SlotKey { pool, slot }) };
    // The pool can become smaller meanwhile; as long as it has any slot, it has the first.
    at(slot).or_else(|| at(0)).copied()
}
