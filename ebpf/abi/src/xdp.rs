//! What the program at XDP must know of interfaces.

use crate::layout;

/// An interface that the program at XDP serves. Keyed by its index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct XdpInterface {
    /// Its link address: frames to others are not the node's.
    pub link: [u8; 6],
    /// `XDP_*`.
    pub flags: u16,
}

/// Frames that came in by another interface can be sent out here.
pub const XDP_SENDS: u16 = 1;

layout! {
    XdpInterface: 8,
}
