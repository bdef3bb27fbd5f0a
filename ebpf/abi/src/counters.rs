//! What happened at a Service port, per CPU. Keyed by its number ([`crate::Frontend::number`]).

use crate::layout;

/// Counts only grow; user space adds the CPUs up.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Counters {
    /// Sent to an endpoint: connections of TCP and SCTP, flows of UDP.
    pub connections: u64,
    /// Translated packets, both ways. Those of sockets that were translated themselves are not seen.
    pub packets: u64,
    /// Bytes of those packets from their IP header on.
    pub bytes: u64,
    /// Connections that were refused or dropped.
    pub refused: u64,
}

layout! {
    Counters: 32,
}
