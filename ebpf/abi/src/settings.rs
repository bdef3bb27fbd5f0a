//! What the programs must know of the node.

use crate::{Address, layout};

/// The only element of `settings`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Settings {
    /// Cookie of the node's own network namespace: sockets elsewhere are pods'. 0 is the machine's first one.
    pub host_cookie: u64,
    /// `SETTING_*`.
    pub flags: u32,
    /// Numbers of pools and frontends below this one may have been used; for user space alone.
    pub numbers: u32,
    /// What the node's own sockets are taken to speak from, where loadBalancerSourceRanges ask; zero when it
    /// has no address of that family.
    pub address4: Address,
    pub address6: Address,
    /// Until then, by the monotonic clock, no connection begins in the packet layer: user space moves those that
    /// there are to other maps. A time and no flag, so that it ends also when user space does.
    pub held_until_ns: u64,
}

/// Pods can be told from other sources.
pub const SETTING_KNOWS_PODS: u32 = 1;
/// They are told by the interface ([`INTERFACE_PODS`]), not by their address (`pod_ranges`).
pub const SETTING_PODS_BY_INTERFACE: u32 = 2;
/// There is something in `exempt`.
pub const SETTING_EXEMPTS_NAMESPACES: u32 = 4;
/// Packets of connections that are not known go on instead of being refused: netfilter may know them,
/// from the time of another mode.
pub const SETTING_PASSES_UNKNOWN: u32 = 8;
/// The sockets of other network namespaces than the node's are left to the packet layer.
pub const SETTING_NODE_SOCKETS_ONLY: u32 = 256;
/// Clients outside are not masqueraded: endpoints on other nodes answer them by themselves. Except by UDP.
pub const SETTING_DIRECT: u32 = 512;
/// The same by UDP.
pub const SETTING_DIRECT_UDP: u32 = 1024;

/// In `addresses`: one of the node's own.
pub const ADDRESS_NODE: u32 = 1;
/// Node ports answer there.
pub const ADDRESS_NODE_PORTS: u32 = 2;
/// A ClusterIP: connections to a port that is no frontend are refused.
pub const ADDRESS_CLUSTER_IP: u32 = 4;

/// Key of the longest prefix matches `pod_ranges` and `service_ranges`. Prefixes of IPv4 ranges count
/// the 96 bits before the address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RangeKey {
    pub address: Address,
}

/// [`RangeKey`] as an element of a map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RangePrefix {
    /// Bits of `address` that count.
    pub prefix_len: u32,
    pub key: RangeKey,
}

/// What packets are masqueraded with when they leave through an interface. Keyed by its index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Interface {
    /// Zero when it has no address of that family and the node has none either.
    pub address4: Address,
    pub address6: Address,
    /// `INTERFACE_*`.
    pub flags: u32,
}

/// Pods' packets come in here.
pub const INTERFACE_PODS: u32 = 1;
/// Packets begin with the IP header (tunnels, WireGuard).
pub const INTERFACE_NO_LINK_HEADER: u32 = 2;

layout! {
    Settings: 56,
    RangeKey: 16,
    RangePrefix: 20,
    Interface: 36,
}
