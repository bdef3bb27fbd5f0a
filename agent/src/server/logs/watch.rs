//! Changes in folders of logs, seen through one inotify instance for all followers.
//!
//! The number of instances of a user is small (128 is usual), and containers that run as root share it with the agent.
//! Where no change can be watched, a follower looks once a second.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use inotify::{EventMask, EventOwned, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::sync::broadcast;
use tracing::{debug, warn};

/// Changes that a follower may be behind; one that is further behind looks at the file all the same.
const BEHIND: usize = 64;
const POLL: Duration = Duration::from_secs(1);

/// All folders that are watched.
#[derive(Clone, Default)]
pub(super) struct Folders(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    watches: Option<Watches>,
    folders: HashMap<WatchDescriptor, Watched>,
    /// That folders cannot be watched is said once.
    warned: bool,
}

struct Watched {
    followers: usize,
    changes: broadcast::Sender<Change>,
}

#[derive(Debug, Clone)]
struct Change {
    name: Option<OsString>,
    /// The file's writer is done with it.
    closed: bool,
}

/// How one follower learns of changes.
pub(super) enum Changes {
    Watched(Subscription),
    Polled,
}

pub(super) struct Subscription {
    folders: Folders,
    watch: WatchDescriptor,
    changes: broadcast::Receiver<Change>,
}

impl Folders {
    /// Watches a folder from now on.
    pub(super) fn changes(&self, folder: &Path) -> Changes {
        match self.subscribe(folder) {
            Ok(subscription) => Changes::Watched(subscription),
            Err(error) => {
                let first = !std::mem::replace(&mut self.state().warned, true);
                if first {
                    warn!(%error, "Cannot watch logs, followers look once a second; hint: raise \
                        fs.inotify.max_user_instances and max_user_watches");
                }
                Changes::Polled
            }
        }
    }

    fn subscribe(&self, folder: &Path) -> io::Result<Subscription> {
        let mut state = self.state();
        if state.watches.is_none() {
            let inotify = Inotify::init()?;
            state.watches = Some(inotify.watches());
            let events = inotify.into_event_stream(vec![0; 16 * 1024])?;
            keelson_supervise::spawn("log watcher", self.clone().pass_on(events));
        }
        let mask =
            WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::CLOSE_WRITE;
        let Some(watches) = state.watches.as_mut() else { return Err(io::Error::other("gone")) };
        let watch = watches.add(folder, mask)?;
        let watched = state
            .folders
            .entry(watch.clone())
            .or_insert_with(|| Watched { followers: 0, changes: broadcast::Sender::new(BEHIND) });
        watched.followers += 1;
        let changes = watched.changes.subscribe();
        Ok(Subscription { folders: self.clone(), watch, changes })
    }

    async fn pass_on(self, mut events: inotify::EventStream<Vec<u8>>) {
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => self.on_event(event),
                Err(error) => {
                    debug!(%error, "Changes of logs cannot be read");
                    break;
                }
            }
        }
        // Followers see that their changes ended, and the next one begins again.
        *self.state() = State::default();
    }

    fn on_event(&self, event: EventOwned) {
        let mut state = self.state();
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            let all = Change { name: None, closed: false };
            for folder in state.folders.values() {
                // Without a follower that still listens there is nothing to tell.
                folder.changes.send(all.clone()).ok();
            }
        } else if event.mask.contains(EventMask::IGNORED) {
            // The folder is gone, and its followers look by themselves.
            state.folders.remove(&event.wd);
        } else if let Some(folder) = state.folders.get(&event.wd) {
            let closed = event.mask.contains(EventMask::CLOSE_WRITE);
            folder.changes.send(Change { name: event.name, closed }).ok();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Changes {
    /// Waits until something may have changed; `true` when the writer of the file `own` has closed it.
    pub(super) async fn next(&mut self, own: &OsStr) -> bool {
        let Self::Watched(subscription) = self else {
            tokio::time::sleep(POLL).await;
            return false;
        };
        match subscription.changes.recv().await {
            Ok(change) => change.closed && change.name.as_deref() == Some(own),
            Err(broadcast::error::RecvError::Lagged(_)) => false,
            Err(broadcast::error::RecvError::Closed) => {
                *self = Self::Polled;
                false
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.folders.state();
        let Some(watched) = state.folders.get_mut(&self.watch) else { return };
        watched.followers = watched.followers.saturating_sub(1);
        if watched.followers == 0 {
            state.folders.remove(&self.watch);
            if let Some(watches) = state.watches.as_mut()
                && let Err(error) = watches.remove(self.watch.clone())
            {
                debug!(%error, "A folder of logs was not watched any more");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn many_followers_share_one_instance_and_leave_no_watch_behind() {
        let (folders, dir) = (Folders::default(), tempfile::tempdir().unwrap());
        let mut all: Vec<Changes> = (0..500).map(|_| folders.changes(dir.path())).collect();
        assert!(all.iter().all(|changes| matches!(changes, Changes::Watched(_))));
        assert_eq!(folders.state().folders.len(), 1);
        std::fs::write(dir.path().join("0.log"), "x").unwrap();
        for changes in &mut all {
            while !changes.next(OsStr::new("0.log")).await {}
        }
        drop(all);
        assert!(folders.state().folders.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_watched_is_looked_at() {
        let (folders, dir) = (Folders::default(), tempfile::tempdir().unwrap());
        let mut changes = folders.changes(&dir.path().join("gone"));
        assert!(!changes.next(OsStr::new("0.log")).await);
        assert!(matches!(changes, Changes::Polled));
    }
}
