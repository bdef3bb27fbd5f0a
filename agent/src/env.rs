//! A container's environment: what the manifest says, with every reference looked up. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, EnvVar, EnvVarSource, Pod};

pub mod expand;
pub mod fields;
pub mod services;

pub use fields::FieldContext;

/// The content of a config map or secret.
pub type Keys = BTreeMap<String, Vec<u8>>;

/// Config maps and secrets that a pod refers to, by name; `None`: it does not exist.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    pub config_maps: BTreeMap<String, Option<Arc<Keys>>>,
    pub secrets: BTreeMap<String, Option<Arc<Keys>>>,
}

/// A reference that cannot be followed. Becomes `CreateContainerConfigError`; it heals when the object appears.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    #[error("{kind} \"{name}\" not found")]
    NoObject { kind: &'static str, name: String },
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    NoKey { kind: &'static str, namespace: String, name: String, key: String },
    #[error("env {name}: the value of key {key} in {kind} {object} is not text (UTF-8)")]
    NotText { name: String, key: String, kind: &'static str, object: String },
    #[error("env {name}: {source}")]
    Field { name: String, source: fields::FieldError },
    #[error("env {name} {source}")]
    TooLong { name: String, source: expand::TooLong },
    #[error("env {name}: all variables together are longer than {MAX_ALL} bytes")]
    TooMuch { name: String },
    #[error("env {name}: fileKeyRef is not supported by this node")]
    Unsupported { name: String },
}

/// The kernel gives no program more than this in all (three quarters of 8 MiB, whatever its stack).
pub(crate) const MAX_ALL: usize = 6 << 20;

/// Everything that the environment is made from.
#[derive(Debug, Clone, Copy)]
pub struct EnvContext<'a> {
    pub pod: &'a Pod,
    pub objects: &'a Objects,
    pub fields: &'a FieldContext<'a>,
    /// Variables about services, lowest precedence.
    pub services: &'a BTreeMap<String, String>,
}

/// The variables in order; later ones win. Precedence: env, then envFrom, then services.
///
/// # Errors
/// The first reference that cannot be followed and is not optional.
pub fn build(
    container: &Container,
    context: &EnvContext,
) -> Result<Vec<(String, String)>, EnvError> {
    let mut known: BTreeMap<String, String> = context.services.clone();
    let from = env_from(container, context)?;
    let (mut result, mut total) = (Vec::<(String, String)>::new(), 0);
    for (name, value) in from {
        known.insert(name, value);
    }
    for var in container.env.iter().flatten() {
        let Some(value) = value_of(var, container, context, &known)? else { continue };
        total += var.name.len() + value.len();
        if total > MAX_ALL {
            return Err(EnvError::TooMuch { name: var.name.clone() });
        }
        // Expansion sees earlier variables of `env`, all of envFrom and the services.
        known.insert(var.name.clone(), value.clone());
        result.push((var.name.clone(), value));
    }
    for (name, _) in &result {
        known.remove(name);
    }
    let mut all: Vec<_> = known.into_iter().collect();
    all.extend(result);
    Ok(all)
}

fn env_from(
    container: &Container,
    context: &EnvContext,
) -> Result<BTreeMap<String, String>, EnvError> {
    let mut found = BTreeMap::new();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        let (kind, name, optional, objects) = if let Some(reference) = &source.config_map_ref {
            let objects = &context.objects.config_maps;
            ("configmap", &reference.name, reference.optional, objects)
        } else if let Some(reference) = &source.secret_ref {
            ("secret", &reference.name, reference.optional, &context.objects.secrets)
        } else {
            continue;
        };
        let Some(keys) = objects.get(name).and_then(Option::as_ref) else {
            if optional == Some(true) {
                continue;
            }
            return Err(EnvError::NoObject { kind, name: name.clone() });
        };
        for (key, value) in keys.iter() {
            // A value that is not text cannot be a variable; kubelet skips such names, too.
            if let Ok(value) = std::str::from_utf8(value) {
                found.insert(format!("{prefix}{key}"), value.to_owned());
            }
        }
    }
    Ok(found)
}

fn value_of(
    var: &EnvVar,
    container: &Container,
    context: &EnvContext,
    known: &BTreeMap<String, String>,
) -> Result<Option<String>, EnvError> {
    if let Some(value) = var.value.as_deref().filter(|v| !v.is_empty()) {
        let expanded = expand::expand(value, |name| known.get(name).cloned());
        let too_long = |source| EnvError::TooLong { name: var.name.clone(), source };
        return expanded.map(Some).map_err(too_long);
    }
    match &var.value_from {
        None => Ok(Some(String::new())),
        Some(source) => value_from(var, source, container, context),
    }
}

fn value_from(
    var: &EnvVar,
    source: &EnvVarSource,
    container: &Container,
    context: &EnvContext,
) -> Result<Option<String>, EnvError> {
    let field_error = |source| EnvError::Field { name: var.name.clone(), source };
    if let Some(field) = &source.field_ref {
        return context.fields.field(context.pod, &field.field_path).map(Some).map_err(field_error);
    }
    if let Some(resource) = &source.resource_field_ref {
        let value = context.fields.resource(context.pod, Some(container), resource);
        return value.map(Some).map_err(field_error);
    }
    if let Some(reference) = &source.config_map_key_ref {
        let objects = &context.objects.config_maps;
        let (name, key) = (&reference.name, &reference.key);
        return key_of(var, context, "configmap", objects, name, key, reference.optional);
    }
    if let Some(reference) = &source.secret_key_ref {
        let objects = &context.objects.secrets;
        let (name, key) = (&reference.name, &reference.key);
        return key_of(var, context, "secret", objects, name, key, reference.optional);
    }
    Err(EnvError::Unsupported { name: var.name.clone() })
}

fn key_of(
    var: &EnvVar,
    context: &EnvContext,
    kind: &'static str,
    objects: &BTreeMap<String, Option<Arc<Keys>>>,
    name: &str,
    key: &str,
    optional: Option<bool>,
) -> Result<Option<String>, EnvError> {
    let optional = optional == Some(true);
    let Some(keys) = objects.get(name).and_then(Option::as_ref) else {
        return match optional {
            true => Ok(None),
            false => Err(EnvError::NoObject { kind, name: name.to_owned() }),
        };
    };
    match keys.get(key) {
        Some(value) => match std::str::from_utf8(value) {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(_) => {
                let (object, key) = (name.to_owned(), key.to_owned());
                Err(EnvError::NotText { name: var.name.clone(), key, kind, object })
            }
        },
        None if optional => Ok(None),
        None => Err(EnvError::NoKey {
            kind,
            namespace: crate::pod::spec::namespace(context.pod).to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
        }),
    }
}

/// Names of the config maps and secrets that a container's environment refers to.
pub fn references(container: &Container) -> (Vec<String>, Vec<String>) {
    let (mut config_maps, mut secrets) = (Vec::new(), Vec::new());
    for source in container.env_from.iter().flatten() {
        config_maps.extend(source.config_map_ref.as_ref().map(|r| r.name.clone()));
        secrets.extend(source.secret_ref.as_ref().map(|r| r.name.clone()));
    }
    for source in container.env.iter().flatten().filter_map(|var| var.value_from.as_ref()) {
        config_maps.extend(source.config_map_key_ref.as_ref().map(|r| r.name.clone()));
        secrets.extend(source.secret_key_ref.as_ref().map(|r| r.name.clone()));
    }
    (config_maps, secrets)
}

#[cfg(test)]
mod tests;
