//! The registry for one type of `k8s-openapi`.

use std::marker::PhantomData;
use std::sync::Arc;

use k8s_openapi::Metadata;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{DeleteOptions, PatchType, Registry};
use crate::error::ApiError;
use crate::kinds::{self, Kind};
use crate::object::Object;
use crate::selectors::Selector;
use crate::store::{EventType, Watch};

/// The objects of one type. Cheap to make and to clone.
#[derive(Debug)]
pub struct Api<T> {
    registry: Registry,
    kind: &'static Kind,
    of: PhantomData<fn() -> T>,
}

impl<T> Clone for Api<T> {
    fn clone(&self) -> Self {
        Self { registry: self.registry.clone(), kind: self.kind, of: PhantomData }
    }
}

/// One event of a [`TypedWatch`].
#[derive(Debug, Clone)]
pub struct TypedEvent<T> {
    /// What happened.
    pub event: EventType,
    /// The object after it; when it is gone, its last state.
    pub object: T,
}

/// The changes of one type, in order, each exactly once.
#[derive(Debug)]
pub struct TypedWatch<T> {
    watch: Watch,
    of: PhantomData<fn() -> T>,
}

impl Registry {
    /// The objects of type `T`.
    ///
    /// # Errors
    /// When the server does not store that type.
    pub fn api<T>(&self) -> Result<Api<T>, ApiError>
    where
        T: k8s_openapi::Resource,
    {
        let kind = kinds::of::<T>().ok_or_else(|| {
            ApiError::internal(format!("the embedded API server has no kind {}", T::KIND))
        })?;
        Ok(Api { registry: self.clone(), kind, of: PhantomData })
    }
}

impl<T> Api<T>
where
    T: Metadata<Ty = ObjectMeta> + Serialize + DeserializeOwned,
{
    /// One object.
    ///
    /// # Errors
    /// 404.
    pub fn get(&self, namespace: &str, name: &str) -> Result<T, ApiError> {
        read(&self.registry.get(self.kind, namespace, name)?)
    }

    /// All objects (an empty namespace: of all namespaces), and the revision to watch from.
    ///
    /// # Errors
    /// When a stored object is not of this type, which is a bug.
    pub fn list(&self, namespace: &str) -> Result<(Vec<T>, u64), ApiError> {
        let (items, revision) = self.registry.list(self.kind, namespace, &Selector::default());
        Ok((items.iter().map(read).collect::<Result<_, _>>()?, revision))
    }

    /// Changes after a revision from [`Self::list`].
    ///
    /// # Errors
    /// 410: list again.
    pub fn watch(&self, namespace: &str, revision: u64) -> Result<TypedWatch<T>, ApiError> {
        let watch = self.registry.watch(self.kind, namespace, Selector::default(), revision)?;
        Ok(TypedWatch { watch, of: PhantomData })
    }

    /// Makes an object; its namespace stands in its metadata.
    ///
    /// # Errors
    /// As [`Registry::create`].
    pub async fn create(&self, object: &T) -> Result<T, ApiError> {
        let namespace = object.metadata().namespace.as_deref().unwrap_or_default().to_owned();
        read(&self.registry.create(self.kind, &namespace, write(object)?).await?)
    }

    /// Replaces an object.
    ///
    /// # Errors
    /// As [`Registry::update`].
    pub async fn update(&self, object: &T) -> Result<T, ApiError> {
        read(&self.registry.update(self.kind, write(object)?).await?)
    }

    /// Replaces an object's status, and nothing else.
    ///
    /// # Errors
    /// As [`Registry::update_status`].
    pub async fn update_status(&self, object: &T) -> Result<T, ApiError> {
        read(&self.registry.update_status(self.kind, write(object)?).await?)
    }

    /// Changes an object by a patch.
    ///
    /// # Errors
    /// As [`Registry::patch`].
    pub async fn patch(
        &self,
        namespace: &str,
        name: &str,
        how: PatchType,
        patch: &Value,
    ) -> Result<T, ApiError> {
        read(&self.registry.patch(self.kind, namespace, name, how, patch).await?)
    }

    /// Deletes an object, or begins to.
    ///
    /// # Errors
    /// As [`Registry::delete`].
    pub async fn delete(
        &self,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<T, ApiError> {
        read(&self.registry.delete(self.kind, namespace, name, options).await?)
    }
}

impl<T: DeserializeOwned> TypedWatch<T> {
    /// The next event. Cancellation-safe.
    ///
    /// # Errors
    /// 410: this watch was too slow; list again.
    pub async fn next(&mut self) -> Result<TypedEvent<T>, ApiError> {
        let event = self.watch.next().await?;
        Ok(TypedEvent { event: event.event, object: read(&event.object)? })
    }
}

fn read<T: DeserializeOwned>(object: &Arc<Object>) -> Result<T, ApiError> {
    object.parse().map_err(|error| {
        ApiError::internal(format!(
            "the stored {} {} cannot be read: {error}",
            object.kind.kind, object.name
        ))
    })
}

fn write<T: Serialize>(object: &T) -> Result<Value, ApiError> {
    serde_json::to_value(object)
        .map_err(|error| ApiError::internal(format!("the object cannot be written: {error}")))
}
