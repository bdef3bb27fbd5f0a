//! Layouts of the BPF maps that keelson's programs and its user space share.
//!
//! Rules: `#[repr(C)]`, integers and byte arrays only, every hole an explicit field, sizes checked when
//! compiled. What is in network byte order ends in `_be`; all else is in the machine's own. A change of
//! any layout needs another [`VERSION`].
//!
//! Maps outlive an upgrade, so layouts only ever grow at their end, and zero there means what was before: user space
//! carries elements of another version over by their size. Where that cannot be kept the map begins anew ([`ANEW`]).
#![no_std]

mod address;
mod checksum;
mod counters;
mod drops;
mod events;
mod filter;
mod flow;
mod hash;
mod sctp;
mod service;
mod settings;
mod socket;
mod told;
mod xdp;

pub use address::Address;
pub use checksum::{Sum, pseudo_header};
pub use counters::Counters;
pub use drops::*;
pub use events::*;
pub use filter::{FILTER_ADDRESS, FILTER_RANGE, FILTER_WORDS, FilterPlace};
pub use flow::*;
pub use sctp::sctp_checksum_change;
pub use service::{
    Affinity, AffinityKey, ENDPOINT_HERE, ENDPOINT_STRANGER, Endpoint, FRONTEND_HAS_SOURCES,
    FRONTEND_HASHED, FRONTEND_STICKY, Frontend, FrontendKey, MASQUERADE_ALWAYS, MASQUERADE_NEVER,
    MASQUERADE_UNLESS_POD, MEMBER_DRAINING, MEMBER_SERVING, MemberKey, Pool, Route, SlotKey,
    SourceKey, SourcePrefix, VERDICT_DROP, VERDICT_FORWARD, VERDICT_REJECT,
};
pub use settings::{
    ADDRESS_CLUSTER_IP, ADDRESS_NODE, ADDRESS_NODE_PORTS, INTERFACE_NO_LINK_HEADER, INTERFACE_PODS,
    Interface, RangeKey, RangePrefix, SETTING_DIRECT, SETTING_DIRECT_UDP,
    SETTING_EXEMPTS_NAMESPACES, SETTING_KNOWS_PODS, SETTING_NODE_SOCKETS_ONLY,
    SETTING_PASSES_UNKNOWN, SETTING_PODS_BY_INTERFACE, Settings,
};
pub use socket::{
    CONVERSATIONS, Connected, Conversation, Conversations, PLACES, Peer, client_of_namespace,
    namespace_of_client, place_of,
};
pub use told::{
    PROTOCOL_OPTIONS6, TOLD4_KIND, TOLD4_LENGTH, TOLD6_KIND, TOLD6_LENGTH, Told4, Told6,
};
pub use xdp::{XDP_SENDS, XdpInterface};

/// Part of the names of the folders that maps and programs are pinned in.
pub const VERSION: u32 = 3;

/// Maps that earlier versions filled with what now means something else, with the first version that they can be
/// taken over from.
pub const ANEW: &[(&str, u32)] = &[];

/// Says that a type may be copied in and out of maps, and fails to compile when it has a hole or another size.
macro_rules! layout {
    ($($name:ident: $size:literal,)*) => {$(
        const _: () = assert!(core::mem::size_of::<$name>() == $size);
        #[cfg(feature = "user")]
        #[expect(unsafe_code, reason = "aya's mark of plain data")]
        // SAFETY: `repr(C)`, integers and arrays of them only, no padding: any bytes are a value.
        unsafe impl aya::Pod for $name {}
    )*};
}
use layout;
