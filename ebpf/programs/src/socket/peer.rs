//! Whom a connected socket speaks with.
//!
//! All hooks of a socket run with it locked, so nobody else changes what is kept of it meanwhile. It is kept
//! until the socket is released: a socket that is connected to somebody else keeps its entry, emptied.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::generated::bpf_get_socket_cookie;
use aya_ebpf::programs::{SockAddrContext, SockContext};
use keelson_ebpf_abi::{Connected, Peer, place_of};

use crate::maps::{CONNECTED, CONNECTED_TCP, CONNECTED_UDP};
use crate::sockaddr::{self, SocketAddress, TCP, UDP, field};

/// In [`Connected::count`].
const TAKEN: u64 = 1;
const HASHED: u64 = 1 << 32;

/// False when there is no place for it.
#[inline(always)]
pub fn remember(ctx: &SockAddrContext, peer: &Peer) -> bool {
    let (protocol, cookie) = (field!(ctx, protocol), cookie(ctx));
    if let Some(entry) = find(protocol, cookie) {
        // SAFETY: it is this socket's.
        unsafe { *entry = *peer };
        return true;
    }
    let Some(place) = Place::of(cookie) else { return false };
    if protocol == TCP && place.take(cookie, peer) {
        return true;
    }
    let result = match protocol {
        TCP => CONNECTED_TCP.insert(cookie, peer, u64::from(BPF_ANY)),
        _ => CONNECTED_UDP.insert(cookie, peer, u64::from(BPF_ANY)),
    };
    if result.is_ok() {
        place.add(HASHED);
    }
    result.is_ok()
}

#[inline(always)]
pub fn get(ctx: &SockAddrContext) -> Option<&'static Peer> {
    // SAFETY: entries last until the hook has run: array elements always, hash elements since the map is
    // not preallocated.
    find(field!(ctx, protocol), cookie(ctx)).map(|peer| unsafe { &*peer })
}

#[inline(always)]
pub fn forget(ctx: &SockAddrContext) {
    if let Some(entry) = find(field!(ctx, protocol), cookie(ctx)) {
        // SAFETY: it is this socket's.
        unsafe { *entry = Peer::default() };
    }
}

/// A socket is closed for good.
#[inline(always)]
pub fn release(ctx: &SockContext) {
    // SAFETY: the kernel passes a valid context; the verifier checks offset and size.
    let protocol = unsafe { (&raw const (*ctx.sock).protocol).read_volatile() };
    if protocol != TCP && protocol != UDP {
        return;
    }
    // SAFETY: the context is the one that the kernel passed.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock.cast()) };
    let Some(place) = Place::of(cookie) else { return };
    if place.is_of(cookie) {
        place.add(TAKEN.wrapping_neg());
    } else if place.has_hashed() {
        let result = match protocol {
            TCP => CONNECTED_TCP.remove(cookie),
            _ => CONNECTED_UDP.remove(cookie),
        };
        if result.is_ok() {
            place.add(HASHED.wrapping_neg());
        }
    }
}

#[inline(always)]
pub fn is_at(peer: &Peer, at: &SocketAddress) -> bool {
    at.is(&peer.endpoint.address, peer.endpoint.port_be)
}

#[inline(always)]
fn find(protocol: u32, cookie: u64) -> Option<*mut Peer> {
    let place = Place::of(cookie)?;
    if place.is_of(cookie) {
        // SAFETY: elements of an array stay.
        return Some(unsafe { &raw mut (*place.0).peer });
    }
    if !place.has_hashed() {
        return None;
    }
    match protocol {
        TCP => CONNECTED_TCP.get_ptr_mut(cookie),
        _ => CONNECTED_UDP.get_ptr_mut(cookie),
    }
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is the one that the kernel passed.
    unsafe { bpf_get_socket_cookie(sockaddr::raw(ctx)) }
}

/// Where a socket belongs. Sockets with the same one come and go at the same time on other CPUs.
struct Place(*mut Connected);

impl Place {
    #[inline(always)]
    fn of(cookie: u64) -> Option<Self> {
        CONNECTED.get_ptr_mut(place_of(cookie)).map(Place)
    }

    /// Takes it unless somebody else has it. Adding and then reading is as good as a compare and exchange,
    /// which Linux 5.10 does not have: who reads 1 was alone, and of several that come at once at most one is.
    #[inline(always)]
    fn take(&self, cookie: u64, peer: &Peer) -> bool {
        self.add(TAKEN);
        if self.count() as u32 != 1 {
            self.add(TAKEN.wrapping_neg());
            return false;
        }
        // SAFETY: elements of an array stay, and while it is taken only its owner writes.
        unsafe {
            (*self.0).peer = *peer;
            (&raw mut (*self.0).cookie).write_volatile(cookie);
        }
        true
    }

    /// The cookie alone does not tell: it stays when its owner goes.
    #[inline(always)]
    fn is_of(&self, cookie: u64) -> bool {
        // SAFETY: elements of an array stay. A cookie is never used again, so nobody takes another's for its own.
        self.count() as u32 != 0
            && unsafe { (&raw const (*self.0).cookie).read_volatile() } == cookie
    }

    #[inline(always)]
    fn has_hashed(&self) -> bool {
        self.count() >= HASHED
    }

    #[inline(always)]
    fn count(&self) -> u64 {
        // SAFETY: elements of an array stay; others add to it meanwhile, hence volatile.
        unsafe { (&raw const (*self.0).count).read_volatile() }
    }

    #[inline(always)]
    fn add(&self, change: u64) {
        // SAFETY: as above. Nobody takes the result: the addition that gives it came with Linux 5.12.
        unsafe {
            let count = &raw mut (*self.0).count;
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(count, change);
        }
    }
}
