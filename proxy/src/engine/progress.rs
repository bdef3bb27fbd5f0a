//! What health checks may know about the engine.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::clock::Now;

/// The engine shows a sign of life at least this often.
pub(super) const BEAT: Duration = Duration::from_secs(10);
/// An engine that is silent for longer hangs. The longest change of all rules takes some seconds.
const STALLED: Duration = Duration::from_secs(120);

#[derive(Debug, Default)]
pub(crate) struct Progress {
    inner: Mutex<ProgressState>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ProgressState {
    /// The engine's last sign of life; none before it starts.
    pub(crate) last_beat: Option<Instant>,
    /// Everything was in force at least once.
    pub(crate) synced: bool,
    /// Since when the oldest change waits.
    pub(crate) waiting_since: Option<Instant>,
    pub(crate) last_update: Option<SystemTime>,
    /// The node is being deleted: load balancers shall stop to send.
    pub(crate) node_leaving: bool,
}

impl ProgressState {
    /// Services are in force, and no change waits for longer than `patience`.
    pub(crate) fn is_healthy(&self, patience: Duration, now: Now) -> bool {
        let waited = |since| now.steady.saturating_duration_since(since);
        let late = self.waiting_since.is_some_and(|since| waited(since) > patience);
        self.synced && !late && !self.is_stalled(now)
    }

    /// The engine hangs in something, or is gone.
    pub(crate) fn is_stalled(&self, now: Now) -> bool {
        self.last_beat.is_some_and(|beat| now.steady.saturating_duration_since(beat) > STALLED)
    }
}

impl Progress {
    pub(crate) fn get(&self) -> ProgressState {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut ProgressState)) {
        change(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_hangs_is_not_healthy() {
        let now = Now::read();
        let state =
            ProgressState { synced: true, last_beat: Some(now.steady), ..ProgressState::default() };
        let after = |time| Now { steady: now.steady + time, ..now };
        assert!(state.is_healthy(BEAT, after(STALLED)));
        assert!(!state.is_healthy(BEAT, after(STALLED + BEAT)));
        assert!(state.is_stalled(after(STALLED + BEAT)));
    }
}
