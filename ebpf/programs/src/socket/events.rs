//! Tells a monitor, if one is there, what was decided for a socket. What is left to the packet layer is told there.

use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns};
use aya_ebpf::programs::SockAddrContext;
use keelson_ebpf::events::{is_wanted, reserve};
use keelson_ebpf_abi::{EVENT_CONNECTED, EVENT_REFUSED, Endpoint, Tuple, client_of_namespace};

use crate::sockaddr::{self, SocketAddress};

/// What a socket asks for, and in which hook (`HOOK_*`).
#[derive(Clone, Copy)]
pub struct Asked {
    pub to: SocketAddress,
    pub protocol: u8,
    pub hook: u8,
}

/// An endpoint was chosen.
#[inline(always)]
pub fn tell_connected(ctx: &SockAddrContext, asked: &Asked, frontend: u32, endpoint: &Endpoint) {
    if is_wanted(EVENT_CONNECTED) {
        let to = SocketAddress { address: endpoint.address, port_be: endpoint.port_be };
        write(ctx, asked, frontend, EVENT_CONNECTED, &to);
    }
}

/// The call fails. `frontend` is 0 where a ClusterIP has no such port.
#[inline(always)]
pub fn tell_refused(ctx: &SockAddrContext, asked: &Asked, frontend: u32) {
    if is_wanted(EVENT_REFUSED) {
        write(ctx, asked, frontend, EVENT_REFUSED, &asked.to);
    }
}

#[inline(always)]
fn write(ctx: &SockAddrContext, asked: &Asked, frontend: u32, what: u32, to: &SocketAddress) {
    let Some(mut entry) = reserve() else { return };
    let event = entry.as_mut_ptr();
    // SAFETY: the entry is ours until it is submitted. The context is the one that the kernel passed; the other
    // helper has no preconditions. Field by field, since the stack has no room for an event.
    unsafe {
        (*event).time_ns = bpf_ktime_get_ns();
        (*event).tuple = Tuple::default();
        (*event).tuple.source = client_of_namespace(bpf_get_netns_cookie(sockaddr::raw(ctx)));
        (*event).tuple.destination = asked.to.address;
        (*event).tuple.destination_port_be = asked.to.port_be;
        (*event).tuple.protocol = asked.protocol;
        (*event).to = Tuple::default();
        if what == EVENT_CONNECTED {
            (*event).to.source = (*event).tuple.source;
            (*event).to.destination = to.address;
            (*event).to.destination_port_be = to.port_be;
            (*event).to.protocol = asked.protocol;
        }
        (*event).frontend = frontend;
        (*event).interface = 0;
        (*event).what = what;
        (*event).hook = asked.hook;
        (*event).reason = 0;
        (*event).zero = 0;
    }
    entry.submit(0);
}
