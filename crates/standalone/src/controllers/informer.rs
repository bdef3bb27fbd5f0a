//! Keeps the tables of [`Cluster`] equal to the store and tells the observers of each difference.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::Metadata;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use super::cluster::{Change, Cluster, Delta, Key, Table};
use super::worker::Observer;
use crate::kinds::{self, Kind};
use crate::{EventType, Object, Registry, Selector};

/// One kind's way from the store into its table.
pub(crate) struct Informer<T: 'static> {
    registry: Registry,
    cluster: Arc<Cluster>,
    kind: &'static Kind,
    table: fn(&Cluster) -> &Table<T>,
    change: fn(Delta<T>) -> Change,
    /// Whether an object is worth keeping.
    wanted: fn(&Object) -> bool,
    observers: Arc<[Arc<dyn Observer>]>,
}

/// Everything that an informer needs besides its kind.
pub(crate) struct Informers {
    pub(crate) registry: Registry,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) observers: Arc<[Arc<dyn Observer>]>,
}

impl Informers {
    pub(crate) fn of<T: k8s_openapi::Resource>(
        &self,
        table: fn(&Cluster) -> &Table<T>,
        change: fn(Delta<T>) -> Change,
        wanted: fn(&Object) -> bool,
    ) -> Option<Informer<T>> {
        Some(Informer {
            registry: self.registry.clone(),
            cluster: self.cluster.clone(),
            kind: kinds::of::<T>()?,
            table,
            change,
            wanted,
            observers: self.observers.clone(),
        })
    }
}

impl<T> Informer<T>
where
    T: Metadata<Ty = ObjectMeta> + DeserializeOwned + Send + Sync + 'static,
{
    /// Brings the table up to date from a list. Returns the revision to watch from.
    ///
    /// At the first time this only fills the table: nobody is told, since other tables may still be empty.
    pub(crate) fn list(&self, tell: bool) -> u64 {
        let (objects, revision) = self.registry.list(self.kind, "", &Selector::default());
        let table = (self.table)(&self.cluster);
        let mut gone: HashMap<Key, ()> = table.keys().into_iter().map(|key| (key, ())).collect();
        for object in objects.iter().filter(|object| (self.wanted)(object)) {
            gone.remove(&key(object));
            self.put(object, tell);
        }
        for (key, ()) in gone {
            let old = table.set(key, None, revision);
            self.tell(tell, Delta { old, new: None });
        }
        table.caught_up(revision);
        revision
    }

    /// Tells the observers of all that is in the table, as if it were new.
    pub(crate) fn announce(&self) {
        for object in (self.table)(&self.cluster).all() {
            self.tell(true, Delta { old: None, new: Some(object) });
        }
    }

    /// Follows the watch until cancelled.
    pub(crate) async fn run(self, mut revision: u64, cancel: CancellationToken) {
        loop {
            // Cancellation-safe: an event is taken from the watch only when it is returned.
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = self.follow(revision) => {}
            }
            // The history was forgotten before it was read. Not at once again, lest a store that has ended spin us.
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
            revision = self.list(true);
        }
    }

    async fn follow(&self, revision: u64) {
        let watch = self.registry.watch(self.kind, "", Selector::default(), revision);
        let Ok(mut watch) = watch else { return };
        loop {
            match watch.next().await {
                Ok(event) => self.apply(event.event, &event.object),
                Err(error) => {
                    debug!(kind = self.kind.kind, %error, "Watch ended, listing again");
                    return;
                }
            }
        }
    }

    fn apply(&self, event: EventType, object: &Object) {
        if event != EventType::Deleted && (self.wanted)(object) {
            self.put(object, true);
            return;
        }
        let table = (self.table)(&self.cluster);
        let old = table.set(key(object), None, object.revision);
        if old.is_some() {
            self.tell(true, Delta { old, new: None });
        }
    }

    fn put(&self, object: &Object, tell: bool) {
        let table = (self.table)(&self.cluster);
        match object.parse::<T>() {
            Ok(parsed) => {
                let new = Arc::new(parsed);
                let old = table.set(key(object), Some(new.clone()), object.revision);
                self.tell(tell, Delta { old, new: Some(new) });
            }
            Err(error) => {
                error!(kind = self.kind.kind, object = %key(object), %error, "Stored object cannot be read, ignoring it");
            }
        }
    }

    fn tell(&self, tell: bool, delta: Delta<T>) {
        if !tell {
            return;
        }
        let change = (self.change)(delta);
        for observer in &*self.observers {
            observer.observe(&change);
        }
    }
}

fn key(object: &Object) -> Key {
    Key::new(&object.namespace, &object.name)
}
