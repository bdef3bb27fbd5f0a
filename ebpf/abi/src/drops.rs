//! Why packets are dropped: indices of `drops`.

/// Nobody has that address of a Service range.
pub const DROP_NO_SUCH_ADDRESS: u32 = 0;
/// loadBalancerSourceRanges keep the client out.
pub const DROP_SOURCE: u32 = 1;
/// The traffic policy is Local and no endpoint is here.
pub const DROP_POLICY: u32 = 2;
/// The interface has no address to masquerade with.
pub const DROP_NO_ADDRESS: u32 = 3;
/// All ports to masquerade with are taken, or all that a client's port could be replaced with.
pub const DROP_NO_PORT: u32 = 4;
/// The kernel refused to change or to remember something.
pub const DROP_FAILED: u32 = 5;
/// A later piece of a packet whose first one did not come by.
pub const DROP_FRAGMENT: u32 = 6;
/// The node has no route to the endpoint.
pub const DROP_NO_ROUTE: u32 = 7;
/// Nobody is there, and the sender must not be told (a TCP reset, or not one host's address).
pub const DROP_UNANSWERED: u32 = 8;
/// Connections are being moved to other maps (`Settings::held_until_ns`).
pub const DROP_HELD: u32 = 9;
/// Another node tells of a Service that nobody knows here.
pub const DROP_UNKNOWN_SERVICE: u32 = 10;
/// The node itself asked another node, for an endpoint that it has: its kernel takes nothing from its own address.
pub const DROP_OWN_CLIENT: u32 = 11;
/// How many there are.
pub const DROP_REASONS: usize = 12;
