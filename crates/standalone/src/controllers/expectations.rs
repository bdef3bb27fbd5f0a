//! What a controller has written and must see again before it may decide anew.
//!
//! Without this, a controller that created three pods and is woken by the first of them would count one and create
//! two more.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Per key: the revision that the table must have reached, and the objects whose deletion must show.
#[derive(Debug)]
pub(crate) struct Expectations<K> {
    owed: Mutex<HashMap<K, Owed>>,
}

#[derive(Debug, Default)]
struct Owed {
    revision: u64,
    deleted: HashSet<String>,
}

impl<K: Eq + Hash + Clone> Expectations<K> {
    pub(crate) fn new() -> Self {
        Self { owed: Mutex::new(HashMap::new()) }
    }

    /// A write was answered with this revision.
    pub(crate) fn written(&self, key: &K, revision: u64) {
        let mut owed = self.lock();
        let owed = owed.entry(key.clone()).or_default();
        owed.revision = owed.revision.max(revision);
    }

    /// The deletion of the object with this uid was accepted.
    pub(crate) fn deleted(&self, key: &K, uid: &str) {
        self.lock().entry(key.clone()).or_default().deleted.insert(uid.to_owned());
    }

    /// Whether everything owed to `key` shows: the table is at `revision`, and `is_live` says of a uid whether the
    /// object still looks as if nobody had deleted it. What shows is forgotten.
    pub(crate) fn are_met(&self, key: &K, revision: u64, is_live: impl Fn(&str) -> bool) -> bool {
        let mut all = self.lock();
        let Some(owed) = all.get_mut(key) else { return true };
        owed.deleted.retain(|uid| is_live(uid));
        let met = owed.deleted.is_empty() && owed.revision <= revision;
        if met {
            all.remove(key);
        }
        met
    }

    /// The key's object is gone.
    pub(crate) fn forget(&self, key: &K) {
        self.lock().remove(key);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, Owed>> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_and_deletions_must_show_before_the_next_decision() {
        let expectations = Expectations::new();
        assert!(expectations.are_met(&"rs", 0, |_| true));
        expectations.written(&"rs", 7);
        expectations.written(&"rs", 5);
        expectations.deleted(&"rs", "uid");
        assert!(!expectations.are_met(&"rs", 6, |_| false));
        expectations.deleted(&"rs", "uid");
        assert!(!expectations.are_met(&"rs", 7, |_| true));
        assert!(expectations.are_met(&"other", 0, |_| true));
        assert!(expectations.are_met(&"rs", 7, |_| false));
        assert!(expectations.are_met(&"rs", 0, |_| true));
    }
}
