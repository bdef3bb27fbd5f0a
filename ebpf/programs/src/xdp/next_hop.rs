//! The way to the next hop, by the node's own routes and neighbours.

use core::mem::{size_of, zeroed};

use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup, xdp_md};
use aya_ebpf::helpers::bpf_fib_lookup as fib_lookup;
use keelson_ebpf_abi::Tuple;

use crate::frame::{Frame, Network};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

pub struct NextHop {
    pub interface: u32,
    /// Link addresses.
    pub source: [u8; 6],
    pub destination: [u8; 6],
}

/// Where a frame goes that carries `tuple` inside of the node. Nothing where the kernel has to see to it: the node
/// itself is meant, nobody knows the neighbour yet, it is too long, nobody may forward here.
#[inline(always)]
pub fn find(ctx: *mut xdp_md, frame: &Frame, tuple: &Tuple) -> Option<NextHop> {
    const FLOW_BE: u32 = 0x0fff_ffffu32.to_be();
    // SAFETY: integers and arrays of them.
    let mut query: bpf_fib_lookup = unsafe { zeroed() };
    let (from, to) = (&tuple.source.words_be, &tuple.destination.words_be);
    query.l4_protocol = tuple.protocol;
    query.sport = tuple.source_port_be;
    query.dport = tuple.destination_port_be;
    query.__bindgen_anon_1.tot_len = frame.length;
    match frame.network {
        Network::V4(ip) => {
            query.family = AF_INET;
            // SAFETY: it lies within the frame.
            query.__bindgen_anon_2.tos = unsafe { (*ip).service };
            query.__bindgen_anon_3.ipv4_src = from[3];
            query.__bindgen_anon_4.ipv4_dst = to[3];
        }
        Network::V6(ip) => {
            query.family = AF_INET6;
            // SAFETY: it lies within the frame.
            query.__bindgen_anon_2.flowinfo = unsafe { (*ip).version_and_flow_be } & FLOW_BE;
            query.__bindgen_anon_3.ipv6_src = *from;
            query.__bindgen_anon_4.ipv6_dst = *to;
        }
    }
    // SAFETY: a field of the context; the helper gets what it asks for.
    let result = unsafe {
        query.ifindex = (*ctx).ingress_ifindex;
        fib_lookup(ctx.cast(), &raw mut query, size_of::<bpf_fib_lookup>() as i32, 0)
    };
    if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
        return None;
    }
    Some(NextHop { interface: query.ifindex, source: query.smac, destination: query.dmac })
}
