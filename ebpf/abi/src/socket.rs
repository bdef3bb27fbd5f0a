//! What the socket layer knows of each socket that speaks with a Service. Goes with the socket.

use crate::{Address, Endpoint, MemberKey, layout};

/// Whom a socket speaks with: the address that its program knows, and who is behind that.
/// Value of `connected_tcp` and `connected_udp`, by socket cookie. All zero when the socket was connected
/// to somebody else since.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer {
    pub service: Address,
    /// Its flags are 0.
    pub endpoint: Endpoint,
    /// Where the endpoint was chosen from. 0 when user space has ended the socket.
    pub pool: u32,
    /// Number of the frontend.
    pub frontend: u32,
    pub service_port_be: u16,
    pub zero: u16,
}

impl Peer {
    /// The entry of `members` that lets it live, if it is UDP.
    #[must_use]
    pub const fn rests_on(&self) -> MemberKey {
        MemberKey { pool: self.pool, endpoint: self.endpoint }
    }

    /// As user space leaves it when it has ended the socket. The entry goes with the socket, since programs
    /// count what they add and take away.
    #[must_use]
    pub const fn ended(self) -> Self {
        Peer { pool: 0, ..self }
    }
}

/// A place for a connected TCP socket, in the array `connected` at [`place_of`] its cookie.
///
/// Most sockets have their [`Peer`] right here: a look into a large hash table is a cache miss, and a change
/// of it several and a lock, while sockets of one time have neighbouring cookies. Whoever finds the place
/// taken is in the hash table of its protocol, as are all of UDP, which user space reads.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Connected {
    /// Lower half: whether the place is taken (more than 1 for a moment while somebody tries to). Upper
    /// half: how many entries of the hash tables have a cookie with this place.
    pub count: u64,
    /// Who has the place, if it is taken.
    pub cookie: u64,
    pub peer: Peer,
}

/// Number of elements of `connected`.
pub const PLACES: u32 = 65_536;

#[inline(always)]
#[must_use]
pub const fn place_of(cookie: u64) -> u32 {
    cookie as u32 % PLACES
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
    Connected: 64,
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

/// The network namespace's cookie, if that is what a client stands for.
#[inline(always)]
#[must_use]
pub const fn namespace_of_client(client: &Address) -> Option<u64> {
    let [a, b, high, low] = client.words_be;
    let [first, second] = NAMESPACE_BE;
    if a == first && b == second { Some((high as u64) << 32 | low as u64) } else { None }
}
