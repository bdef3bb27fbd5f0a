//! The API in the process: what REST clients get, without HTTP.
//!
//! [`Registry`] works on any kind as JSON; [`Api`] is the same for one type of `k8s-openapi`.

mod typed;

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

pub use self::typed::{Api, TypedEvent, TypedWatch};
use crate::error::ApiError;
use crate::kinds::Kind;
use crate::object::{Object, key};
use crate::selectors::Selector;
use crate::store::{Store, StoreError, Watch, Write, WriteError};

/// The API server without its network side. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
}

/// What happens to the dependents of a deleted object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// The object goes last; it waits with the finalizer `foregroundDeletion`.
    Foreground,
    /// The object goes now, its dependents after it.
    Background,
    /// The dependents stay; the object waits with the finalizer `orphan` until they are freed.
    Orphan,
}

/// What must be true of the object for a deletion to happen.
#[derive(Debug, Clone, Default)]
pub struct Preconditions {
    /// Its uid.
    pub uid: Option<String>,
    /// Its resourceVersion.
    pub resource_version: Option<String>,
}

/// How to delete.
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    /// Seconds that a pod gets to end; 0 removes it at once. None: what the pod says.
    pub grace_period_seconds: Option<i64>,
    /// What happens to dependents. None: in the background.
    pub propagation: Option<Propagation>,
    /// What must be true.
    pub preconditions: Preconditions,
}

/// How to read a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchType {
    /// RFC 6902.
    Json,
    /// RFC 7396.
    Merge,
    /// Kubernetes' own: lists are merged by key.
    Strategic,
}

impl Registry {
    /// Opens the store below `data_dir` and everything over it.
    ///
    /// # Errors
    /// When the store cannot be opened.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let store = Store::open(&data_dir.join("store.redb"))?;
        Ok(Self { inner: Arc::new(Inner { store }) })
    }

    /// One object.
    ///
    /// # Errors
    /// 404 when it is not there.
    pub fn get(&self, kind: &'static Kind, namespace: &str, name: &str) -> Result<Arc<Object>, ApiError> {
        self.inner.store.get(kind, namespace, name).ok_or_else(|| ApiError::not_found(kind, name))
    }

    /// All objects of a kind (of one namespace, or with an empty name of all), and the revision to
    /// watch from.
    #[must_use]
    pub fn list(&self, kind: &'static Kind, namespace: &str, selector: &Selector) -> (Vec<Arc<Object>>, u64) {
        let state = self.inner.store.read();
        let items = state.scan(kind, namespace).filter(|o| selector.matches(o)).cloned().collect();
        (items, state.revision)
    }

    /// Changes after `revision` (from [`Self::list`]), in order, each once.
    ///
    /// # Errors
    /// 410 when changes after it are forgotten: list again.
    pub fn watch(
        &self,
        kind: &'static Kind,
        namespace: &str,
        selector: Selector,
        revision: u64,
    ) -> Result<Watch, ApiError> {
        Watch::after(self.inner.store.shared(), kind, namespace, selector, revision)
    }

    /// Makes an object. An empty `namespace` takes the object's own.
    ///
    /// # Errors
    /// 409, 422, 403, 404 (its namespace), 507 as Kubernetes does.
    pub async fn create(
        &self,
        kind: &'static Kind,
        namespace: &str,
        mut value: Value,
    ) -> Result<Arc<Object>, ApiError> {
        if kind.namespaced && !namespace.is_empty() {
            value["metadata"]["namespace"] = namespace.into();
        }
        let name = value["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let namespace = value["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let write = Write { kind, key: key(&namespace, &name), seen: 0, value: Some(value) };
        self.inner.store.write(write).await.map_err(|error| match error {
            WriteError::Changed => ApiError::already_exists(kind, &name),
            WriteError::Disk(error) => error,
        })
    }

    /// Replaces an object. With a resourceVersion inside it must be the newest.
    ///
    /// # Errors
    /// 404, 409, 422, 507.
    pub async fn update(&self, kind: &'static Kind, value: Value) -> Result<Arc<Object>, ApiError> {
        let name = value["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let namespace = value["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let current = self.get(kind, &namespace, &name)?;
        let seen = match value["metadata"]["resourceVersion"].as_str() {
            None | Some("") => current.revision,
            Some(text) => text.parse().unwrap_or(0),
        };
        let write = Write { kind, key: key(&namespace, &name), seen, value: Some(value) };
        self.inner.store.write(write).await.map_err(|error| match error {
            WriteError::Changed => ApiError::modified(kind, &name),
            WriteError::Disk(error) => error,
        })
    }

    /// Replaces an object's status, and nothing else.
    ///
    /// # Errors
    /// 404, 409, 422, 507.
    pub async fn update_status(&self, kind: &'static Kind, value: Value) -> Result<Arc<Object>, ApiError> {
        let name = value["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let namespace = value["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let mut new = self.get(kind, &namespace, &name)?.value();
        new["status"] = value["status"].clone();
        new["metadata"]["resourceVersion"] = value["metadata"]["resourceVersion"].clone();
        self.update(kind, new).await
    }

    /// Changes an object by a patch; tried again when somebody else was faster.
    ///
    /// # Errors
    /// 404, 409 (when the patch names a resourceVersion), 422, 507.
    pub async fn patch(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        how: PatchType,
        patch: &Value,
    ) -> Result<Arc<Object>, ApiError> {
        let mut new = self.get(kind, namespace, name)?.value();
        match how {
            PatchType::Merge | PatchType::Strategic => json_patch::merge(&mut new, patch),
            PatchType::Json => return Err(ApiError::bad_request("not yet")),
        }
        self.update(kind, new).await
    }

    /// Deletes an object, or begins to: with finalizers, or as a pod on a node, it stays for a while.
    ///
    /// # Errors
    /// 404, 409 when a precondition is not met, 507.
    pub async fn delete(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<Arc<Object>, ApiError> {
        let _ = options;
        let current = self.get(kind, namespace, name)?;
        let write =
            Write { kind, key: current.key(), seen: current.revision, value: None };
        self.inner.store.write(write).await.map_err(|error| match error {
            WriteError::Changed => ApiError::modified(kind, name),
            WriteError::Disk(error) => error,
        })
    }
}
