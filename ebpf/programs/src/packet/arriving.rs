//! What arrives at an interface: it gets the destination that it is meant for.

use aya_ebpf::bindings::__sk_buff;
use keelson_ebpf::{counters, endpoint};
use keelson_ebpf_abi::{DROP_FAILED, Endpoint, FLOW_TO_ENDPOINT, Flow, PROTOCOL_UDP};

use crate::answer::refuse;
use crate::flow;
use crate::maps::{FLOWS_IN, FLOWS_OUT, Scratch, scratch};
use crate::open::{self, Opened};
use crate::parse::{Kind, parse};
use crate::rewrite::{network_offset, rewrite};
use crate::verdict::{PASS, dropped};

#[inline(always)]
pub fn handle(skb: *mut __sk_buff) -> i32 {
    let Some(scratch) = scratch() else { return PASS };
    match parse(skb, &mut scratch.packet) {
        Kind::Ports => with_ports(skb, scratch),
        _ => PASS,
    }
}

#[inline(always)]
fn with_ports(skb: *mut __sk_buff, scratch: &mut Scratch) -> i32 {
    let now = flow::now();
    if let Some(flow) = flow::find(&FLOWS_IN, &scratch.packet.tuple) {
        scratch.to = flow.to;
        if is_valid(flow, scratch, now) {
            let frontend = flow.frontend;
            flow::note(flow, scratch, now, &FLOWS_OUT);
            return translate(skb, scratch, frontend);
        }
        if flow.role != FLOW_TO_ENDPOINT {
            // Without room for it a removal cannot fail; another CPU may have been faster.
            let _ = FLOWS_IN.remove(&scratch.packet.tuple);
        }
    }
    match open::arriving(skb, scratch, now) {
        Opened::TRANSLATE => translate(skb, scratch, scratch.flow.frontend),
        Opened::PASS => PASS,
        Opened::REFUSE => refuse(skb, scratch, 0),
        Opened(reason) => dropped(reason),
    }
}

/// Whether the flow is still what the packet belongs to.
#[inline(always)]
fn is_valid(flow: &Flow, scratch: &Scratch, now: u64) -> bool {
    if flow::begins_another(flow, scratch.packet.signs, now) {
        return false;
    }
    if flow.to.protocol != PROTOCOL_UDP || flow.role != FLOW_TO_ENDPOINT {
        return true;
    }
    let to = &scratch.to;
    let endpoint = Endpoint { address: to.destination, port_be: to.destination_port_be, flags: 0 };
    endpoint::membership(flow.pool, &endpoint) != 0
}

#[inline(always)]
pub fn translate(skb: *mut __sk_buff, scratch: &Scratch, frontend: u32) -> i32 {
    let network = network_offset(skb);
    if rewrite(skb, network, &scratch.packet, &scratch.to).is_err() {
        return dropped(DROP_FAILED);
    }
    // SAFETY: fields of the context.
    let (length, segments) = unsafe { ((*skb).len, (*skb).gso_segs) };
    counters::count(frontend, |counters| {
        counters.packets += u64::from(if segments == 0 { 1 } else { segments });
        counters.bytes += u64::from(length - network);
    });
    PASS
}
