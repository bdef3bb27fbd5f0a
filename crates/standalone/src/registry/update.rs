//! How an object changes.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Part, Registry, WriteOptions, imagine, meta};
use crate::error::{ApiError, Cause};
use crate::kinds::{self, Kind};
use crate::object::{Object, key};
use crate::{decode, defaults, validation};

impl Registry {
    pub(crate) async fn update_with(
        &self,
        kind: &'static Kind,
        value: Value,
        part: Part,
        options: &WriteOptions,
    ) -> Result<Arc<Object>, ApiError> {
        let name = meta::text(&value, "name").to_owned();
        let namespace =
            if kind.namespaced { meta::text(&value, "namespace") } else { "" }.to_owned();
        let conditional = !meta::text(&value, "resourceVersion").is_empty();
        loop {
            let current = self.get(kind, &namespace, &name)?;
            if let Some(object) =
                self.replace(&current, value.clone(), part, options.dry_run).await?
            {
                return Ok(object);
            }
            if conditional {
                return Err(ApiError::modified(kind, &name));
            }
        }
    }

    /// Puts `value` in the place of `current`. `Ok(None)`: somebody else was faster.
    pub(super) async fn replace(
        &self,
        current: &Arc<Object>,
        value: Value,
        part: Part,
        dry_run: bool,
    ) -> Result<Option<Arc<Object>>, ApiError> {
        let kind = current.kind;
        let old = current.value();
        check_preconditions(kind, current, &old, &value)?;
        let mut new = merge_part(kind, &old, decode::decode(kind, &value)?.value, part);
        meta::carry(&old, &mut new);
        defaults::apply(kind, &mut new);
        if *kind == kinds::SERVICE && part == Part::Object {
            defaults::keep_service_allocation(&old, &mut new);
        }
        // A status is a report: it is taken whatever the rest of the object looks like.
        let mut causes = Vec::new();
        if part == Part::Object {
            causes.extend(validation::create(kind, &new));
            causes.extend(validation::update(kind, &old, &new));
        }
        causes.extend(check_finalizers(&old, &new));
        if !causes.is_empty() {
            return Err(ApiError::invalid(kind, &current.name, &causes));
        }
        meta::count_generation(kind, &old, &mut new);
        let reserved = if *kind == kinds::SERVICE && part == Part::Object {
            Some(self.inner.allocator.reserve(Some(&old), &mut new)?)
        } else {
            None
        };
        if dry_run {
            return Ok(Some(imagine(kind, new, current.revision)));
        }
        if meta::is_finished(kind, &new) {
            return self.remove(current).await;
        }
        if new == old {
            return Ok(Some(Arc::clone(current)));
        }
        let stored = self.store_version(kind, current.key(), current.revision, Some(new)).await?;
        if stored.is_some()
            && let Some(reserved) = reserved
        {
            reserved.keep();
        }
        Ok(stored)
    }

    /// Takes an object out of the store, and what it held out of the allocator.
    pub(super) async fn remove(
        &self,
        current: &Arc<Object>,
    ) -> Result<Option<Arc<Object>>, ApiError> {
        let kind = current.kind;
        let gone = self.store_version(kind, current.key(), current.revision, None).await?;
        if gone.is_some() && *kind == kinds::SERVICE {
            self.inner.allocator.release(&current.value());
        }
        Ok(gone)
    }

    /// Says that a terminating namespace is empty: it goes away now, unless other finalizers hold it.
    ///
    /// # Errors
    /// 404, 409 when it is not terminating, 507.
    pub async fn finalize_namespace(&self, name: &str) -> Result<Arc<Object>, ApiError> {
        let kind = &kinds::NAMESPACE;
        loop {
            let current = self.get(kind, "", name)?;
            let mut value = current.value();
            if !meta::is_terminating(&value) {
                return Err(ApiError::conflict(kind, name, "the namespace is not being deleted"));
            }
            value["spec"]["finalizers"] = json!([]);
            if let Some(object) = self.replace(&current, value, Part::Finalize, false).await? {
                return Ok(object);
            }
        }
    }
}

/// The old object with the part of the new one that this request may change.
fn merge_part(kind: &Kind, old: &Value, mut new: Value, part: Part) -> Value {
    match part {
        Part::Object => {
            if kind.has_status {
                new["status"] = old["status"].clone();
            }
            if *kind == kinds::NAMESPACE {
                new["spec"] = old["spec"].clone();
            }
            keep_managed_fields(old, &mut new);
            new
        }
        Part::Status => {
            let mut merged = old.clone();
            merged["status"] = new["status"].take();
            if *kind == kinds::POD || *kind == kinds::NODE {
                for field in ["labels", "annotations", "finalizers"] {
                    merged["metadata"][field] = new["metadata"][field].take();
                }
            }
            drop_nulls(&mut merged);
            merged
        }
        Part::Finalize => {
            let mut merged = old.clone();
            merged["spec"]["finalizers"] = new["spec"]["finalizers"].take();
            merged
        }
        Part::Ephemeral => {
            let mut merged = old.clone();
            merged["spec"]["ephemeralContainers"] = new["spec"]["ephemeralContainers"].take();
            drop_nulls(&mut merged);
            merged
        }
    }
}

/// Field ownership is only kept for server-side apply; other writers leave it as it is.
fn keep_managed_fields(old: &Value, new: &mut Value) {
    if new["metadata"]["managedFields"].is_null() && !old["metadata"]["managedFields"].is_null() {
        new["metadata"]["managedFields"] = old["metadata"]["managedFields"].clone();
    }
}

fn drop_nulls(value: &mut Value) {
    for place in ["metadata", "spec"] {
        if let Some(map) = value.get_mut(place).and_then(Value::as_object_mut) {
            map.retain(|_, v| !v.is_null());
        }
    }
    if let Some(map) = value.as_object_mut() {
        map.retain(|_, v| !v.is_null());
    }
}

fn check_preconditions(
    kind: &Kind,
    current: &Object,
    old: &Value,
    new: &Value,
) -> Result<(), ApiError> {
    let sent = meta::text(new, "resourceVersion");
    if !sent.is_empty() && sent != current.revision.to_string() {
        return Err(ApiError::modified(kind, &current.name));
    }
    let (uid, has) = (meta::text(new, "uid"), meta::text(old, "uid"));
    if !uid.is_empty() && uid != has {
        let why =
            format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {has}");
        return Err(ApiError::conflict(kind, &current.name, &why));
    }
    let name = meta::text(new, "name");
    if !name.is_empty() && *name != *current.name {
        let cause = Cause::invalid("metadata.name", &json!(name), "field is immutable");
        return Err(ApiError::invalid(kind, &current.name, &[cause]));
    }
    debug_assert_eq!(current.key(), key(&current.namespace, &current.name));
    Ok(())
}

fn check_finalizers(old: &Value, new: &Value) -> Option<Cause> {
    let before = meta::finalizers(old);
    let added: Vec<_> = meta::finalizers(new)
        .into_iter()
        .filter(|f| !before.contains(f))
        .map(str::to_owned)
        .collect();
    (meta::is_terminating(old) && !added.is_empty()).then(|| {
        Cause::forbidden(
            "metadata.finalizers",
            &format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
            ),
        )
    })
}
