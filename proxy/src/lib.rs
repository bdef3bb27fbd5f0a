//! keelson's service proxy: one Service model, interchangeable kernel backends.
//!
//! [`model`] turns Services and EndpointSlices into plans, [`diff`] finds what changed, a
//! [`backend`] puts it in force.

pub mod backend;
pub mod diff;
pub mod model;
pub mod nftables;
