//! The API in the process: what REST clients get, without HTTP.
//!
//! [`Registry`] works on any kind as JSON; [`Api`] is the same for one type of `k8s-openapi`.

pub(crate) mod bounded_patch;
mod create;
mod delete;
mod meta;
pub(crate) mod patching;
mod pods;
mod typed;
mod update;

use std::path::Path;
use std::sync::{Arc, RwLockReadGuard};

use serde_json::Value;

pub(crate) use self::meta::now;
pub(crate) use self::patching::Target;
pub use self::typed::{Api, TypedEvent, TypedWatch};
use crate::allocation::Allocator;
use crate::error::ApiError;
use crate::kinds::{self, Kind};
use crate::object::Object;
use crate::selectors::Selector;
use crate::store::{State, Store, StoreError, Watch, Write, WriteError};

pub use crate::allocation::ServiceNetwork;

/// The API server without its network side. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    allocator: Allocator,
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
    /// Server-side apply.
    Apply,
}

/// How a REST client wants a write to be done.
#[derive(Debug, Clone, Default)]
pub(crate) struct WriteOptions {
    /// Check everything, change nothing.
    pub(crate) dry_run: bool,
    /// Who applies, for server-side apply.
    pub(crate) manager: String,
    /// Take fields from other appliers.
    pub(crate) force: bool,
}

/// Which part of an object a write may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// All but the status, where that is a part of its own.
    Object,
    Status,
    /// A namespace's `spec.finalizers`.
    Finalize,
    /// A pod's ephemeral containers.
    Ephemeral,
}

impl From<&str> for Part {
    fn from(subresource: &str) -> Self {
        match subresource {
            "status" => Self::Status,
            "finalize" => Self::Finalize,
            "ephemeralcontainers" => Self::Ephemeral,
            _ => Self::Object,
        }
    }
}

impl Registry {
    /// Opens the store below `data_dir` with Kubernetes' usual service network.
    ///
    /// # Errors
    /// When the store cannot be opened.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(data_dir, ServiceNetwork::default())
    }

    /// Opens the store below `data_dir` and everything over it.
    ///
    /// # Errors
    /// When the store cannot be opened.
    pub fn open_with(data_dir: &Path, network: ServiceNetwork) -> Result<Self, StoreError> {
        let store = Store::open(&data_dir.join("store.redb"))?;
        let allocator = Allocator::new(network);
        for service in store.read().scan(&kinds::SERVICE, "") {
            allocator.restore(&service.value());
        }
        Ok(Self { inner: Arc::new(Inner { store, allocator }) })
    }

    pub(crate) fn state(&self) -> RwLockReadGuard<'_, State> {
        self.inner.store.read()
    }

    /// The addresses and ports that Services get.
    #[must_use]
    pub fn service_network(&self) -> &ServiceNetwork {
        self.inner.allocator.network()
    }

    /// One object.
    ///
    /// # Errors
    /// 404 when it is not there.
    pub fn get(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<Object>, ApiError> {
        self.inner.store.get(kind, namespace, name).ok_or_else(|| ApiError::not_found(kind, name))
    }

    /// All objects of a kind (of one namespace, or with an empty name of all), and the revision to
    /// watch from.
    #[must_use]
    pub fn list(
        &self,
        kind: &'static Kind,
        namespace: &str,
        selector: &Selector,
    ) -> (Vec<Arc<Object>>, u64) {
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
        value: Value,
    ) -> Result<Arc<Object>, ApiError> {
        let own = value["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let namespace = if namespace.is_empty() { own.as_str() } else { namespace };
        self.create_with(kind, namespace, value, &WriteOptions::default()).await
    }

    /// Replaces an object. With a resourceVersion inside it must be the newest.
    ///
    /// # Errors
    /// 404, 409, 422, 507.
    pub async fn update(&self, kind: &'static Kind, value: Value) -> Result<Arc<Object>, ApiError> {
        self.update_with(kind, value, Part::Object, &WriteOptions::default()).await
    }

    /// Replaces an object's status, and nothing else.
    ///
    /// # Errors
    /// 404, 409, 422, 507.
    pub async fn update_status(
        &self,
        kind: &'static Kind,
        value: Value,
    ) -> Result<Arc<Object>, ApiError> {
        self.update_with(kind, value, Part::Status, &WriteOptions::default()).await
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
        let target = patching::Target { kind, namespace, name, part: Part::Object };
        let options = WriteOptions::default();
        Ok(self.patch_target(&target, how, patch, false, &options).await?.object)
    }

    /// Changes an object's status by a patch.
    ///
    /// # Errors
    /// As [`Self::patch`].
    pub async fn patch_status(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        how: PatchType,
        patch: &Value,
    ) -> Result<Arc<Object>, ApiError> {
        let target = patching::Target { kind, namespace, name, part: Part::Status };
        let options = WriteOptions::default();
        Ok(self.patch_target(&target, how, patch, false, &options).await?.object)
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
        let write = WriteOptions::default();
        Ok(self.delete_with(kind, namespace, name, options, &write).await?.0)
    }

    /// Writes one version: `None` for `value` deletes. `Ok(None)` means that somebody was faster.
    async fn store_version(
        &self,
        kind: &'static Kind,
        key: String,
        seen: u64,
        value: Option<Value>,
    ) -> Result<Option<Arc<Object>>, ApiError> {
        match self.inner.store.write(Write { kind, key, seen, value }).await {
            Ok(object) => Ok(Some(object)),
            Err(WriteError::Changed) => Ok(None),
            Err(WriteError::Disk(error)) => Err(error),
        }
    }
}

/// What a dry run answers: the object as it would be, under the revision that it has.
fn imagine(kind: &'static Kind, mut value: Value, revision: u64) -> Arc<Object> {
    if revision > 0 {
        value["metadata"]["resourceVersion"] = revision.to_string().into();
    }
    Arc::new(Object::new(kind, revision, &value))
}
