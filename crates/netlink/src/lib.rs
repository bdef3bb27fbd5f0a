//! Kernel interfaces for keelson: netlink sockets, rtnetlink, nftables, IPVS, conntrack, sockets of others
//! and network namespaces.
//!
//! Everything here blocks and nothing here knows Kubernetes. Callers on an async runtime use a thread of their own.
#![warn(missing_docs)]

pub mod conntrack;
#[doc(hidden)]
pub mod fuzzing;
mod genl;
pub mod ipvs;
pub mod message;
pub mod netns;
pub mod nft;
pub mod route;
pub mod sock_diag;
pub mod socket;
pub mod sysctl;
