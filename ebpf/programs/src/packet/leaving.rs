//! What leaves by an interface: it gets the source that its receiver expects. What the node itself sends to a Service
//! gets its destination here as well.

use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS};
use keelson_ebpf::filter;
use keelson_ebpf_abi::{
    Address, EVENT_MASQUERADED, FLOW_MASQUERADE_SOON, FLOW_TO_ENDPOINT, HOOK_EGRESS, SIGN_START,
    Tuple,
};

use crate::answer::refuse;
use crate::glance::glance;
use crate::maps::{FLOWS_IN, FLOWS_OUT, Scratch, scratch};
use crate::open::{self, Opened, Sender};
use crate::parse::{Kind, parse, parse_transport};
use crate::rewrite::translate;
use crate::verdict::{PASS, dropped};
use crate::{events, flow, fragment, icmp, masquerade, own};

#[inline(always)]
pub fn handle(skb: *mut __sk_buff) -> i32 {
    if glance(skb).is_some_and(|packet| !may_matter(skb, &packet.source, &packet.destination)) {
        return PASS;
    }
    let Some(scratch) = scratch() else { return PASS };
    scratch.hook = HOOK_EGRESS;
    scratch.flow.frontend = 0;
    let kind = parse(skb, &mut scratch.packet);
    let Tuple { source, destination, .. } = &scratch.packet.tuple;
    if !may_matter(skb, source, destination) && kind != Kind::Icmp {
        return PASS;
    }
    match kind {
        Kind::Ports => with_ports(skb, scratch),
        Kind::LaterFragment => fragment::later(skb, scratch, &FLOWS_OUT),
        Kind::Icmp => icmp::leaving(skb, scratch),
        Kind::Other => PASS,
    }
}

/// Whether it may be of a client's connection, one way or the other, or of one that the node has made or makes.
#[inline(always)]
fn may_matter(skb: *mut __sk_buff, source: &Address, destination: &Address) -> bool {
    filter::may_be_client(destination)
        || filter::may_be_client(source)
        || is_own(skb) && filter::may_be_served(destination)
}

/// Whether the node itself has made it.
#[inline(always)]
fn is_own(skb: *mut __sk_buff) -> bool {
    // SAFETY: a field of the context.
    unsafe { (*skb).ingress_ifindex == 0 }
}

#[inline(always)]
fn with_ports(skb: *mut __sk_buff, scratch: &mut Scratch) -> i32 {
    if !parse_transport(skb, &mut scratch.packet) {
        return PASS;
    }
    if let Some(flow) = flow::find(&FLOWS_OUT, &scratch.packet.tuple) {
        let now = flow::now();
        scratch.to.set(&flow.to);
        scratch.flow.frontend = flow.frontend;
        if flow::is_valid(flow, scratch, now) {
            if flow.role == FLOW_MASQUERADE_SOON {
                let reason = masquerade::choose(skb, scratch, flow, now);
                if reason != masquerade::CHOSEN {
                    return dropped(skb, scratch, reason);
                }
                events::tell(skb, scratch, EVENT_MASQUERADED, 0);
            } else {
                flow::note(flow, scratch, now, &FLOWS_IN);
            }
            let verdict = translate(skb, scratch, flow.counts_for());
            return if verdict == PASS && flow.role == FLOW_TO_ENDPOINT {
                own::send(flow)
            } else {
                verdict
            };
        }
        if flow.role != FLOW_TO_ENDPOINT {
            // Another CPU may have been faster.
            let _ = FLOWS_OUT.remove(&scratch.packet.tuple);
        }
    }
    if !is_own(skb) || scratch.packet.signs & SIGN_START == 0 {
        return PASS;
    }
    begins_here(skb, scratch)
}

/// The node itself begins a connection, of whatever kind.
#[inline(always)]
fn begins_here(skb: *mut __sk_buff, scratch: &mut Scratch) -> i32 {
    let mut opened = open::decide(skb, scratch, Sender::Node);
    if opened == Opened::TRANSLATE {
        opened = own::connect(skb, scratch);
    }
    open::count(scratch, opened);
    events::tell_opened(skb, scratch, opened);
    match opened {
        Opened::TRANSLATE => {
            let verdict = translate(skb, scratch, scratch.flow.frontend);
            if verdict == PASS { own::send(&scratch.flow) } else { verdict }
        }
        Opened::PASS => PASS,
        Opened::REFUSE => refuse(skb, scratch, BPF_F_INGRESS.into()),
        Opened(reason) => dropped(skb, scratch, reason),
    }
}
