//! The memory side of the store: objects and their recent changes. Pure, without I/O.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use crate::error::ApiError;
use crate::kinds::{self, Kind};
use crate::object::Object;

/// Changes kept per kind for watches that come back. Sized for a client that reconnects within
/// seconds during a burst; one that stays away for longer lists again.
const HISTORY_CHANGES: usize = 2048;
/// The same bound in bytes of JSON, but never fewer than [`HISTORY_LEAST`] changes.
const HISTORY_BYTES: usize = 4 << 20;
const HISTORY_LEAST: usize = 64;

/// One change of one object.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    /// The new object; for a deletion its last state with the deletion's revision.
    pub(crate) object: Arc<Object>,
    /// What was there before, if anything.
    pub(crate) previous: Option<Arc<Object>>,
    pub(crate) deleted: bool,
}

/// All objects of the store at one revision.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) revision: u64,
    kinds: Vec<KindState>,
}

#[derive(Debug, Default)]
struct KindState {
    objects: BTreeMap<Box<str>, Arc<Object>>,
    history: VecDeque<Change>,
    history_bytes: usize,
    /// Changes up to this revision are forgotten.
    forgotten: u64,
}

/// A page of a list.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) items: Vec<Arc<Object>>,
    pub(crate) revision: u64,
}

impl State {
    pub(crate) fn new(revision: u64) -> Self {
        let kinds = kinds::all().iter().map(|_| KindState::default()).collect();
        Self { revision, kinds }
    }

    /// Adds an object that was read from the disk.
    pub(super) fn restore(&mut self, object: Object) {
        let kind = &mut self.kinds[object.kind.id];
        kind.forgotten = kind.forgotten.max(object.revision);
        kind.objects.insert(object.key().into(), Arc::new(object));
    }

    /// Says that the last change of `kind` before the start had this revision.
    pub(super) fn restore_last_change(&mut self, kind: &Kind, revision: u64) {
        let kind = &mut self.kinds[kind.id];
        kind.forgotten = kind.forgotten.max(revision);
    }

    pub(super) fn apply(&mut self, change: Change) {
        self.revision = change.object.revision;
        let kind = &mut self.kinds[change.object.kind.id];
        let key = change.object.key();
        if change.deleted {
            kind.objects.remove(key.as_str());
        } else {
            kind.objects.insert(key.into(), Arc::clone(&change.object));
        }
        kind.remember(change);
    }

    pub(crate) fn get(&self, kind: &Kind, key: &str) -> Option<Arc<Object>> {
        self.kinds[kind.id].objects.get(key).cloned()
    }

    /// All objects of a kind, or of one of its namespaces, in the order of their keys.
    pub(crate) fn scan<'a>(
        &'a self,
        kind: &Kind,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Object>> {
        let prefix = if namespace.is_empty() { String::new() } else { format!("{namespace}/") };
        let start = Bound::Included(Box::<str>::from(prefix.as_str()));
        self.kinds[kind.id]
            .objects
            .range((start, Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(&prefix))
            .map(|(_, object)| object)
    }

    /// The objects as they were at `revision`, which may be in the past: the history is undone.
    ///
    /// # Errors
    /// 410 when the history does not reach back so far, 504 when it lies in the future.
    pub(crate) fn list_at(
        &self,
        kind: &Kind,
        namespace: &str,
        revision: u64,
    ) -> Result<Listing, ApiError> {
        let wanted = &self.kinds[kind.id];
        if revision > self.revision {
            return Err(too_large(revision, self.revision));
        }
        if revision < wanted.forgotten {
            return Err(too_old(revision, wanted.forgotten));
        }
        let mut objects: BTreeMap<String, Arc<Object>> =
            self.scan(kind, namespace).map(|o| (o.key(), Arc::clone(o))).collect();
        for change in wanted.history.iter().rev().take_while(|c| c.object.revision > revision) {
            if !namespace.is_empty() && *change.object.namespace != *namespace {
                continue;
            }
            match &change.previous {
                Some(previous) => objects.insert(change.object.key(), Arc::clone(previous)),
                None => objects.remove(&change.object.key()),
            };
        }
        Ok(Listing { items: objects.into_values().collect(), revision })
    }

    /// Whether a watch can go on after `revision`.
    ///
    /// # Errors
    /// 410 when changes after it are forgotten, or when it comes from another, later store.
    pub(crate) fn check_watch(&self, kind: &Kind, revision: u64) -> Result<(), ApiError> {
        let forgotten = self.kinds[kind.id].forgotten;
        if revision < forgotten {
            return Err(too_old(revision, forgotten));
        }
        if revision > self.revision {
            return Err(ApiError::expired(format!(
                "resource version {revision} is from the future (current: {}); list again",
                self.revision
            )));
        }
        Ok(())
    }

    /// Up to `most` changes after `revision`, and whether these were all.
    ///
    /// # Errors
    /// 410 when changes after it are forgotten.
    pub(crate) fn changes_after(
        &self,
        kind: &Kind,
        revision: u64,
        most: usize,
    ) -> Result<(Vec<Change>, bool), ApiError> {
        let kind = &self.kinds[kind.id];
        if revision < kind.forgotten {
            return Err(too_old(revision, kind.forgotten));
        }
        let start = kind.history.partition_point(|c| c.object.revision <= revision);
        let found: Vec<_> = kind.history.range(start..).take(most).cloned().collect();
        let all = start + found.len() == kind.history.len();
        Ok((found, all))
    }
}

impl KindState {
    fn remember(&mut self, change: Change) {
        self.history_bytes += change.object.json.len();
        self.history.push_back(change);
        while self.history.len() > HISTORY_CHANGES
            || (self.history_bytes > HISTORY_BYTES && self.history.len() > HISTORY_LEAST)
        {
            let Some(old) = self.history.pop_front() else { break };
            self.history_bytes -= old.object.json.len();
            self.forgotten = old.object.revision;
        }
    }
}

fn too_old(revision: u64, oldest: u64) -> ApiError {
    ApiError::expired(format!("too old resource version: {revision} ({oldest})"))
}

fn too_large(revision: u64, current: u64) -> ApiError {
    let message = format!("Too large resource version: {revision}, current: {current}");
    let mut error = ApiError::new(504, "Timeout", message);
    error.details = serde_json::json!({
        "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
        "retryAfterSeconds": 1,
    });
    error
}
