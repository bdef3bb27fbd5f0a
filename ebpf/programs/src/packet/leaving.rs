//! What leaves by an interface: it gets the source that its receiver expects.

use aya_ebpf::bindings::__sk_buff;
use keelson_ebpf_abi::FLOW_MASQUERADE_SOON;

use crate::arriving::translate;
use crate::flow;
use crate::maps::{FLOWS_IN, FLOWS_OUT, Scratch, scratch};
use crate::masquerade;
use crate::parse::{Kind, parse};
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
    let Some(flow) = flow::find(&FLOWS_OUT, &scratch.packet.tuple) else { return PASS };
    let now = flow::now();
    if flow::begins_another(flow, scratch.packet.signs, now) {
        // Another CPU may have been faster.
        let _ = FLOWS_OUT.remove(&scratch.packet.tuple);
        return PASS;
    }
    let frontend = flow.frontend;
    scratch.to = flow.to;
    if flow.role == FLOW_MASQUERADE_SOON {
        scratch.flow = *flow;
        let reason = masquerade::choose(skb, scratch, now);
        if reason != masquerade::CHOSEN {
            return dropped(reason);
        }
    } else {
        flow::note(flow, scratch, now, &FLOWS_IN);
    }
    translate(skb, scratch, frontend)
}
