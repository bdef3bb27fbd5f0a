//! From the Service that a socket speaks to, to an endpoint.

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::bpf_set_retval;
use aya_ebpf::programs::SockAddrContext;
use keelson_ebpf::{counters, endpoint};
use keelson_ebpf_abi::{Endpoint, HOOK_CONNECT, HOOK_SEND, Peer, client_of_namespace};

use crate::conversation;
use crate::decision::{Decision, decide};
use crate::events::{Asked, tell_connected, tell_refused};
use crate::peer;
use crate::sockaddr::{self, Family, SocketAddress, TCP, UDP, field};

/// Whether `bpf_set_retval` is there for these hooks (Linux 6.1). The loader sets it; without, what would
/// be refused here is left to the packet layer.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: Global<u8> = Global::new(0);

const ECONNREFUSED: i32 = 111;

/// What the call that the hook belongs to does next.
#[must_use]
pub enum Outcome {
    GoOn,
    Fail,
}

/// connect(2): the endpoint is chosen once and for all.
#[inline(always)]
pub fn connect<F: Family>(ctx: &SockAddrContext) -> Outcome {
    let protocol = field!(ctx, protocol);
    if protocol != TCP && protocol != UDP {
        return Outcome::GoOn;
    }
    let to = F::read(ctx).meant();
    let asked = Asked { to, protocol: protocol as u8, hook: HOOK_CONNECT };
    match decide(ctx, &to, asked.protocol) {
        Decision::Forward { frontend, pool, cookie } => {
            let chosen = endpoint::choose(pool, &client_of_namespace(cookie));
            match chosen.map(|endpoint| peer_of(&to, endpoint, pool, frontend)) {
                Some(peer) if peer::remember(ctx, &peer) => {
                    counters::count(frontend, |counters| counters.connections += 1);
                    tell_connected(ctx, &asked, frontend, &peer.endpoint);
                    write::<F>(ctx, &peer.endpoint);
                    return Outcome::GoOn;
                }
                _ => {}
            }
        }
        // UDP sockets are connected long before they are used, and to any port by resolvers that want to learn
        // which address they would have: their packets are answered.
        Decision::Refuse { frontend } if protocol == TCP => return refuse(ctx, &asked, frontend),
        Decision::NoSuchPort if protocol == TCP => return refuse(ctx, &asked, 0),
        Decision::Refuse { .. } | Decision::NoSuchPort | Decision::Leave => {}
    }
    peer::forget(ctx);
    Outcome::GoOn
}

/// sendto(2) and sendmsg(2) with an address, on UDP sockets.
#[inline(always)]
pub fn send<F: Family>(ctx: &SockAddrContext) -> Outcome {
    if field!(ctx, protocol) != UDP {
        return Outcome::GoOn;
    }
    let to = F::read(ctx).meant();
    // The kernel comes by here also for IPv6 sockets that are connected to an IPv4 address, each time.
    if sockaddr::is_connected(ctx) && peer::get(ctx).is_some_and(|peer| peer::is_at(peer, &to)) {
        return Outcome::GoOn;
    }
    let asked = Asked { to, protocol: UDP as u8, hook: HOOK_SEND };
    match decide(ctx, &to, asked.protocol) {
        Decision::Forward { frontend, pool, cookie } => {
            if let Some(endpoint) = conversation::go_on(ctx, &asked, frontend, pool, cookie) {
                write::<F>(ctx, &endpoint);
            }
        }
        Decision::Refuse { frontend } => return refuse(ctx, &asked, frontend),
        Decision::NoSuchPort => return refuse(ctx, &asked, 0),
        // Answers from there are its own from now on.
        Decision::Leave => conversation::forget_at(ctx, &to),
    }
    Outcome::GoOn
}

#[inline(always)]
pub fn peer_of(to: &SocketAddress, endpoint: Endpoint, pool: u32, frontend: u32) -> Peer {
    Peer {
        service: to.address,
        endpoint: Endpoint { flags: 0, ..endpoint },
        pool,
        frontend,
        service_port_be: to.port_be,
        zero: 0,
    }
}

#[inline(always)]
fn write<F: Family>(ctx: &SockAddrContext, endpoint: &Endpoint) {
    F::write(ctx, &SocketAddress { address: endpoint.address, port_be: endpoint.port_be });
}

/// `frontend` is 0 for a port that its ClusterIP does not have.
#[inline(always)]
fn refuse(ctx: &SockAddrContext, asked: &Asked, frontend: u32) -> Outcome {
    if HAS_SET_RETVAL.load() == 0 {
        // The packet layer refuses, counts and tells.
        return Outcome::GoOn;
    }
    if frontend != 0 {
        counters::count(frontend, |counters| counters.refused += 1);
    }
    tell_refused(ctx, asked, frontend);
    // SAFETY: the helper has no preconditions. A hook that forbids keeps an error that was set.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    Outcome::Fail
}
