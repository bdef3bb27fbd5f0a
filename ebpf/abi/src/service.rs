//! Services: what a packet must carry, where it goes then, and who is there.
//!
//! ```text
//! frontends: address.port.protocol ─► inside, outside: verdict, masquerade, pool
//!                                                                   │
//!                                pools: number ─► count, affinity ◄─┘
//!                                slots: number.slot ─► endpoint
//! ```
//!
//! A change publishes slots first and the pool's count after them, a pool before the frontends that lead
//! to it, and takes away in the reverse order: a reader never meets a slot below the count that is not there.

use crate::{Address, layout};

/// What the first packet of a connection must carry. At most one Service owns such a key.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey {
    /// [`Address::ANY4`] and [`Address::ANY6`] are the node's own addresses (node ports).
    pub address: Address,
    pub port_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    pub zero: u8,
}

/// Where packets to a frontend go.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frontend {
    /// For pods of this node and for the node itself.
    pub inside: Route,
    /// For everybody else. Differs from `inside` with externalTrafficPolicy Local only.
    pub outside: Route,
    /// Of the Service port that it belongs to, and of no other one ever: in keys of `sources` and of counters.
    pub number: u32,
    /// `FRONTEND_*`.
    pub flags: u32,
}

/// Only the ranges in `sources` (of the Service port) may connect; others are dropped.
pub const FRONTEND_HAS_SOURCES: u32 = 1;
/// Clients stick to an endpoint.
pub const FRONTEND_STICKY: u32 = 2;
/// Packets choose their slot by [`crate::Tuple::client_hash`], not at random. Then slots are a table in which each
/// endpoint has many, the same at every node.
pub const FRONTEND_HASHED: u32 = 4;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route {
    /// The list of endpoints; 0 when the verdict needs none.
    pub pool: u32,
    /// [`VERDICT_FORWARD`], [`VERDICT_REJECT`] or [`VERDICT_DROP`].
    pub verdict: u8,
    /// [`MASQUERADE_NEVER`], [`MASQUERADE_UNLESS_POD`] or [`MASQUERADE_ALWAYS`].
    pub masquerade: u8,
    pub zero: u16,
}

/// To an endpoint of the pool.
pub const VERDICT_FORWARD: u8 = 1;
/// The client is told that nobody is there.
pub const VERDICT_REJECT: u8 = 2;
/// The client is told nothing.
pub const VERDICT_DROP: u8 = 3;

/// The source address stays.
pub const MASQUERADE_NEVER: u8 = 0;
/// The source address becomes the node's unless it is a pod's.
pub const MASQUERADE_UNLESS_POD: u8 = 1;
/// The source address becomes the node's.
pub const MASQUERADE_ALWAYS: u8 = 2;

/// A list of endpoints. Keyed by its number, which is never used again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pool {
    /// Slots 0 to `count - 1` are filled.
    pub count: u32,
    /// Clients stick to an endpoint for so many seconds after their last connection; 0: they do not.
    pub affinity_secs: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotKey {
    pub pool: u32,
    pub slot: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    pub address: Address,
    pub port_be: u16,
    /// `ENDPOINT_*`; 0 in keys.
    pub flags: u16,
}

/// A pod of this node, which may meet itself.
pub const ENDPOINT_HERE: u16 = 1;
/// On no node of the cluster.
pub const ENDPOINT_STRANGER: u16 = 2;

/// Asks whether an endpoint belongs to a pool, in `members`. Kept for UDP, whose flows end when their
/// endpoint goes, and for pools with affinity.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberKey {
    pub pool: u32,
    pub endpoint: Endpoint,
}

/// Gets new connections.
pub const MEMBER_SERVING: u32 = 1;
/// Gets nothing new, but keeps its flows.
pub const MEMBER_DRAINING: u32 = 2;

/// Key of the longest prefix match in `sources`. The prefix counts the 32 bits of `frontend`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceKey {
    pub frontend: u32,
    pub address: Address,
}

/// [`SourceKey`] as an element of the map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourcePrefix {
    /// Bits of `frontend` and `address` that count.
    pub prefix_len: u32,
    pub key: SourceKey,
}

/// A client that may stick to an endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AffinityKey {
    pub pool: u32,
    pub client: Address,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Affinity {
    pub endpoint: Endpoint,
    pub zero: u32,
    /// Of the last connection, by the monotonic clock.
    pub last_used_ns: u64,
}

layout! {
    FrontendKey: 20,
    Frontend: 24,
    Route: 8,
    Pool: 8,
    SlotKey: 8,
    Endpoint: 20,
    MemberKey: 24,
    SourceKey: 20,
    SourcePrefix: 24,
    AffinityKey: 20,
    Affinity: 32,
}
