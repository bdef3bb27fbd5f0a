//! Chooses the address and the port that hide a client.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use keelson_ebpf::maps::INTERFACES;
use keelson_ebpf_abi::{
    Address, DROP_NO_ADDRESS, DROP_NO_PORT, FLOW_MASQUERADE, FLOW_UNMASQUERADE, Flow,
};

use crate::flow::{self, Reuse};
use crate::maps::{FLOWS_IN, Scratch};

/// No reason to drop the packet.
pub const CHOSEN: u32 = u32::MAX;

const ATTEMPTS: u32 = 32;
/// So many are made with ports that the endpoint does not remember.
const PATIENT: u32 = 24;

/// Masquerades the connection that the packet at hand belongs to with the address of the interface that it
/// leaves by. `flow` is its entry in `flows_out`; the choice is in `scratch.to`.
#[inline(never)]
pub fn choose(skb: *mut __sk_buff, scratch: &mut Scratch, flow: &mut Flow, now: u64) -> u32 {
    // SAFETY: a field of the context; the map is not preallocated.
    let Some(interface) = (unsafe { INTERFACES.get((*skb).ifindex) }) else {
        return DROP_NO_ADDRESS;
    };
    let key = scratch.packet.tuple;
    let address = if scratch.packet.is_v4 { interface.address4 } else { interface.address6 };
    if address.is(&Address::ANY6) {
        return DROP_NO_ADDRESS;
    }
    scratch.flow.pool = flow.pool;
    scratch.flow.frontend = flow.frontend;
    scratch.flow.state = flow.state;
    scratch.flow.node_interface = 0;
    scratch.to.source = address;
    scratch.flow.role = FLOW_UNMASQUERADE;
    scratch.flow.last_seen_ns = now;
    scratch.flow.to = key.reversed();
    if !claim_port(scratch) {
        return DROP_NO_PORT;
    }
    // In place, which costs half of entering it anew; it was found a moment ago, so it is nowhere near to be evicted.
    flow.to.set(&scratch.to);
    flow.last_seen_ns = now;
    flow.role = FLOW_MASQUERADE;
    CHOSEN
}

/// Finds a port that no other connection to this endpoint has. A privileged one is kept if that is possible,
/// since some servers ask for such.
#[inline(always)]
fn claim_port(scratch: &mut Scratch) -> bool {
    const PRIVILEGED: u16 = 1024;
    for attempt in 0..ATTEMPTS {
        if attempt > 0 || u16::from_be(scratch.to.source_port_be) >= PRIVILEGED {
            scratch.to.source_port_be = random_port().to_be();
        }
        scratch.opposite = scratch.to.reversed();
        let reuse = if attempt < PATIENT { Reuse::Forgotten } else { Reuse::Over };
        if flow::claim(&FLOWS_IN, scratch, reuse) {
            return true;
        }
    }
    false
}

/// A port that neither the node's own clients get (ip_local_port_range is 32768 to 60999) nor node ports have.
#[inline(always)]
pub fn random_port() -> u16 {
    const LOW: u32 = 1024;
    const LOW_END: u32 = 30_000;
    const HIGH: u32 = 61_000;
    const COUNT: u32 = LOW_END - LOW + (65_536 - HIGH);
    // SAFETY: the helper has no preconditions.
    let random = u64::from(unsafe { bpf_get_prandom_u32() });
    let port = LOW + ((random * u64::from(COUNT)) >> 32) as u32;
    (if port < LOW_END { port } else { port - LOW_END + HIGH }) as u16
}
