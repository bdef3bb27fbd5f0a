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

pub mod backoff;
mod config;
pub mod plan;
mod admission;
mod bell;
mod container;
mod exec;
mod grpc;
mod hook;
mod http;
mod image;
mod objects;
mod prober;
mod services;
mod shared;
mod status_writer;
mod worker;
mod dispatcher;
mod mirror;
mod orphans;
mod run;
mod registry;
pub mod spec;
mod source;
pub mod status;

pub use config::PodsConfig;
pub use registry::PodRegistry;
pub use run::{Pods, run};
pub use source::manifests::{ManifestError, parse as parse_manifest};
