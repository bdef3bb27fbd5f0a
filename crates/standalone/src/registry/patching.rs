//! Patches: read, change, write, and again when somebody else was faster.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Part, PatchType, Registry, WriteOptions, bounded_patch, meta};
use crate::error::ApiError;
use crate::kinds::Kind;
use crate::object::Object;
use crate::{apply, decode, strategic};

/// What a patch is for.
pub(crate) struct Target<'a> {
    pub(crate) kind: &'static Kind,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) part: Part,
}

/// What a patch did.
pub(crate) struct Patched {
    pub(crate) object: Arc<Object>,
    /// Server-side apply makes what is not there.
    pub(crate) created: bool,
    /// Fields of the result that the kind does not have.
    pub(crate) unknown: Vec<String>,
}

impl Registry {
    pub(crate) async fn patch_target(
        &self,
        target: &Target<'_>,
        how: PatchType,
        patch: &Value,
        strict: bool,
        options: &WriteOptions,
    ) -> Result<Patched, ApiError> {
        let conditional = !meta::text(patch, "resourceVersion").is_empty();
        loop {
            let current = match self.get(target.kind, target.namespace, target.name) {
                Ok(current) => current,
                Err(error) if error.is_not_found() && how == PatchType::Apply => {
                    return self.apply_new(target, patch, strict, options).await;
                }
                Err(error) => return Err(error),
            };
            let changed = change(&current, how, patch, options)?;
            let unknown = check(target.kind, &changed, strict)?;
            let replaced = self.replace(&current, changed, target.part, options.dry_run).await?;
            if let Some(object) = replaced {
                return Ok(Patched { object, created: false, unknown });
            }
            if conditional {
                return Err(ApiError::modified(target.kind, target.name));
            }
        }
    }

    async fn apply_new(
        &self,
        target: &Target<'_>,
        patch: &Value,
        strict: bool,
        options: &WriteOptions,
    ) -> Result<Patched, ApiError> {
        if target.part != Part::Object {
            return Err(ApiError::not_found(target.kind, target.name));
        }
        let mut base = json!({"metadata": {"name": target.name}});
        if target.kind.namespaced {
            base["metadata"]["namespace"] = target.namespace.into();
        }
        let value = apply::apply(target.kind, &base, patch, &options.manager, options.force)?;
        let unknown = check(target.kind, &value, strict)?;
        let object = self.create_with(target.kind, target.namespace, value, options).await?;
        Ok(Patched { object, created: true, unknown })
    }
}

pub(crate) fn change(
    current: &Object,
    how: PatchType,
    patch: &Value,
    options: &WriteOptions,
) -> Result<Value, ApiError> {
    let mut value = current.value();
    match how {
        PatchType::Merge => json_patch::merge(&mut value, patch),
        PatchType::Strategic => strategic::merge(&mut value, patch)?,
        PatchType::Json => bounded_patch::apply(&mut value, patch.clone())?,
        PatchType::Apply => {
            value = apply::apply(current.kind, &value, patch, &options.manager, options.force)?;
        }
    }
    bounded_patch::check_size(&value)?;
    Ok(value)
}

pub(crate) fn check(kind: &Kind, value: &Value, strict: bool) -> Result<Vec<String>, ApiError> {
    let unknown: Vec<_> = decode::decode(kind, value)?
        .unknown
        .iter()
        .map(|field| format!("unknown field \"{field}\""))
        .collect();
    if strict && !unknown.is_empty() {
        return Err(ApiError::bad_request(format!(
            "error decoding patch: strict decoding error: {}",
            unknown.join(", ")
        )));
    }
    Ok(unknown)
}
