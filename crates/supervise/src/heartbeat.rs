//! Signs of life of the long-running tasks, which health checks and the watchdog read.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

type Beats = Mutex<BTreeMap<&'static str, Beat>>;

#[derive(Debug, Clone, Copy)]
struct Beat {
    last: Instant,
    limit: Duration,
}

/// All heartbeats of a process.
#[derive(Debug, Clone, Default)]
pub struct Heartbeats(Arc<Beats>);

/// The heartbeat of one task.
///
/// Dropping it says nothing: a task that ended unexpectedly is stalled from then on, until a new one registers under
/// the same name. A task that ends on purpose calls [`Heartbeat::retire`].
#[derive(Debug)]
pub struct Heartbeat {
    name: &'static str,
    beats: Arc<Beats>,
}

/// A task without a sign of life for longer than its limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} has not made progress for {} s", silent.as_secs())]
pub struct Stalled {
    /// The name that the task registered.
    pub name: &'static str,
    /// The time since its last sign of life.
    pub silent: Duration,
}

impl Heartbeats {
    /// Registers a task, which beats now, and then at least once in each `limit`. A name that is taken is replaced.
    #[must_use]
    pub fn register(&self, name: &'static str, limit: Duration) -> Heartbeat {
        let beat = Beat { last: Instant::now(), limit };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name, beat);
        Heartbeat { name, beats: self.0.clone() }
    }

    /// The tasks that are silent for longer than their limits, by name.
    #[must_use]
    pub fn stalled(&self, now: Instant) -> Vec<Stalled> {
        let beats = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let silent = |beat: &Beat| now.saturating_duration_since(beat.last);
        let late = beats.iter().filter(|(_, beat)| silent(beat) > beat.limit);
        late.map(|(name, beat)| Stalled { name, silent: silent(beat) }).collect()
    }
}

impl Heartbeat {
    /// The task made progress.
    pub fn beat(&self) {
        let mut beats = self.beats.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(beat) = beats.get_mut(self.name) {
            beat.last = Instant::now();
        }
    }

    /// The task ends on purpose and is not missed.
    pub fn retire(self) {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner).remove(self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn a_silent_task_is_named_with_its_silence() {
        let all = Heartbeats::default();
        let task = all.register("dispatcher", LIMIT);
        let later = Instant::now() + LIMIT * 2;
        assert_eq!(all.stalled(Instant::now()), []);
        let stalled = all.stalled(later);
        assert_eq!(stalled[0].name, "dispatcher");
        assert!(stalled[0].to_string().starts_with("dispatcher has not made progress for 1"));
        drop(task);
        assert_eq!(all.stalled(later).len(), 1, "a task that vanished is missed");
    }

    #[test]
    fn a_task_that_retires_is_not_missed_and_a_new_one_takes_the_name() {
        let all = Heartbeats::default();
        let later = Instant::now() + LIMIT * 2;
        all.register("a", LIMIT).retire();
        assert_eq!(all.stalled(later), []);
        drop(all.register("b", Duration::ZERO));
        let again = all.register("b", LIMIT * 10);
        again.beat();
        assert_eq!(all.stalled(later), []);
    }
}
