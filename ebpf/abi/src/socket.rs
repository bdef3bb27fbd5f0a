//! What the socket layer keeps with each socket that speaks with a Service. Freed with the socket.

use crate::{Address, Endpoint, layout};

/// Whom a socket speaks with: the address that its program knows, and who is behind that.
/// Value of the socket storage `peers`, for sockets that were connected.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer {
    pub service: Address,
    /// Its flags are 0.
    pub endpoint: Endpoint,
    /// Where the endpoint was chosen from.
    pub pool: u32,
    /// Number of the frontend.
    pub frontend: u32,
    pub service_port_be: u16,
    pub zero: u16,
}

/// What an unconnected UDP socket says to one Service. Unused while the endpoint's port is 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Conversation {
    pub peer: Peer,
    /// By the monotonic clock.
    pub last_sent_ns: u64,
}

/// With so many Services can an unconnected UDP socket speak at a time; more are left to the packet layer.
pub const CONVERSATIONS: usize = 4;

/// Value of the socket storage `conversations`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Conversations {
    pub slots: [Conversation; CONVERSATIONS],
}

layout! {
    Peer: 48,
    Conversation: 56,
    Conversations: 224,
}

/// First half of clients' addresses in `affinity` that are no addresses: sockets have none yet when they
/// connect. In the discard-only range of RFC 6666, which no packet comes from.
const NAMESPACE_BE: [u32; 2] = [0x0100_0000_u32.to_be(), u32::from_be_bytes(*b"keel").to_be()];

/// The client that all sockets of a network namespace are, for session affinity.
#[inline(always)]
#[must_use]
pub const fn client_of_namespace(cookie: u64) -> Address {
    let [a, b] = NAMESPACE_BE;
    Address { words_be: [a, b, (cookie >> 32) as u32, cookie as u32] }
}
