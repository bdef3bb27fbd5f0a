//! Pods: from what the sources want to what the runtime does, and back as status.
//!
//! ```text
//!  API watch ─┐                       ┌─> runtime (sandbox, containers)
//!  manifests ─┴─> dispatcher ─> worker ├─> volumes, cgroups, files
//!                 (one per pod)  │ ^   └─> status writer ─> API
//!                                v │ woken by: spec, runtime event, probe, timer
//!                       plan() / status()   pure
//! ```
//! A worker is level-triggered: it observes, asks [`plan::plan`] what differs, does that, and observes again until
//! nothing differs. It trusts nothing that it remembers except back-off; after a restart of the agent the same loop adopts
//! what runs.

pub(crate) mod admission;
pub mod backoff;
mod bell;
mod config;
mod container;
mod dispatcher;
mod exec;
pub(crate) mod grpc;
mod hook;
mod http;
pub(crate) mod image;
mod isolation;
mod mirror;
mod objects;
mod orphans;
pub mod plan;
mod prober;
mod pull_slots;
mod registry;
mod run;
mod services;
mod shared;
pub(crate) mod source;
pub mod spec;
pub mod status;
mod status_writer;
mod worker;

pub use config::PodsConfig;
pub use registry::PodRegistry;
pub use run::{Pods, run};
pub use source::manifests::{ManifestError, parse as parse_manifest};
