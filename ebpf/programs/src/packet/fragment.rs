//! Pieces of packets. Only the first one carries ports; the others are told by what it had.

use aya_ebpf::bindings::{__sk_buff, BPF_ANY};
use keelson_ebpf::frontend::is_in_service_range;
use keelson_ebpf::maps::ADDRESSES;
use keelson_ebpf_abi::{ADDRESS_CLUSTER_IP, DROP_FRAGMENT, FragmentKey, FragmentPorts};

use crate::flow;
use crate::maps::{FRAGMENTS, Flows, Scratch};
use crate::parse::Packet;
use crate::rewrite::translate;
use crate::verdict::{PASS, dropped};

#[inline(always)]
fn key(packet: &Packet) -> FragmentKey {
    FragmentKey {
        source: packet.tuple.source,
        destination: packet.tuple.destination,
        id: packet.fragment,
        protocol: packet.tuple.protocol,
        zero: [0; 3],
    }
}

/// Remembers the ports of a first piece that is translated.
#[inline(never)]
pub fn remember(packet: &Packet) {
    let ports = FragmentPorts {
        source_port_be: packet.tuple.source_port_be,
        destination_port_be: packet.tuple.destination_port_be,
    };
    // What cannot be remembered is dropped later.
    let _ = FRAGMENTS.insert(key(packet), ports, u64::from(BPF_ANY));
}

/// Translates another piece as the first one was.
#[inline(never)]
pub fn later(skb: *mut __sk_buff, scratch: &mut Scratch, flows: &'static Flows) -> i32 {
    let packet = &mut scratch.packet;
    // SAFETY: a torn read is possible when an element is evicted and used again; then the flow is not found.
    let Some(ports) = (unsafe { FRAGMENTS.get(key(packet)) }) else {
        return unless_to_a_service(skb, scratch);
    };
    packet.tuple.source_port_be = ports.source_port_be;
    packet.tuple.destination_port_be = ports.destination_port_be;
    let Some(flow) = flow::find(flows, &packet.tuple) else {
        return unless_to_a_service(skb, scratch);
    };
    scratch.to.set(&flow.to);
    translate(skb, scratch, flow.counts_for())
}

/// Nobody could do anything with a piece for an address that only Services have.
#[inline(always)]
fn unless_to_a_service(skb: *mut __sk_buff, scratch: &Scratch) -> i32 {
    let to = &scratch.packet.tuple.destination;
    // SAFETY: the map is not preallocated, so an element is freed only after a grace period.
    let flags = unsafe { ADDRESSES.get(to) }.copied().unwrap_or(0);
    if flags & ADDRESS_CLUSTER_IP != 0 || is_in_service_range(to) {
        return dropped(skb, scratch, DROP_FRAGMENT);
    }
    PASS
}
