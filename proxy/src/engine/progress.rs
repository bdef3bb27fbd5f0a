//! What health checks may know about the engine.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::clock::Now;

#[derive(Debug, Default)]
pub(crate) struct Progress {
    inner: Mutex<ProgressState>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ProgressState {
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
        self.synced && !late
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
