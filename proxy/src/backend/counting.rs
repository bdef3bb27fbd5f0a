//! What the kernel side of a backend counts of Services, for whoever asks.

use std::net::IpAddr;

use super::BackendError;
use crate::model::{Protocol, ServiceKey};

/// Reads counters of the kernel. Works in any thread, also while the backend is busy; costs nothing until asked.
pub trait Counting: Send + Sync {
    /// What was counted of Services that are in force, and of drops. Nothing of a Service ever becomes less while the
    /// Service is there, also over restarts.
    fn read(&self) -> Result<Counted, BackendError>;

    /// How the kernel side names Services.
    fn names(&self) -> Names;
}

/// Everything that was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Service ports about which anything was counted, in no order.
    pub ports: Vec<PortTraffic>,
    /// Dropped packets by reason, a short word.
    pub drops: Vec<(&'static str, u64)>,
}

/// What was counted of one Service port, in both families.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortTraffic {
    pub service: ServiceKey,
    /// The port's name, empty when it has none.
    pub port: Box<str>,
    pub protocol: Protocol,
    pub traffic: Traffic,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Connections that were given an endpoint: of TCP and SCTP, flows of UDP, and connected UDP sockets.
    pub connections: u64,
    /// Packets that were translated, both ways.
    pub packets: u64,
    /// Bytes of those packets from their IP header on.
    pub bytes: u64,
    /// Connections that were refused or dropped.
    pub refused: u64,
}

impl Traffic {
    /// The larger of each two counts.
    #[must_use]
    pub fn or_more(self, other: Traffic) -> Traffic {
        Traffic {
            connections: self.connections.max(other.connections),
            packets: self.packets.max(other.packets),
            bytes: self.bytes.max(other.bytes),
            refused: self.refused.max(other.refused),
        }
    }
}

/// What numbers and addresses of the kernel side stand for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Service ports, as `namespace/name:port`, without the last part where the port has no name.
    pub ports: Vec<(u32, String)>,
    /// ClusterIPs, as `namespace/name`.
    pub addresses: Vec<(IpAddr, String)>,
}
