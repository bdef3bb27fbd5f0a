//! CrashLoopBackOff: how long a container that keeps ending has to wait before it runs again.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::runtime::types::{Exit, ObservedContainer};

/// The first wait.
pub const INITIAL: Duration = Duration::from_secs(10);
/// No wait is longer.
pub const MAX: Duration = Duration::from_secs(300);

/// The waits of one pod's containers: 10 s, doubled at each restart up to 300 s.
///
/// A wait is counted from the end of the last run. It starts anew when the container had run for more than twice the
/// maximum since its last restart. Lost with the agent, and then derived from the attempt number.
#[derive(Debug, Clone, Default)]
pub struct CrashBackoff {
    entries: BTreeMap<String, Entry>,
    max: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Entry {
    delay: Duration,
    restarted_at: Timestamp,
}

impl CrashBackoff {
    /// With a longest wait other than 300 s (`crashLoopBackOff.maxContainerRestartPeriod`).
    pub fn with_max(max: Duration) -> Self {
        Self { entries: BTreeMap::new(), max: Some(max.max(Duration::from_secs(1))) }
    }

    fn max(&self) -> Duration {
        self.max.unwrap_or(MAX)
    }

    /// Until when the container that ended has to wait; `None` when it may start now.
    pub fn blocked_until(
        &self,
        container: &ObservedContainer,
        exit: &Exit,
        now: Timestamp,
    ) -> Option<(Timestamp, Duration)> {
        let entry = self.valid_entry(container, exit)?;
        let until = exit.finished_at.checked_add(signed(entry.delay)).ok()?;
        // A finish time in the future (the clock was set back) must not block for ever.
        let longest = now.checked_add(signed(entry.delay)).ok()?;
        (until > now).then_some((until.min(longest), entry.delay))
    }

    /// Notes that the container that had ended is being started again.
    pub fn note_restart(&mut self, container: &ObservedContainer, exit: &Exit, now: Timestamp) {
        let delay = match self.valid_entry(container, exit) {
            Some(entry) => (entry.delay * 2).min(self.max()),
            None => INITIAL.min(self.max()),
        };
        self.entries.insert(key(container), Entry { delay, restarted_at: now });
    }

    fn valid_entry(&self, container: &ObservedContainer, exit: &Exit) -> Option<Entry> {
        let entry = match self.entries.get(&key(container)) {
            Some(entry) => *entry,
            None => self.derived(container)?,
        };
        let ran = exit.finished_at.duration_since(entry.restarted_at);
        (ran <= signed(self.max() * 2)).then_some(entry)
    }

    fn derived(&self, container: &ObservedContainer) -> Option<Entry> {
        let doublings = container.attempt.checked_sub(1)?.min(16);
        let delay = INITIAL.saturating_mul(1 << doublings).min(self.max());
        Some(Entry { delay, restarted_at: container.created_at })
    }
}

fn key(container: &ObservedContainer) -> String {
    format!("{}/{}", container.name, container.spec_hash)
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}
