//! The embedded control plane as its clients see it: over HTTPS, with kubectl, and through kill -9.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod client;
mod durability;
mod hostile;
mod kubectl;
mod plane;
mod rest;
mod watching;
