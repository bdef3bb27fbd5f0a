//! Translations of the packet at hand: kept alive, claimed.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use keelson_ebpf::flow::{self, Seen};
use keelson_ebpf_abi::{Flow, Tuple};

use crate::maps::{Flows, Scratch};

pub use keelson_ebpf::flow::{find, now};

/// Whether the packet at hand belongs to the flow, whose result is `scratch.to`.
#[inline(always)]
pub fn is_valid(flow: &Flow, scratch: &Scratch, now_ns: u64) -> bool {
    flow::is_valid(flow, &scratch.to, scratch.packet.signs, now_ns)
}

/// Notes that the packet at hand came by, in both translations of the pair.
#[inline(always)]
pub fn note(flow: &mut Flow, scratch: &mut Scratch, now_ns: u64, theirs: &'static Flows) {
    let Scratch { packet, to, opposite, flow: room, .. } = scratch;
    let seen = Seen { tuple: &packet.tuple, to, signs: packet.signs };
    flow::note(flow, seen, (opposite, room), now_ns, theirs);
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
