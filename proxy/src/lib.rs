//! keelson's service proxy: one Service model, interchangeable kernel backends.
//!
//! [`model`] turns Services and EndpointSlices into plans, [`diff`] finds what changed, a
//! [`backend`] puts it in force; [`run`] connects them to an API server.

mod addresses;
pub mod backend;
pub mod cleanup;
mod clock;
pub mod config;
pub mod conntrack;
pub mod diff;
pub mod ebpf;
mod engine;
mod events;
pub mod explain;
mod fill;
pub mod flags;
#[doc(hidden)]
pub mod fuzzing;
mod health_checks;
pub mod iptables;
pub mod ipvs;
mod last_known;
mod localhost;
mod loopback6;
mod metrics;
pub mod model;
pub mod nftables;
mod node;
mod run;
mod server;
pub mod switch;
pub mod trace;
mod watch;

pub use config::{LocalSources, NodePortAddresses, ProxyConfig};
pub use run::{run, run_with};
