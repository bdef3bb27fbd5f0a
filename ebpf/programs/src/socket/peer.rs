//! Whom a connected socket speaks with.
//!
//! All hooks run with the socket locked, so nobody else reads or writes its storage meanwhile.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::generated::bpf_get_socket_cookie;
use aya_ebpf::programs::{SockAddrContext, SockContext};
use keelson_ebpf_abi::{MemberKey, Peer};

use crate::maps::{CONNECTED_UDP, PEERS};
use crate::sockaddr::{self, SocketAddress, UDP, field};

/// False when there is no place for it.
#[inline(always)]
pub fn remember(ctx: &SockAddrContext, peer: &Peer) -> bool {
    if is_udp(ctx) {
        let rests_on = MemberKey { pool: peer.pool, endpoint: peer.endpoint };
        if CONNECTED_UDP.insert(cookie(ctx), rests_on, u64::from(BPF_ANY)).is_err() {
            return false;
        }
    }
    let mut new = *peer;
    // SAFETY: the hook's socket is alive.
    let stored = unsafe { PEERS.get_or_insert_ptr_mut(ctx, Some(&mut new)) };
    if stored.is_null() {
        return false;
    }
    // SAFETY: not null, and ours alone.
    unsafe { *stored = *peer };
    true
}

#[inline(always)]
pub fn get(ctx: &SockAddrContext) -> Option<&'static Peer> {
    // SAFETY: storage lives as long as the socket, which outlives the hook.
    unsafe { PEERS.get_ptr_mut(ctx).as_ref() }
}

#[inline(always)]
pub fn forget(ctx: &SockAddrContext) {
    if get(ctx).is_none() {
        return;
    }
    if is_udp(ctx) {
        // It may be gone already: user space removes those that it ends.
        let _ = CONNECTED_UDP.remove(cookie(ctx));
    }
    let sk = field!(ctx, __bindgen_anon_1.sk);
    // SAFETY: the hook's socket is alive.
    let _ = unsafe { PEERS.delete(sk) };
}

/// A socket is closed for good; its storage goes by itself.
#[inline(always)]
pub fn release(ctx: &SockContext) {
    // SAFETY: the kernel passes a valid context; the verifier checks offset and size.
    if unsafe { (&raw const (*ctx.sock).protocol).read_volatile() } != UDP {
        return;
    }
    // SAFETY: the context is the one that the kernel passed.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock.cast()) };
    // Most were not connected to a Service.
    let _ = CONNECTED_UDP.remove(cookie);
}

#[inline(always)]
fn is_udp(ctx: &SockAddrContext) -> bool {
    field!(ctx, protocol) == UDP
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is the one that the kernel passed.
    unsafe { bpf_get_socket_cookie(sockaddr::raw(ctx)) }
}

/// Forgets it when it is at that very address.
#[inline(always)]
pub fn forget_at(ctx: &SockAddrContext, at: &SocketAddress) {
    if get(ctx).is_some_and(|peer| is_at(peer, at)) {
        forget(ctx);
    }
}

#[inline(always)]
pub fn is_at(peer: &Peer, at: &SocketAddress) -> bool {
    at.is(&peer.endpoint.address, peer.endpoint.port_be)
}
