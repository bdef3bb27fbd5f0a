//! TCP connections of callers that may be hostile.
//!
//! A server that accepts without a bound can be filled with connections that say nothing. A plain cap makes it worse:
//! whoever holds the cap shuts all others out. So a connection is *pending* until its caller has shown who it is
//! ([`Slot::establish`]), and when there are too many pending ones, in all or of one peer, the oldest of them gives way to
//! the new one. An honest caller is through in milliseconds; a silent one is the oldest sooner or later.
//!
//! Established connections have a cap of their own, and accepting goes on after every error.

mod accept;
mod pool;

pub use accept::{Connection, Listener, allow_slow_reader};
pub use pool::{Full, Limits, Slot, group};
