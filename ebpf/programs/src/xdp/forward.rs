//! What becomes of a frame.

use aya_ebpf::bindings::xdp_action::XDP_TX;
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::bpf_redirect;
use keelson_ebpf::counters;
use keelson_ebpf::flow::{find, is_valid, note, now, Seen};
use keelson_ebpf::maps::{FLOWS_IN, FLOWS_OUT};
use keelson_ebpf_abi::{
    FLOW_FROM_ENDPOINT, FLOW_MASQUERADE, FLOW_TO_ENDPOINT, FLOW_UNMASQUERADE, Flow, PROTOCOL_TCP,
    SIGN_ACCEPT, SIGN_START, STATE_ANSWERED, XDP_SENDS,
};

use crate::frame::{self, Frame};
use crate::maps::{INTERFACES, Scratch, scratch};
use crate::next_hop::{self, NextHop};
use crate::rewrite::rewrite;

/// Sends the frame on, if that can be done here.
#[inline(always)]
pub fn handle(ctx: *mut xdp_md) -> Option<u32> {
    let scratch = scratch()?;
    let frame = frame::read(ctx, &mut scratch.tuple)?;
    if scratch.tuple.protocol == PROTOCOL_TCP && frame.signs & (SIGN_START | SIGN_ACCEPT) != 0 {
        return None;
    }
    let arriving = find(&FLOWS_IN, &scratch.tuple)?;
    scratch.inside.set(&arriving.to);
    let leaving = find(&FLOWS_OUT, &scratch.inside)?;
    scratch.to.set(&leaving.to);
    let now = now();
    if !went_through(arriving, leaving)
        || !is_valid(arriving, &scratch.inside, frame.signs, now)
        || !is_valid(leaving, &scratch.to, frame.signs, now)
        || !is_for_node(ctx, &frame)
    {
        return None;
    }
    let next = next_hop::find(ctx, &frame, &scratch.inside)?;
    let action = send_to(ctx, &next)?;
    let Scratch { tuple, inside, to, opposite, flow } = scratch;
    let seen = Seen { tuple, to: inside, signs: frame.signs };
    note(arriving, seen, (opposite, flow), now, &FLOWS_OUT);
    let seen = Seen { tuple: inside, to, signs: frame.signs };
    note(leaving, seen, (opposite, flow), now, &FLOWS_IN);
    counters::count(arriving.frontend, |counters| {
        counters.packets += 1;
        counters.bytes += u64::from(frame.length);
    });
    rewrite(&frame, tuple, to, &next);
    Some(action)
}

/// Whether packets of this direction have gone all the way through the node before, past all that may be in between,
/// and have not been changed by anybody else.
#[inline(always)]
fn went_through(arriving: &Flow, leaving: &Flow) -> bool {
    match (arriving.role, leaving.role) {
        // It was chosen when the first packet left.
        (FLOW_TO_ENDPOINT, FLOW_MASQUERADE) => true,
        (FLOW_UNMASQUERADE, FLOW_FROM_ENDPOINT) => leaving.state & STATE_ANSWERED != 0,
        _ => false,
    }
}

/// Whether the frame is not one that only came by.
#[inline(always)]
fn is_for_node(ctx: *mut xdp_md, frame: &Frame) -> bool {
    // SAFETY: a field of the context; the map is not preallocated; the header lies within the frame.
    unsafe {
        let interface = INTERFACES.get((*ctx).ingress_ifindex);
        interface.is_some_and(|interface| same(&interface.link, &(*frame.ethernet).destination))
    }
}

/// Equality without a call to `memcmp`.
#[inline(always)]
fn same(a: &[u8; 6], b: &[u8; 6]) -> bool {
    let mut differs = 0;
    for (a, b) in a.iter().zip(b) {
        differs |= a ^ b;
    }
    differs == 0
}

/// How the frame gets to the next hop, if it can from here.
#[inline(always)]
fn send_to(ctx: *mut xdp_md, next: &NextHop) -> Option<u32> {
    // SAFETY: a field of the context; the map is not preallocated; the helper has no preconditions.
    unsafe {
        if next.interface == (*ctx).ingress_ifindex {
            return Some(XDP_TX);
        }
        let interface = INTERFACES.get(next.interface)?;
        let can_send = interface.flags & XDP_SENDS != 0;
        can_send.then(|| bpf_redirect(next.interface, 0) as u32)
    }
}
