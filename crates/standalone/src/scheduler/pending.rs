//! The pods that wait for a node: those to look at now, by priority, and those that nothing could be done for.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

/// Smaller comes first: higher priority, then who waits longer.
type Place = (Reverse<i32>, u64);

/// See the module's documentation. Keys are `namespace/name`.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    next: u64,
    active: BTreeMap<Place, String>,
    waiting: HashMap<String, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    place: Place,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Active,
    /// A decision was taken and is being carried out.
    Binding,
    /// No node could take it, for this reason; it waits until something changes.
    Parked(String),
}

impl Pending {
    /// A pod needs a node. Asking again does not move it, but a parked pod is looked at again.
    pub(crate) fn add(&mut self, key: &str, priority: i32) {
        if let Some(waiting) = self.waiting.get(key)
            && (waiting.state == State::Binding || waiting.place.0 == Reverse(priority))
        {
            let binding = waiting.state == State::Binding;
            if !binding {
                self.activate(key);
            }
            return;
        }
        self.remove(key);
        self.next += 1;
        let place = (Reverse(priority), self.next);
        self.active.insert(place, key.to_owned());
        self.waiting.insert(key.to_owned(), Waiting { place, state: State::Active });
    }

    /// A pod needs no node any more.
    pub(crate) fn remove(&mut self, key: &str) {
        if let Some(waiting) = self.waiting.remove(key) {
            self.active.remove(&waiting.place);
        }
    }

    /// The next pod to decide about; it counts as being bound until told otherwise.
    pub(crate) fn pop(&mut self) -> Option<String> {
        let (_, key) = self.active.pop_first()?;
        if let Some(waiting) = self.waiting.get_mut(&key) {
            waiting.state = State::Binding;
        }
        Some(key)
    }

    /// No node can take the pod. Returns whether that is news.
    pub(crate) fn park(&mut self, key: &str, reason: &str, last: Option<&str>) -> bool {
        if let Some(waiting) = self.waiting.get_mut(key) {
            self.active.remove(&waiting.place);
            waiting.state = State::Parked(reason.to_owned());
        }
        last != Some(reason)
    }

    /// The binding failed: look at the pod again.
    pub(crate) fn retry(&mut self, key: &str) {
        self.activate(key);
    }

    /// Something changed that may make room: looks at all parked pods again.
    pub(crate) fn wake_all(&mut self) {
        for (key, waiting) in &mut self.waiting {
            if matches!(waiting.state, State::Parked(_)) {
                waiting.state = State::Active;
                self.active.insert(waiting.place, key.clone());
            }
        }
    }

    fn activate(&mut self, key: &str) {
        if let Some(waiting) = self.waiting.get_mut(key) {
            waiting.state = State::Active;
            self.active.insert(waiting.place, key.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priority_first_then_the_longest_waiting() {
        let mut pending = Pending::default();
        for (key, priority) in [("a", 0), ("b", 10), ("c", 0), ("d", 10)] {
            pending.add(key, priority);
        }
        pending.remove("d");
        let order: Vec<_> = std::iter::from_fn(|| pending.pop()).collect();
        assert_eq!(order, ["b", "a", "c"]);
    }

    #[test]
    fn a_parked_pod_keeps_its_place_and_waits_for_a_change() {
        let mut pending = Pending::default();
        pending.add("a", 0);
        pending.add("b", 0);
        assert_eq!(pending.pop().as_deref(), Some("a"));
        assert!(pending.park("a", "0/1 nodes", None));
        assert!(!pending.park("a", "0/1 nodes", Some("0/1 nodes")));
        let parked = |waiting: &&Waiting| matches!(waiting.state, State::Parked(_));
        assert_eq!(pending.waiting.values().filter(parked).count(), 1);
        pending.wake_all();
        assert_eq!(pending.pop().as_deref(), Some("a"));
        // While it is being bound, its own changes do not bring it back.
        pending.add("a", 0);
        assert_eq!(pending.pop().as_deref(), Some("b"));
        assert_eq!(pending.pop(), None);
        pending.retry("a");
        assert_eq!(pending.pop().as_deref(), Some("a"));
    }
}
