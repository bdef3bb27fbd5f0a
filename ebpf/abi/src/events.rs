//! What a monitor sees: elements of the ring buffer `events`, written while the only element of `watched` says so.

use crate::{Tuple, layout};

/// One decision. A connection that goes on gives none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Event {
    /// By the monotonic clock.
    pub time_ns: u64,
    /// What the packet carried, or whom the socket asked for. A socket has no address yet: its source is
    /// [`crate::client_of_namespace`], without a port.
    pub tuple: Tuple,
    /// What it carries now; zero if it went nowhere.
    pub to: Tuple,
    /// Number of the Service port; 0 if it is for none.
    pub frontend: u32,
    /// The interface that it arrived or leaves by; 0 for sockets.
    pub interface: u32,
    /// `EVENT_*`.
    pub what: u32,
    /// `HOOK_*`.
    pub hook: u8,
    /// With [`EVENT_DROPPED`]: `DROP_*`.
    pub reason: u8,
    pub zero: u16,
}

/// A connection was given to an endpoint.
pub const EVENT_CONNECTED: u32 = 1;
/// A connection got the node's address as source.
pub const EVENT_MASQUERADED: u32 = 2;
/// The sender was told that nobody is there.
pub const EVENT_REFUSED: u32 = 3;
/// The packet was dropped.
pub const EVENT_DROPPED: u32 = 4;

/// Packets that arrive.
pub const HOOK_INGRESS: u8 = 1;
/// Packets that leave.
pub const HOOK_EGRESS: u8 = 2;
/// Sockets that connect.
pub const HOOK_CONNECT: u8 = 3;
/// Sockets that send without being connected.
pub const HOOK_SEND: u8 = 4;

/// In `watched`: nobody reads `events`.
pub const WATCH_NOTHING: u32 = 0;
/// Somebody reads what did not reach an endpoint.
pub const WATCH_FAILURES: u32 = 1;
/// Somebody reads everything.
pub const WATCH_ALL: u32 = 2;

layout! {
    Event: 104,
}
