//! What a monitor sees: elements of the ring buffer `events`, written while `SETTING_EVENTS` is set.

use crate::{Tuple, layout};

/// One decision. A connection that goes on gives none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Event {
    /// By the monotonic clock.
    pub time_ns: u64,
    /// What the packet carried.
    pub tuple: Tuple,
    /// What it carries now; zero if it went nowhere.
    pub to: Tuple,
    /// The frontend's number; 0 if it has none.
    pub frontend: u32,
    /// The interface that it arrived or leaves by.
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

layout! {
    Event: 104,
}
