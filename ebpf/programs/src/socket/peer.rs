//! Whom a connected socket speaks with.
//!
//! All hooks run with the socket locked, so nobody else reads or writes its storage meanwhile.

use aya_ebpf::programs::SockAddrContext;
use keelson_ebpf_abi::Peer;

use crate::maps::PEERS;
use crate::sockaddr::{SocketAddress, field};

/// False when there is no memory for it.
#[inline(always)]
pub fn remember(ctx: &SockAddrContext, peer: &Peer) -> bool {
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
    if get(ctx).is_some() {
        let sk = field!(ctx, __bindgen_anon_1.sk);
        // SAFETY: the hook's socket is alive.
        let _ = unsafe { PEERS.delete(sk) };
    }
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
