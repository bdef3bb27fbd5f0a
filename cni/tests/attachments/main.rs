//! The plugin as runtimes use it: the real program, the real kernel, network namespaces of the tests' own.
//!
//! Needs root. Tests without it are passed over with a note.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub, reason = "tests")]

mod addresses;
mod crash;
mod input;
mod ports;
mod spoofing;
mod stage;
mod verbs;
