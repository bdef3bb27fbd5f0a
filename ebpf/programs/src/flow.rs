//! Translations in the maps: found, kept alive.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use keelson_ebpf_abi::{
    Endpoint, FLOW_MASQUERADE_SOON, FLOW_TO_ENDPOINT, Flow, PROTOCOL_UDP, SIGN_ACCEPT, SIGN_START,
    Tuple,
};

use crate::endpoint;
use crate::maps::Flows;

#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

/// The translation of what a packet carries.
#[inline(always)]
pub fn find(flows: &'static Flows, key: &Tuple) -> Option<&'static mut Flow> {
    let flow = flows.get_ptr_mut(key)?;
    // SAFETY: elements may be written by other CPUs at the same time, and be evicted and used again. The
    // fields that such a race can mix are those of one connection, or it hits a connection that is evicted.
    Some(unsafe { &mut *flow })
}

/// Whether a packet with these `SIGN_*` belongs to a flow whose result is `to`. Datagrams leave an endpoint that is
/// gone.
#[inline(always)]
pub fn is_valid(flow: &Flow, to: &Tuple, signs: u8, now_ns: u64) -> bool {
    if signs & (SIGN_START | SIGN_ACCEPT) != 0 && flow.is_over(now_ns) {
        return false;
    }
    if to.protocol != PROTOCOL_UDP || flow.role != FLOW_TO_ENDPOINT {
        return true;
    }
    let endpoint = Endpoint { address: to.destination, port_be: to.destination_port_be, flags: 0 };
    endpoint::membership(flow.pool, &endpoint) != 0
}

/// A packet of a known connection.
#[derive(Clone, Copy)]
pub struct Seen<'p> {
    /// What it carries.
    pub tuple: &'p Tuple,
    /// What it is translated to.
    pub to: &'p Tuple,
    /// `SIGN_*`.
    pub signs: u8,
}

/// Notes that a packet came by, in both translations of the pair. So neither is evicted as long as the other is used,
/// and one that was is there again. `room` is for the opposite translation and its key.
#[inline(always)]
pub fn note(
    flow: &mut Flow,
    seen: Seen<'_>,
    room: (&mut Tuple, &mut Flow),
    now_ns: u64,
    theirs: &'static Flows,
) {
    let state = flow.state_after(seen.signs);
    if !flow.must_note(state, now_ns) {
        return;
    }
    flow.state = state;
    flow.last_seen_ns = now_ns;
    if flow.role == FLOW_MASQUERADE_SOON {
        return;
    }
    let (key, other) = room;
    *other = flow.opposite(seen.tuple);
    *key = seen.to.reversed();
    match find(theirs, key) {
        Some(opposite) if opposite.to.is(&other.to) => {
            opposite.state |= state;
            opposite.last_seen_ns = now_ns;
        }
        // Of another connection by now.
        Some(_) => {}
        // It may have been taken away for one that nobody translates.
        None if flow.is_over(now_ns) => {}
        None => {
            // Another CPU may have been faster; without room it is tried again in a second.
            let _ = theirs.insert(&*key, &*other, u64::from(BPF_NOEXIST));
        }
    }
}
