//! Garbage collection: what belongs to an owner that is gone goes too, in the background, in the foreground, or not at
//! all when it is to be orphaned.

mod graph;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use serde::Deserialize;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use self::graph::{Entry, FOREGROUND, Graph, Id, ORPHAN, Owner, Verdict, judge};
use super::adoption_patch;
use super::cluster::{Change, Key};
use super::queue::Outcome;
use super::worker::{Controller, Worker};
use crate::kinds::{self, Kind};
use crate::{
    ApiError, DeleteOptions, EventType, Object, PatchType, Preconditions, Propagation, Registry,
    Selector,
};

/// The garbage collector.
pub(crate) struct Garbage {
    registry: Registry,
    graph: Mutex<Graph>,
}

/// Only the metadata: this works on all kinds alike.
#[derive(Deserialize)]
struct Partial {
    #[serde(default)]
    metadata: ObjectMeta,
}

impl Garbage {
    pub(crate) fn new(registry: &Registry) -> Self {
        Self { registry: registry.clone(), graph: Mutex::new(Graph::default()) }
    }

    /// Looks at one kind until cancelled and tells `worker` what needs a look.
    pub(crate) async fn follow(
        worker: Arc<Worker<Self>>,
        kind: &'static Kind,
        cancel: CancellationToken,
    ) {
        loop {
            // Cancellation-safe: an event is taken from the watch only when it is returned.
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = follow_once(&worker, kind) => {}
            }
            // Not at once again, lest a store that has ended spin us.
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
        }
    }

    fn observe(&self, object: &Object, gone: bool) -> Vec<Id> {
        let id = id_of(object);
        let Some(meta) = metadata(object) else { return Vec::new() };
        if gone {
            self.lock().gone(&id, meta.uid.as_deref().unwrap_or_default())
        } else {
            self.lock().put(id, Entry::of(&meta))
        }
    }

    fn owner_state(&self, owner: &OwnerReference, namespace: &str) -> Owner {
        let kind = kinds::all()
            .iter()
            .copied()
            .find(|kind| kind.api_version() == owner.api_version && kind.kind == owner.kind);
        // Of a kind that is not served here nothing can be said: never delete on ignorance.
        let Some(kind) = kind else { return Owner::Solid };
        let namespace = if kind.namespaced { namespace } else { "" };
        let found = self.registry.get(kind, namespace, &owner.name).ok();
        let Some(meta) = found.and_then(|object| metadata(&object)) else { return Owner::Absent };
        if meta.uid.as_deref() != Some(owner.uid.as_str()) {
            return Owner::Absent;
        }
        if Entry::of(&meta).waits_for(FOREGROUND) { Owner::Waiting } else { Owner::Solid }
    }

    async fn release_dependents(&self, id: &Id, uid: &str) -> Result<(), ApiError> {
        let dependents = self.lock().dependents_of(uid);
        for dependent in dependents {
            match self.fetch(&dependent) {
                Some(meta) => self.drop_owners(&dependent, &meta, &[uid.to_owned()]).await?,
                None => continue,
            }
        }
        self.remove_finalizer(id, ORPHAN).await
    }

    async fn drop_owners(
        &self,
        id: &Id,
        meta: &ObjectMeta,
        uids: &[String],
    ) -> Result<(), ApiError> {
        let mut meta = meta.clone();
        if let Some(owners) = &mut meta.owner_references {
            owners.retain(|owner| !uids.contains(&owner.uid));
        }
        self.patch(id, &adoption_patch(&meta, None, None)).await
    }

    async fn remove_finalizer(&self, id: &Id, finalizer: &str) -> Result<(), ApiError> {
        let Some(meta) = self.fetch(id) else { return Ok(()) };
        let mut finalizers = meta.finalizers.clone().unwrap_or_default();
        finalizers.retain(|held| held != finalizer);
        let patch = json!({"metadata": {
            "uid": meta.uid,
            "resourceVersion": meta.resource_version,
            "finalizers": finalizers,
        }});
        self.patch(id, &patch).await
    }

    async fn patch(&self, id: &Id, patch: &serde_json::Value) -> Result<(), ApiError> {
        let (namespace, name) = (&id.key.namespace, &id.key.name);
        let patched =
            self.registry.patch(id.kind(), namespace, name, PatchType::Merge, patch).await;
        match patched {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    async fn delete(
        &self,
        id: &Id,
        meta: &ObjectMeta,
        propagation: Propagation,
    ) -> Result<(), ApiError> {
        let preconditions = Preconditions {
            uid: meta.uid.clone(),
            // An owner that was added meanwhile changes the verdict.
            resource_version: meta.resource_version.clone(),
        };
        let options = DeleteOptions {
            propagation: Some(propagation),
            preconditions,
            ..DeleteOptions::default()
        };
        let (namespace, name) = (&id.key.namespace, &id.key.name);
        match self.registry.delete(id.kind(), namespace, name, &options).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => {
                info!(object = %id, "Deleted, since its owner is gone");
                Ok(())
            }
        }
    }

    fn fetch(&self, id: &Id) -> Option<ObjectMeta> {
        let object = self.registry.get(id.kind(), &id.key.namespace, &id.key.name).ok()?;
        metadata(&object)
    }

    fn lock(&self) -> MutexGuard<'_, Graph> {
        self.graph.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Controller for Garbage {
    const NAME: &'static str = "garbage-collector";
    type Key = Id;

    fn affected(&self, _change: &Change, _add: &mut dyn FnMut(Id)) {
        // It looks at all kinds by itself, see `follow`.
    }

    async fn reconcile(&self, id: &Id) -> Result<Outcome, ApiError> {
        let Some(meta) = self.fetch(id) else { return Ok(Outcome::Done) };
        let entry = Entry::of(&meta);
        let uid = entry.uid.clone();
        if entry.waits_for(ORPHAN) {
            self.release_dependents(id, &uid).await?;
            return Ok(Outcome::Done);
        }
        if entry.waits_for(FOREGROUND) {
            if self.lock().blocking(&uid) == 0 {
                self.remove_finalizer(id, FOREGROUND).await?;
            }
            return Ok(Outcome::Done);
        }
        let owners: Vec<(String, Owner)> = meta
            .owner_references
            .iter()
            .flatten()
            .map(|owner| (owner.uid.clone(), self.owner_state(owner, &id.key.namespace)))
            .collect();
        let has_dependents = !self.lock().dependents_of(&uid).is_empty();
        match judge(&entry, &owners, has_dependents) {
            Verdict::Keep => {}
            Verdict::Delete(propagation) => self.delete(id, &meta, propagation).await?,
            Verdict::DropOwners(uids) => self.drop_owners(id, &meta, &uids).await?,
        }
        Ok(Outcome::Done)
    }
}

async fn follow_once(worker: &Worker<Garbage>, kind: &'static Kind) {
    let garbage = worker.controller();
    let (objects, revision) = garbage.registry.list(kind, "", &Selector::default());
    let listed: HashSet<Id> = objects.iter().map(|object| id_of(object)).collect();
    let vanished = garbage.lock().of_kind(kind.id);
    let mut look: Vec<Id> =
        objects.iter().flat_map(|object| garbage.observe(object, false)).collect();
    for (id, uid) in vanished.into_iter().filter(|(id, _)| !listed.contains(id)) {
        look.extend(garbage.lock().gone(&id, &uid));
    }
    look.into_iter().for_each(|id| worker.add(id));
    let watch = garbage.registry.watch(kind, "", Selector::default(), revision);
    let Ok(mut watch) = watch else { return };
    loop {
        match watch.next().await {
            Ok(event) => {
                let gone = event.event == EventType::Deleted;
                garbage.observe(&event.object, gone).into_iter().for_each(|id| worker.add(id));
            }
            Err(error) => {
                debug!(kind = kind.kind, %error, "Watch ended, listing again");
                return;
            }
        }
    }
}

fn id_of(object: &Object) -> Id {
    Id { kind: object.kind.id, key: Key::new(&object.namespace, &object.name) }
}

fn metadata(object: &Object) -> Option<ObjectMeta> {
    Some(object.parse::<Partial>().ok()?.metadata)
}

/// The kinds that can own or be owned. Events are left out: there are many, and they live for an hour only.
pub(crate) fn kinds_to_follow() -> impl Iterator<Item = &'static Kind> {
    kinds::all().iter().copied().filter(|kind| kind.kind != "Event")
}
