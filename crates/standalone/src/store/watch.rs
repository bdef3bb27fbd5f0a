//! A watch: a position in a kind's history, and a filter.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::watch as signal;

use super::Shared;
use super::state::Change;
use crate::error::ApiError;
use crate::kinds::Kind;
use crate::object::Object;
use crate::selectors::Selector;

/// How many changes are taken per turn: the lock is held for that long.
const CHUNK: usize = 128;

/// What happened to an object, as the watch's selector sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventType {
    /// It is new, or matches the selector from now on.
    Added,
    /// It changed.
    Modified,
    /// It is gone, or does not match the selector any more.
    Deleted,
}

/// One event of a watch.
#[derive(Debug, Clone)]
pub struct Event {
    /// What happened.
    pub event: EventType,
    /// The object after it; when it is gone, its last state.
    pub object: Arc<Object>,
}

/// The changes of a kind from one revision on, in order, each exactly once.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    changed: signal::Receiver<u64>,
    kind: &'static Kind,
    namespace: String,
    selector: Selector,
    /// Changes up to here have been taken from the history.
    position: u64,
    ready: VecDeque<Event>,
}

impl Watch {
    /// Watches from the change after `revision`.
    ///
    /// # Errors
    /// 410 when changes after it are forgotten.
    pub(crate) fn after(
        shared: &Arc<Shared>,
        kind: &'static Kind,
        namespace: &str,
        selector: Selector,
        revision: u64,
    ) -> Result<Self, ApiError> {
        shared.read().check_watch(kind, revision)?;
        Ok(Self {
            shared: Arc::clone(shared),
            changed: shared.subscribe(kind),
            kind,
            namespace: namespace.to_owned(),
            selector,
            position: revision,
            ready: VecDeque::new(),
        })
    }

    /// The next event. Cancellation-safe: an event is taken only when it is returned.
    ///
    /// # Errors
    /// 410 when this watch is too slow: changes that it has not seen are forgotten.
    pub async fn next(&mut self) -> Result<Event, ApiError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            // Marked before reading, so that a change during the read wakes us.
            self.changed.borrow_and_update();
            if self.fill()? && self.ready.is_empty() && self.changed.changed().await.is_err() {
                return Err(ApiError::new(503, "ServiceUnavailable", "the store has stopped"));
            }
        }
    }

    /// The revision up to which everything has been handed out, and that is up to date: what a
    /// bookmark may say. None while events wait.
    pub fn bookmark(&mut self) -> Option<u64> {
        if !self.ready.is_empty() || !self.fill().ok()? || !self.ready.is_empty() {
            return None;
        }
        Some(self.position)
    }

    /// Takes changes from the history; true when there are no more for now.
    fn fill(&mut self) -> Result<bool, ApiError> {
        let state = self.shared.read();
        let (changes, all) = state.changes_after(self.kind, self.position, CHUNK)?;
        // With nothing left in this kind's history, everything up to the store's revision is seen.
        let seen = changes.last().map_or(self.position, |c| c.object.revision);
        self.position = if all { state.revision } else { seen };
        drop(state);
        for change in changes {
            if let Some(event) = self.judge(&change) {
                self.ready.push_back(event);
            }
        }
        Ok(all)
    }

    fn wants(&self, object: &Object) -> bool {
        (self.namespace.is_empty() || *self.namespace == *object.namespace)
            && self.selector.matches(object)
    }

    /// What a change means for this watch: an object may enter or leave the selector.
    fn judge(&self, change: &Change) -> Option<Event> {
        let before = change.previous.as_ref().is_some_and(|o| self.wants(o));
        let after = !change.deleted && self.wants(&change.object);
        let (event, object) = match (before, after) {
            (false, false) => return None,
            (false, true) => (EventType::Added, Arc::clone(&change.object)),
            (true, true) => (EventType::Modified, Arc::clone(&change.object)),
            (true, false) if change.deleted => (EventType::Deleted, Arc::clone(&change.object)),
            (true, false) => (EventType::Deleted, left(change)?),
        };
        Some(Event { event, object })
    }
}

/// The last state that the selector matched, with the revision of the change that ended it.
fn left(change: &Change) -> Option<Arc<Object>> {
    let previous = change.previous.as_ref()?;
    let mut value = previous.value();
    value["metadata"]["resourceVersion"] = change.object.revision.to_string().into();
    Some(Arc::new(Object::new(previous.kind, change.object.revision, &value)))
}
