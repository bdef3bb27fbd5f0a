//! From an endpoint back to the Service that a socket asked for: programs see whom they spoke to.

use aya_ebpf::programs::SockAddrContext;
use keelson_ebpf_abi::Peer;

use crate::sockaddr::{self, Family, SocketAddress};
use crate::{conversation, peer};

/// recvfrom(2) and recvmsg(2) on UDP sockets, when the sender's address is asked for.
#[inline(always)]
pub fn receive<F: Family>(ctx: &SockAddrContext) {
    let from = F::read(ctx);
    let peer = if sockaddr::is_connected(ctx) { peer::get(ctx) } else { None };
    let service = match peer {
        Some(peer) if peer::is_at(peer, &from) => Some(service_of(peer)),
        _ => conversation::service_behind(ctx, &from),
    };
    if let Some(service) = service {
        F::write(ctx, &service);
    }
}

/// getpeername(2). The connection may have been made to somebody else after all, when the last
/// connect(2) failed after its hook.
#[inline(always)]
pub fn peer_name<F: Family>(ctx: &SockAddrContext) {
    let Some(peer) = peer::get(ctx) else { return };
    if peer::is_at(peer, &F::read(ctx)) {
        F::write(ctx, &service_of(peer));
    }
}

#[inline(always)]
fn service_of(peer: &Peer) -> SocketAddress {
    SocketAddress { address: peer.service, port_be: peer.service_port_be }
}
