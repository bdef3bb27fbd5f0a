//! Answers of the API server: kept for a while, asked for once at a time.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, WeakShared};

/// What was asked, as a digest: it is small whatever was asked, and a memory dump hands out no tokens.
pub(super) type Key = [u8; 32];

/// Answers of one kind that are kept; above it those that were not used for longest go.
const CAPACITY: usize = 1024;

/// Answers that hold for a while.
pub(super) struct Answers<V>(Mutex<Lru<Key, (V, Instant)>>);

/// What is known of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Known<V> {
    Holds(V),
    /// It held once.
    Old,
    No,
}

impl<V> Default for Answers<V> {
    fn default() -> Self {
        Self(Mutex::new(Lru::new(CAPACITY)))
    }
}

impl<V: Clone> Answers<V> {
    pub(super) fn get(&self, key: &Key) -> Known<V> {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match answers.get(key) {
            None => Known::No,
            Some((value, until)) if *until > Instant::now() => Known::Holds(value.clone()),
            Some(_) => Known::Old,
        }
    }

    pub(super) fn put(&self, key: Key, value: V, ttl: Duration) {
        let Some(until) = Instant::now().checked_add(ttl) else { return };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).put(key, (value, until));
    }
}

/// Questions that are being asked: who asks the same meanwhile gets the same answer.
pub(super) struct Flights<V>(Mutex<HashMap<Key, WeakShared<BoxFuture<'static, V>>>>);

impl<V> Default for Flights<V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<V: Clone> Flights<V> {
    /// The answer of the question that is under way, or else of the one that `ask` begins, which may refuse to.
    ///
    /// # Errors
    /// When `ask` refuses.
    pub(super) async fn join<E>(
        &self,
        key: Key,
        ask: impl FnOnce() -> Result<BoxFuture<'static, V>, E>,
    ) -> Result<V, E> {
        let flight = {
            let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match flights.get(&key).and_then(WeakShared::upgrade) {
                Some(flight) => flight,
                None => {
                    flights.retain(|_, flight| flight.upgrade().is_some());
                    let flight = ask()?.shared();
                    if let Some(weak) = flight.downgrade() {
                        flights.insert(key, weak);
                    }
                    flight
                }
            }
        };
        Ok(flight.await)
    }
}

/// A map that forgets what was not used for longest.
pub(super) struct Lru<K, V> {
    capacity: usize,
    next: u64,
    entries: HashMap<K, (u64, V)>,
    /// By the time of their last use.
    order: BTreeMap<u64, K>,
}

impl<K: Eq + Hash + Clone, V> Lru<K, V> {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, next: 0, entries: HashMap::new(), order: BTreeMap::new() }
    }

    pub(super) fn get(&mut self, key: &K) -> Option<&mut V> {
        let (used, value) = self.entries.get_mut(key)?;
        if let Some(key) = self.order.remove(used) {
            *used = self.next;
            self.order.insert(self.next, key);
            self.next += 1;
        }
        Some(value)
    }

    pub(super) fn put(&mut self, key: K, value: V) {
        if let Some((used, _)) = self.entries.remove(&key) {
            self.order.remove(&used);
        }
        while self.entries.len() >= self.capacity {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            self.entries.remove(&oldest);
        }
        self.order.insert(self.next, key.clone());
        self.entries.insert(key, (self.next, value));
        self.next += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_longest_is_forgotten() {
        let mut lru = Lru::new(3);
        for key in ["a", "b", "c"] {
            lru.put(key, 1);
        }
        lru.get(&"a");
        lru.put("d", 1);
        lru.put("d", 2);
        assert_eq!(
            ["a", "b", "c", "d"].map(|key| lru.get(&key).copied()),
            [Some(1), None, Some(1), Some(2)]
        );
        assert_eq!((lru.entries.len(), lru.order.len()), (3, 3));
    }

    #[test]
    fn an_answer_holds_for_its_time_and_is_remembered_afterwards() {
        let answers = Answers::default();
        answers.put([1; 32], 1, Duration::from_secs(100));
        answers.put([2; 32], 2, Duration::ZERO);
        answers.put([3; 32], 3, Duration::MAX);
        let known = [1, 2, 3].map(|n| answers.get(&[n; 32]));
        assert_eq!(known, [Known::Holds(1), Known::Old, Known::No]);
    }
}
