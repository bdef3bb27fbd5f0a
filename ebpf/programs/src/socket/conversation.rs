//! What unconnected UDP sockets say to Services: datagrams of one socket to one Service stay with one
//! endpoint while that is a member, and its answers come from the Service.
//!
//! As in `peer`, nobody else touches a socket's storage meanwhile.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::programs::SockAddrContext;
use keelson_ebpf::frontend::{self, Found};
use keelson_ebpf::{counters, endpoint};
use keelson_ebpf_abi::{Conversation, Conversations, Endpoint, Peer, client_of_namespace};

use crate::events::{Asked, tell_connected};
use crate::maps::CONVERSATIONS;
use crate::peer::is_at;
use crate::sockaddr::{SocketAddress, UDP};
use crate::translate::peer_of;

/// After so long a silence a Service makes place for another one. Longer than connection tracking waits.
const IDLE_NS: u64 = 180 * 1_000_000_000;
/// How often an endpoint is drawn when the one that was drawn speaks with this socket already, for
/// another Service: their answers could not be told apart.
const DRAWS: u32 = 2;

/// The endpoint that the next datagram goes to. Nothing when the packet layer must choose.
#[inline(always)]
pub fn go_on(
    ctx: &SockAddrContext,
    asked: &Asked,
    frontend: u32,
    pool: u32,
    cookie: u64,
) -> Option<Endpoint> {
    let to = &asked.to;
    let all = get_or_create(ctx)?;
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let position = slot_for(all, to, now)?;
    if let Some(endpoint) = kept(all.slots.get(position)?, to, frontend) {
        all.slots.get_mut(position)?.last_sent_ns = now;
        return Some(endpoint);
    }
    let endpoint = draw(all, pool, cookie)?;
    let peer = peer_of(to, endpoint, pool, frontend);
    *all.slots.get_mut(position)? = Conversation { peer, last_sent_ns: now };
    counters::count(frontend, |counters| counters.connections += 1);
    tell_connected(ctx, asked, frontend, &endpoint);
    Some(endpoint)
}

/// The Service that an answer belongs to, if it still owns the address that was asked. Of several that
/// lead to the same endpoint, the one that was asked last.
#[inline(always)]
pub fn service_behind(ctx: &SockAddrContext, from: &SocketAddress) -> Option<SocketAddress> {
    // SAFETY: storage lives as long as the socket, which outlives the hook.
    let all = unsafe { CONVERSATIONS.get_ptr_mut(ctx).as_ref() }?;
    let mut best: Option<&Conversation> = None;
    for slot in &all.slots {
        let is_later = best.is_none_or(|best| best.last_sent_ns < slot.last_sent_ns);
        if is_at(&slot.peer, from) && is_later {
            best = Some(slot);
        }
    }
    let peer = &best?.peer;
    match frontend::find(&peer.service, peer.service_port_be, UDP as u8) {
        Found::Frontend(found) if found.number == peer.frontend => {
            Some(SocketAddress { address: peer.service, port_be: peer.service_port_be })
        }
        _ => None,
    }
}

/// Ends what led to that very address.
#[inline(always)]
pub fn forget_at(ctx: &SockAddrContext, at: &SocketAddress) {
    // SAFETY: as above, and it is ours alone.
    let Some(all) = (unsafe { CONVERSATIONS.get_ptr_mut(ctx).as_mut() }) else { return };
    for slot in &mut all.slots {
        if is_at(&slot.peer, at) {
            *slot = Conversation::default();
        }
    }
}

#[inline(always)]
fn get_or_create(ctx: &SockAddrContext) -> Option<&'static mut Conversations> {
    // SAFETY: as above. A new value is zeroed.
    unsafe { CONVERSATIONS.get_or_insert_ptr_mut(ctx, None).as_mut() }
}

/// The slot of a Service, or else one that may become it.
#[inline(always)]
fn slot_for(all: &Conversations, to: &SocketAddress, now: u64) -> Option<usize> {
    let is_free = |slot: &Conversation| {
        !is_used(&slot.peer) || now.saturating_sub(slot.last_sent_ns) >= IDLE_NS
    };
    let position = all.slots.iter().position(|slot| is_with(&slot.peer, to));
    position.or_else(|| all.slots.iter().position(is_free))
}

/// The endpoint of a conversation that goes on: same Service, and the endpoint is still there.
#[inline(always)]
fn kept(slot: &Conversation, to: &SocketAddress, frontend: u32) -> Option<Endpoint> {
    let Peer { pool, endpoint, .. } = slot.peer;
    let goes_on = is_with(&slot.peer, to)
        && slot.peer.frontend == frontend
        && endpoint::membership(pool, &endpoint) != 0;
    goes_on.then_some(endpoint)
}

#[inline(always)]
fn draw(all: &Conversations, pool: u32, cookie: u64) -> Option<Endpoint> {
    let client = client_of_namespace(cookie);
    let mut left = DRAWS;
    loop {
        let endpoint = endpoint::choose(pool, &client)?;
        left -= 1;
        let at = SocketAddress { address: endpoint.address, port_be: endpoint.port_be };
        if left == 0 || !all.slots.iter().any(|slot| is_at(&slot.peer, &at)) {
            return Some(endpoint);
        }
    }
}

#[inline(always)]
fn is_used(peer: &Peer) -> bool {
    peer.endpoint.port_be != 0
}

#[inline(always)]
fn is_with(peer: &Peer, to: &SocketAddress) -> bool {
    to.is(&peer.service, peer.service_port_be)
}
