//! Packets that the node itself makes, and that were not translated when a socket spoke: of raw sockets, of
//! kernel clients, of programs in namespaces that are exempt.
//!
//! They leave to where the Service's address is routed. There they get the endpoint as destination and are sent
//! out where that is. The answers are sent in again where the node expects the Service's, so that strict reverse
//! path checks see nothing strange.

use core::mem::size_of;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_INGRESS, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup,
};
use aya_ebpf::helpers::{
    bpf_fib_lookup as fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_skb_load_bytes,
};
use keelson_ebpf::filter;
use keelson_ebpf::maps::INTERFACES;
use keelson_ebpf_abi::{
    DROP_FAILED, DROP_NO_ADDRESS, DROP_NO_PORT, DROP_NO_ROUTE, FLOW_TO_ENDPOINT, Flow,
};

use crate::flow;
use crate::maps::{FLOWS_IN, FLOWS_OUT, Scratch};
use crate::open::{Opened, claim_answers};
use crate::rewrite::{has_link_header, store};
use crate::verdict::{PASS, dropped};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Enters the translations of a connection that the node makes; `open::decide` was before.
#[inline(never)]
pub fn connect(skb: *mut __sk_buff, scratch: &mut Scratch) -> Opened {
    let Some(interface) = interface_to(skb, scratch) else { return Opened(DROP_NO_ROUTE) };
    if scratch.hides {
        // SAFETY: the map is not preallocated.
        let addresses = unsafe { INTERFACES.get(interface) };
        let Some(addresses) = addresses else { return Opened(DROP_NO_ADDRESS) };
        scratch.to.source =
            if scratch.packet.is_v4 { addresses.address4 } else { addresses.address6 };
    }
    filter::know(&scratch.to.source, true);
    // SAFETY: a field of the context.
    scratch.flow.node_interface = unsafe { (*skb).ifindex };
    scratch.flow.endpoint_interface = interface;
    scratch.flow.node_link = link_of_sender(skb);
    if !claim_answers(&FLOWS_IN, scratch) {
        return Opened(DROP_NO_PORT);
    }
    scratch.flow.role = FLOW_TO_ENDPOINT;
    scratch.flow.to.set(&scratch.to);
    if flow::enter(&FLOWS_OUT, &scratch.packet.tuple, &scratch.flow) {
        Opened::TRANSLATE
    } else {
        Opened(DROP_FAILED)
    }
}

/// Where packets to the endpoint leave.
#[inline(always)]
fn interface_to(skb: *mut __sk_buff, scratch: &Scratch) -> Option<u32> {
    // SAFETY: integers and arrays of them.
    let mut query: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    let (from, to) = (&scratch.to.source.words_be, &scratch.to.destination.words_be);
    query.l4_protocol = scratch.to.protocol;
    if scratch.packet.is_v4 {
        query.family = AF_INET;
        query.__bindgen_anon_3.ipv4_src = from[3];
        query.__bindgen_anon_4.ipv4_dst = to[3];
    } else {
        query.family = AF_INET6;
        query.__bindgen_anon_3.ipv6_src = *from;
        query.__bindgen_anon_4.ipv6_dst = *to;
    }
    // SAFETY: a field of the context; the helper gets what it asks for.
    let result = unsafe {
        query.ifindex = (*skb).ifindex;
        let size = size_of::<bpf_fib_lookup>() as i32;
        fib_lookup(skb.cast(), &raw mut query, size, 0)
    };
    const FOUND: i64 = BPF_FIB_LKUP_RET_SUCCESS as i64;
    const UNRESOLVED: i64 = BPF_FIB_LKUP_RET_NO_NEIGH as i64;
    matches!(result, FOUND | UNRESOLVED).then_some(query.ifindex)
}

/// The link address of the interface that the packet leaves by; zero if there is none.
#[inline(always)]
fn link_of_sender(skb: *mut __sk_buff) -> [u8; 6] {
    const SOURCE: u32 = 6;
    let mut link = [0; 6];
    if has_link_header(skb) {
        // SAFETY: the helper writes 6 bytes or zeroes them.
        unsafe { bpf_skb_load_bytes(skb.cast(), SOURCE, link.as_mut_ptr().cast(), 6) };
    }
    link
}

/// Sends a packet that was translated to where its endpoint is.
#[inline(always)]
pub fn send(flow: &Flow) -> i32 {
    // SAFETY: no parameters: the kernel finds the neighbour by its routes.
    unsafe { bpf_redirect_neigh(flow.endpoint_interface, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Lets an answer that was translated come in where the node expects it.
#[inline(always)]
pub fn receive(skb: *mut __sk_buff, scratch: &Scratch, flow: &Flow) -> i32 {
    // SAFETY: a field of the context.
    let is_there = unsafe { (*skb).ifindex == flow.node_interface };
    if is_there || flow.node_link == [0; 6] || !has_link_header(skb) {
        return PASS;
    }
    if store(skb, 0, &flow.node_link, 0).is_err() {
        return dropped(skb, scratch, DROP_FAILED);
    }
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(flow.node_interface, BPF_F_INGRESS.into()) as i32 }
}
