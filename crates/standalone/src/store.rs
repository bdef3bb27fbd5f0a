//! The object store: everything in memory as JSON text, every change on the disk before anybody sees it.
//!
//! ```text
//!  request ── Write ──▶ writer thread ── one redb commit per batch ──▶ disk
//!                            │ then
//!                            ▼
//!                   State (objects + recent changes) ◀── lists, watches
//! ```
//! Invariants: a revision is given to one change only and grows with every change; a change becomes
//! visible after it is durable, so no client can know a revision that a crash takes back; a watch
//! reads the one shared history by position, so it can neither lose nor repeat a change, and one that
//! is too slow for the history is told so (410) instead of being buffered for.

mod disk;
mod state;
mod watch;
mod writer;

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, mpsc};

use serde_json::Value;
use tokio::sync::{oneshot, watch as signal};

pub use self::disk::StoreError;
pub(crate) use self::state::State;
pub use self::watch::{Event, EventType, Watch};
use self::writer::Writer;
use crate::error::ApiError;
use crate::kinds::{self, Kind};
use crate::object::Object;

/// A change that is asked for. It happens only when the object is still what the caller saw.
#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) kind: &'static Kind,
    pub(crate) key: String,
    /// The revision that the caller changed, 0 for "there is none yet".
    pub(crate) seen: u64,
    /// The new object, or nothing to delete it. The store sets its resourceVersion.
    pub(crate) value: Option<Value>,
}

/// Why a change did not happen.
#[derive(Debug, Clone)]
pub(crate) enum WriteError {
    /// The object is not what the caller saw: there, not there, or newer.
    Changed,
    /// The disk refuses; nothing was changed.
    Disk(ApiError),
}

type Answer = Result<Arc<Object>, WriteError>;
type Job = (Write, oneshot::Sender<Answer>);

/// The store. Shared by reference count; the last one gone ends the writer thread.
#[derive(Debug)]
pub(crate) struct Store {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
}

/// What readers and the writer share.
#[derive(Debug)]
pub(crate) struct Shared {
    state: RwLock<State>,
    /// Per kind: wakes its watches.
    changed: Vec<signal::Sender<u64>>,
}

impl Shared {
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, State> {
        // A panic while the lock was held for writing is a bug that has ended that thread; the data
        // is replaced whole per change, so reading on is right.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, changes: Vec<state::Change>) {
        let mut touched = Vec::new();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        for change in changes {
            touched.push((change.object.kind.id, change.object.revision));
            state.apply(change);
        }
        drop(state);
        for (kind, revision) in touched {
            self.changed[kind].send_replace(revision);
        }
    }

    fn subscribe(&self, kind: &Kind) -> signal::Receiver<u64> {
        self.changed[kind.id].subscribe()
    }
}

impl Store {
    /// Opens or makes the store at `path` and reads it into memory.
    ///
    /// # Errors
    /// When the file is foreign, corrupt, in use or of a newer version.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let mut disk = disk::Disk::open(path)?;
        let state = disk.load()?;
        let changed = kinds::all().iter().map(|_| signal::Sender::new(0)).collect();
        let shared = Arc::new(Shared { state: RwLock::new(state), changed });
        let (jobs, queue) = mpsc::channel();
        let writer = Writer::new(disk, Arc::clone(&shared));
        std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(&queue))
            .map_err(|source| StoreError::Thread { source })?;
        Ok(Self { shared, jobs })
    }

    /// Makes a change durable and visible, together with others that wait at the same time.
    pub(crate) async fn write(&self, write: Write) -> Answer {
        let (answer, outcome) = oneshot::channel();
        let stopped =
            || WriteError::Disk(ApiError::new(503, "ServiceUnavailable", "the store has stopped"));
        self.jobs.send((write, answer)).map_err(|_| stopped())?;
        outcome.await.map_err(|_| stopped())?
    }

    pub(crate) fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.shared.read().get(kind, &crate::object::key(namespace, name))
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.shared.read()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

#[cfg(test)]
mod tests;
