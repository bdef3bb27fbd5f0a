//! Tasks that nothing kills silently.
//!
//! A node's process serves many pods, Services and callers at once. A panic in the work for one of them must end that
//! work and nothing else: [`caught`] and [`spawn`] turn a panic into an error that is logged and counted,
//! [`restarting`] runs the task again. A task that neither ends nor gets on is seen through its [`Heartbeat`].
//!
//! The counts are kept for the whole process, so that one metric shows them all ([`panics`]).

mod heartbeat;
mod panics;
mod restart;

pub use heartbeat::{Heartbeat, Heartbeats, Stalled};
pub use panics::{Panicked, catch, caught, log_panics, panics, spawn};
pub use restart::restarting;
