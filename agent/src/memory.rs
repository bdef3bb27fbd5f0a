//! Gives memory back that a burst of pods needed and nobody needs any more.
//!
//! glibc's allocator keeps what was freed, in one arena per thread that ever allocated: after forty pods at once that is
//! more than the agent itself needs.

use std::time::Duration;

use tokio::sync::broadcast::{Receiver, error::RecvError};

use crate::runtime::types::RuntimeEvent;

/// No event of any pod for this long: the burst is over.
const QUIET: Duration = Duration::from_secs(5);

/// Keeps the number of arenas low. To be called before there are threads.
pub fn few_arenas() {
    allocator::few_arenas();
}

/// Gives free memory back to the system whenever pods have come to rest. Costs nothing while nothing happens.
pub async fn give_back_after_bursts(mut events: Receiver<RuntimeEvent>) {
    let mut event = events.recv().await;
    while event != Err(RecvError::Closed) {
        event = match tokio::time::timeout(QUIET, events.recv()).await {
            Ok(next) => next,
            Err(_quiet) => {
                allocator::give_back();
                events.recv().await
            }
        };
    }
}

#[cfg(target_env = "gnu")]
#[allow(unsafe_code, reason = "the allocator is told through the C library")]
mod allocator {
    pub(super) fn few_arenas() {
        // SAFETY: mallopt(3) only sets a parameter. Refused, everything stays as it was.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
    }

    pub(super) fn give_back() {
        // SAFETY: malloc_trim(3) returns pages to the system that no allocation is in.
        unsafe { libc::malloc_trim(0) };
    }
}

#[cfg(not(target_env = "gnu"))]
mod allocator {
    pub(super) fn few_arenas() {}
    pub(super) fn give_back() {}
}
