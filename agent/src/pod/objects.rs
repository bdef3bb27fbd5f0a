//! Config maps and secrets that pods of this node refer to, and no others.
//!
//! Each is read once and then watched by name while a pod uses it. Pods are woken when one of theirs changes.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, WatchEvent, WatchParams};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::bell::Bell;
use crate::env::Keys;

/// Names one object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ObjectKey {
    pub kind: ObjectKind,
    pub namespace: String,
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ObjectKind {
    ConfigMap,
    Secret,
}

/// The object cannot be read now.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum ObjectError {
    #[error("cannot read {kind:?} {namespace}/{name}: {problem}")]
    Api { kind: ObjectKind, namespace: String, name: String, problem: String },
    #[error("{kind:?} {namespace}/{name} cannot be read: this node has no API server")]
    NoApi { kind: ObjectKind, namespace: String, name: String },
}

#[derive(Debug, Clone)]
enum Known {
    NotYet,
    Failed(String),
    /// `None`: there is no such object.
    Is(Option<Arc<Keys>>),
}

/// The cache.
pub(super) struct ObjectCache {
    client: Option<kube::Client>,
    entries: Mutex<HashMap<ObjectKey, Entry>>,
}

struct Entry {
    known: watch::Receiver<Known>,
    users: Users,
    task: JoinHandle<()>,
}

type Users = Arc<Mutex<HashMap<String, Arc<Bell>>>>;

impl Drop for Entry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ObjectCache {
    pub(super) fn new(client: Option<kube::Client>) -> Self {
        Self { client, entries: Mutex::default() }
    }

    /// Says which objects a pod uses from now on; watches of objects that nobody uses any more end.
    pub(super) fn subscribe(&self, uid: &str, keys: &BTreeSet<ObjectKey>, bell: &Arc<Bell>) {
        let Some(client) = &self.client else { return };
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        for key in keys {
            let entry = entries.entry(key.clone()).or_insert_with(|| watch_object(client, key));
            lock(&entry.users).insert(uid.to_owned(), bell.clone());
        }
        entries.retain(|key, entry| {
            let mut users = lock(&entry.users);
            if !keys.contains(key) {
                users.remove(uid);
            }
            !users.is_empty()
        });
    }

    pub(super) fn release(&self, uid: &str) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, entry| {
            let mut users = lock(&entry.users);
            users.remove(uid);
            !users.is_empty()
        });
    }

    /// The object's content, `None` when it does not exist. Waits for the first answer. The caller has subscribed.
    pub(super) async fn get(&self, key: &ObjectKey) -> Result<Option<Arc<Keys>>, ObjectError> {
        let known = {
            let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            entries.get(key).map(|entry| entry.known.clone())
        };
        let (kind, namespace, name) = (key.kind, key.namespace.clone(), key.name.clone());
        let Some(mut known) = known else {
            return Err(ObjectError::NoApi { kind, namespace, name });
        };
        let answer = known.wait_for(|known| !matches!(known, Known::NotYet)).await;
        let problem = match answer.as_deref() {
            Ok(Known::Is(keys)) => return Ok(keys.clone()),
            Ok(Known::Failed(problem)) => problem.clone(),
            _ => "the watch has ended".to_owned(),
        };
        Err(ObjectError::Api { kind, namespace, name, problem })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch_object(client: &kube::Client, key: &ObjectKey) -> Entry {
    let (told, known) = watch::channel(Known::NotYet);
    let users = Users::default();
    let watcher = Watcher { key: key.clone(), told, users: users.clone() };
    let client = client.clone();
    let task = match key.kind {
        ObjectKind::ConfigMap => tokio::spawn(watcher.run::<ConfigMap>(client)),
        ObjectKind::Secret => tokio::spawn(watcher.run::<Secret>(client)),
    };
    Entry { known, users, task }
}

trait Content: Clone + std::fmt::Debug + DeserializeOwned + Send + 'static {
    fn meta(&self) -> &ObjectMeta;
    fn keys(self) -> Keys;
}

impl Content for ConfigMap {
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn keys(self) -> Keys {
        let text = self.data.into_iter().flatten().map(|(key, value)| (key, value.into_bytes()));
        let binary = self.binary_data.into_iter().flatten().map(|(key, value)| (key, value.0));
        text.chain(binary).collect()
    }
}

impl Content for Secret {
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn keys(self) -> Keys {
        self.data.into_iter().flatten().map(|(key, value)| (key, value.0)).collect()
    }
}

struct Watcher {
    key: ObjectKey,
    told: watch::Sender<Known>,
    users: Users,
}

impl Watcher {
    async fn run<K>(self, client: kube::Client)
    where
        K: Content + kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        let api: Api<K> = Api::namespaced(client, &self.key.namespace);
        let mut delay = Duration::from_millis(500);
        loop {
            match self.follow(&api).await {
                Ok(()) => delay = Duration::from_millis(500),
                Err(error) => {
                    self.failed(&error);
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(Duration::from_secs(30));
                }
            }
        }
    }

    /// Reads the object and follows its changes until the watch ends, as the API server ends each now and then.
    async fn follow<K: Content>(&self, api: &Api<K>) -> Result<(), kube::Error> {
        let found = api.get_opt(&self.key.name).await?;
        // Without the object there is no version to begin from: "0" is whatever the server has at hand.
        let version = found.as_ref().and_then(|object| object.meta().resource_version.clone());
        let version = version.unwrap_or_else(|| "0".into());
        self.tell(found.map(Content::keys));
        let params = WatchParams::default().fields(&format!("metadata.name={}", self.key.name));
        let mut events = api.watch(&params, &version).await?.boxed();
        while let Some(event) = events.try_next().await? {
            match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    self.tell(Some(object.keys()));
                }
                WatchEvent::Deleted(_) => self.tell(None),
                WatchEvent::Bookmark(_) => {}
                WatchEvent::Error(_) => return Ok(()),
            }
        }
        Ok(())
    }

    fn tell(&self, keys: Option<Keys>) {
        let (first, changed) = match (&*self.told.borrow(), &keys) {
            (Known::Is(Some(old)), Some(new)) => (false, **old != *new),
            (Known::Is(None), None) => (false, false),
            // Whoever asked is waiting for this answer and needs no bell.
            (Known::NotYet, _) => (true, true),
            _ => (false, true),
        };
        if !changed {
            return;
        }
        self.told.send_replace(Known::Is(keys.map(Arc::new)));
        if first {
            return;
        }
        for bell in lock(&self.users).values() {
            bell.ring_objects();
        }
    }

    /// What was known stays known while the API is away.
    fn failed(&self, error: &kube::Error) {
        let problem = match error {
            kube::Error::Api(status) => status.message.clone(),
            other => other.to_string(),
        };
        tracing::debug!(object = %self.key.name, error = problem, "Object not readable");
        self.told.send_if_modified(|known| match known {
            Known::Is(_) => false,
            other => {
                *other = Known::Failed(problem);
                true
            }
        });
    }
}
