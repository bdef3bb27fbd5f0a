//! Runs sandboxes and containers through containerd's native API.
//!
//! The rest of the agent knows only the types of [`types`] and the methods of [`Runtime`]: what a sandbox and a container
//! shall be, what is there now, and that something changed. containerd is the store: everything that must survive a
//! restart of the agent is in container labels and extensions.

pub mod types;
