//! Translations in the maps: found, kept alive, claimed.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use keelson_ebpf::endpoint;
use keelson_ebpf_abi::{
    Endpoint, FLOW_MASQUERADE_SOON, FLOW_TO_ENDPOINT, Flow, PROTOCOL_UDP, SIGN_ACCEPT, SIGN_START,
    Tuple,
};

use crate::maps::{Flows, Scratch};

#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

/// The translation of the packet at hand.
#[inline(always)]
pub fn find(flows: &'static Flows, key: &Tuple) -> Option<&'static mut Flow> {
    let flow = flows.get_ptr_mut(key)?;
    // SAFETY: elements may be written by other CPUs at the same time, and be evicted and used again. The
    // fields that such a race can mix are those of one connection, or it hits a connection that is evicted.
    Some(unsafe { &mut *flow })
}

/// Whether the packet at hand belongs to the flow, whose result is `scratch.to`. Datagrams leave an endpoint that
/// is gone.
#[inline(always)]
pub fn is_valid(flow: &Flow, scratch: &Scratch, now_ns: u64) -> bool {
    let signs = scratch.packet.signs;
    if signs & (SIGN_START | SIGN_ACCEPT) != 0 && flow.is_over(now_ns) {
        return false;
    }
    let to = &scratch.to;
    if to.protocol != PROTOCOL_UDP || flow.role != FLOW_TO_ENDPOINT {
        return true;
    }
    let endpoint = Endpoint { address: to.destination, port_be: to.destination_port_be, flags: 0 };
    endpoint::membership(flow.pool, &endpoint) != 0
}

/// Notes that the packet at hand came by, in both translations of the pair. So neither is evicted as long
/// as the other is used, and one that was is there again.
#[inline(always)]
pub fn note(flow: &mut Flow, scratch: &mut Scratch, now_ns: u64, theirs: &'static Flows) {
    let state = flow.state_after(scratch.packet.signs);
    if !flow.must_note(state, now_ns) {
        return;
    }
    flow.state = state;
    flow.last_seen_ns = now_ns;
    if flow.role == FLOW_MASQUERADE_SOON {
        return;
    }
    scratch.flow = flow.opposite(&scratch.packet.tuple);
    scratch.opposite = scratch.to.reversed();
    match find(theirs, &scratch.opposite) {
        Some(opposite) if opposite.to.is(&scratch.flow.to) => {
            opposite.state |= state;
            opposite.last_seen_ns = now_ns;
        }
        // Of another connection by now.
        Some(_) => {}
        // It may have been taken away for one that nobody translates.
        None if flow.is_over(now_ns) => {}
        None => {
            // Another CPU may have been faster; without room it is tried again in a second.
            let _ = theirs.insert(&scratch.opposite, &scratch.flow, u64::from(BPF_NOEXIST));
        }
    }
}

/// When the ports of another connection may be taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// When it is over.
    Over,
    /// When the endpoint does not remember it either.
    Forgotten,
}

/// Enters `scratch.flow`, seen now, at `scratch.opposite`, unless another connection still has that.
#[inline(always)]
pub fn claim(flows: &'static Flows, scratch: &Scratch, reuse: Reuse) -> bool {
    let Scratch { opposite, flow, .. } = scratch;
    if flows.insert(opposite, flow, u64::from(BPF_NOEXIST)).is_ok() {
        return true;
    }
    let Some(other) = find(flows, opposite) else { return false };
    let is_free = other.to.is(&flow.to)
        || match reuse {
            Reuse::Over => other.is_over(flow.last_seen_ns),
            Reuse::Forgotten => other.is_forgotten(flow.last_seen_ns),
        };
    is_free && enter(flows, opposite, flow)
}

/// Enters a flow whatever is there.
#[inline(always)]
pub fn enter(flows: &'static Flows, key: &Tuple, flow: &Flow) -> bool {
    flows.insert(key, flow, u64::from(BPF_ANY)).is_ok()
}
