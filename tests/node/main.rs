//! The node lane: whole nodes with real containerd, runc, kernel and kubectl, each in a network namespace of its own.
#![allow(clippy::unwrap_used, reason = "a test ends where something that it needs does not hold")]

mod attach;
mod bad_input;
mod cri;
mod image_gc;
mod images;
mod isolation;
mod kills;
mod kubectl;
mod pods;
mod restart;
mod sandboxes;
mod services;
