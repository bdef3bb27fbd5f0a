//! What arrives at an interface: it gets the destination that it is meant for.

use aya_ebpf::bindings::__sk_buff;
use keelson_ebpf::filter;
use keelson_ebpf_abi::{FLOW_TO_ENDPOINT, HOOK_INGRESS, SIGN_START, STATE_TELLS};

use crate::answer::refuse;
use crate::glance::glance;
use crate::maps::{FLOWS_IN, FLOWS_OUT, Scratch, scratch};
use crate::open::{self, Opened, Sender};
use crate::parse::{Kind, parse, parse_transport};
use crate::rewrite::translate;
use crate::verdict::{PASS, dropped};
use crate::{events, flow, fragment, icmp, own, tell, told};

#[inline(always)]
pub fn handle(skb: *mut __sk_buff) -> i32 {
    if glance(skb).is_some_and(|packet| !filter::may_be_served(&packet.destination)) {
        return PASS;
    }
    let Some(scratch) = scratch() else { return PASS };
    scratch.hook = HOOK_INGRESS;
    scratch.flow.frontend = 0;
    let kind = parse(skb, &mut scratch.packet);
    if kind == Kind::Ports {
        let verdict = told::arriving(skb, scratch);
        if verdict != told::NOTHING {
            return verdict;
        }
    }
    if !filter::may_be_served(&scratch.packet.tuple.destination) && kind != Kind::Icmp {
        return PASS;
    }
    match kind {
        Kind::Ports => with_ports(skb, scratch),
        Kind::LaterFragment => fragment::later(skb, scratch, &FLOWS_IN),
        Kind::Icmp => icmp::arriving(skb, scratch),
        Kind::Other => PASS,
    }
}

#[inline(always)]
fn with_ports(skb: *mut __sk_buff, scratch: &mut Scratch) -> i32 {
    if !parse_transport(skb, &mut scratch.packet) {
        return PASS;
    }
    if let Some(flow) = flow::find(&FLOWS_IN, &scratch.packet.tuple) {
        let now = flow::now();
        scratch.to.set(&flow.to);
        scratch.flow.frontend = flow.frontend;
        if flow::is_valid(flow, scratch, now) {
            flow::note(flow, scratch, now, &FLOWS_OUT);
            let verdict = translate(skb, scratch, flow.counts_for());
            if verdict == PASS && flow.node_interface != 0 {
                return own::receive(skb, scratch, flow);
            }
            return tell_if_wanted(skb, scratch, verdict, flow.state);
        }
        if flow.role != FLOW_TO_ENDPOINT {
            // Another CPU may have been faster.
            let _ = FLOWS_IN.remove(&scratch.packet.tuple);
        }
    }
    let mut opened = open::decide(skb, scratch, Sender::Other);
    if opened == Opened::TRANSLATE {
        opened = open::connect(scratch);
    }
    open::count(scratch, opened);
    events::tell_opened(skb, scratch, opened);
    match opened {
        Opened::TRANSLATE => {
            let verdict = translate(skb, scratch, scratch.flow.frontend);
            tell_if_wanted(skb, scratch, verdict, scratch.flow.state)
        }
        Opened::PASS => PASS,
        Opened::REFUSE => refuse(skb, scratch, 0),
        Opened(reason) => dropped(skb, scratch, reason),
    }
}

/// `state` is that of the connection, whose packet was translated if `verdict` is [`PASS`].
#[inline(always)]
fn tell_if_wanted(skb: *mut __sk_buff, scratch: &Scratch, verdict: i32, state: u8) -> i32 {
    let begins = scratch.packet.signs & SIGN_START != 0;
    if verdict == PASS && begins && state & STATE_TELLS != 0 {
        tell::tell(skb, scratch)
    } else {
        verdict
    }
}
