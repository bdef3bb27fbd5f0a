//! The writer thread: checks each change against the newest state, commits a batch, then shows it.

use std::collections::HashMap;
use std::sync::{Arc, mpsc};

use super::disk::{Disk, Record, StoreError};
use super::state::Change;
use super::{Answer, Job, Shared, Write, WriteError};
use crate::error::ApiError;
use crate::object::Object;

/// Changes per commit: more would only make the first one wait.
const BATCH: usize = 256;

type Waiting = tokio::sync::oneshot::Sender<Answer>;

pub(super) struct Writer {
    disk: Disk,
    shared: Arc<Shared>,
    /// A batch whose commit failed in a way that leaves open whether it is on the disk.
    in_doubt: Vec<Change>,
}

/// Objects as this batch leaves them, over the published state.
type Overlay = HashMap<(usize, String), Option<Arc<Object>>>;

impl Writer {
    pub(super) fn new(disk: Disk, shared: Arc<Shared>) -> Self {
        Self { disk, shared, in_doubt: Vec::new() }
    }

    /// Runs until the last sender is gone.
    pub(super) fn run(mut self, queue: &mpsc::Receiver<Job>) {
        while let Ok(first) = queue.recv() {
            let mut jobs = vec![first];
            while jobs.len() < BATCH
                && let Ok(job) = queue.try_recv()
            {
                jobs.push(job);
            }
            self.perform(jobs);
        }
    }

    fn perform(&mut self, jobs: Vec<Job>) {
        if let Err(error) = self.settle() {
            return refuse(jobs.into_iter().map(|(_, waiting)| waiting), &error);
        }
        let (changes, waiting) = self.prepare(jobs);
        if changes.is_empty() {
            return;
        }
        let committed = self.disk.commit(&changes.iter().map(record).collect::<Vec<_>>());
        if let Err(error) = committed {
            self.in_doubt = changes.clone();
            // The disk knows whether the commit reached it; only when it cannot be asked is the
            // doubt kept for the next batch.
            match self.settle() {
                Ok(true) => {}
                Ok(false) | Err(_) => return refuse(waiting.into_iter(), &error),
            }
        } else {
            self.shared.publish(changes.clone());
        }
        for (change, waiting) in changes.into_iter().zip(waiting) {
            // The asker may have gone away; the change stands.
            drop(waiting.send(Ok(change.object)));
        }
    }

    /// Finds out whether a batch in doubt was committed, and publishes it if so.
    fn settle(&mut self) -> Result<bool, StoreError> {
        let revision = self.disk.revision()?;
        let doubtful = std::mem::take(&mut self.in_doubt);
        let committed = doubtful.last().is_some_and(|last| last.object.revision <= revision);
        if committed {
            self.shared.publish(doubtful);
        }
        Ok(committed)
    }

    fn prepare(&self, jobs: Vec<Job>) -> (Vec<Change>, Vec<Waiting>) {
        let state = self.shared.read();
        let mut overlay = Overlay::new();
        let (mut changes, mut answers) = (Vec::new(), Vec::new());
        let mut revision = state.revision;
        for (write, answer) in jobs {
            let place = (write.kind.id, write.key.clone());
            let current = match overlay.get(&place) {
                Some(changed) => changed.clone(),
                None => state.get(write.kind, &write.key),
            };
            if current.as_ref().map_or(0, |o| o.revision) != write.seen {
                drop(answer.send(Err(WriteError::Changed)));
                continue;
            }
            revision += 1;
            let change = change(write, current, revision);
            overlay.insert(place, (!change.deleted).then(|| Arc::clone(&change.object)));
            changes.push(change);
            answers.push(answer);
        }
        (changes, answers)
    }
}

fn change(write: Write, previous: Option<Arc<Object>>, revision: u64) -> Change {
    let deleted = write.value.is_none();
    let mut value =
        write.value.or_else(|| previous.as_ref().map(|object| object.value())).unwrap_or_default();
    value["metadata"]["resourceVersion"] = revision.to_string().into();
    let object = Arc::new(Object::new(write.kind, revision, &value));
    Change { object, previous, deleted }
}

fn record(change: &Change) -> Record<'_> {
    Record {
        kind: change.object.kind,
        key: change.object.key(),
        revision: change.object.revision,
        json: (!change.deleted).then_some(&change.object.json),
    }
}

fn refuse(waiting: impl Iterator<Item = Waiting>, error: &StoreError) {
    tracing::warn!(%error, "The store cannot be written; reads keep working");
    let text = format!("cannot store the change: {:#}", anyhow::anyhow!(error.to_string()));
    let refusal = if error.is_full() {
        ApiError::new(
            507,
            "InsufficientStorage",
            format!(
                "{text}; nothing was changed and reads keep working: free space there and try again"
            ),
        )
    } else {
        ApiError::internal(text)
    };
    for answer in waiting {
        drop(answer.send(Err(WriteError::Disk(refusal.clone()))));
    }
}
