//! What keelson's BPF programs share: the maps, the way from a destination to an endpoint, and
//! what is known of connections.
#![no_std]
// Every helper reads or writes kernel memory through pointers, which the verifier checks when a program is loaded.
#![expect(unsafe_code, reason = "BPF helpers")]

pub mod counters;
pub mod endpoint;
pub mod events;
pub mod filter;
pub mod flow;
pub mod frontend;
pub mod hold;
pub mod maps;
