//! Metadata that the server keeps: names, uids, times, generations, finalizers.

use jiff::{Timestamp, ToSpan as _};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::kinds::{self, Kind};

/// `now + secs` as Kubernetes writes times.
pub(super) fn time_after(secs: i64) -> String {
    let now = Timestamp::now();
    let then = now.checked_add(secs.seconds()).unwrap_or(now);
    then.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

pub(crate) fn now() -> String {
    time_after(0)
}

/// The metadata as a map, made if it is not there.
pub(super) fn of(value: &mut Value) -> &mut Map<String, Value> {
    if !value["metadata"].is_object() {
        value["metadata"] = json!({});
    }
    match &mut value["metadata"] {
        Value::Object(map) => map,
        _ => unreachable!("was made an object above"),
    }
}

pub(super) fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value["metadata"][field].as_str().unwrap_or_default()
}

/// Gives a new object what only the server gives.
pub(super) fn begin(kind: &Kind, namespace: &str, value: &mut Value) -> Result<(), ApiError> {
    value["apiVersion"] = kind.api_version().into();
    value["kind"] = kind.kind.into();
    if !text(value, "resourceVersion").is_empty() {
        return Err(ApiError::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    let meta = of(value);
    for taken in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion"]
    {
        meta.remove(taken);
    }
    if kind.namespaced {
        meta.insert("namespace".to_owned(), namespace.into());
    } else {
        meta.remove("namespace");
    }
    meta.insert("uid".to_owned(), uuid::Uuid::new_v4().to_string().into());
    meta.insert("creationTimestamp".to_owned(), now().into());
    meta.remove("generation");
    if kind.has_generation {
        meta.insert("generation".to_owned(), 1.into());
    }
    Ok(())
}

/// A name for `generateName`: the letters that Kubernetes uses, so that no words appear.
pub(super) fn generate(prefix: &str) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let bytes = *uuid::Uuid::new_v4().as_bytes();
    let suffix: String =
        bytes[..5].iter().map(|b| char::from(LETTERS[usize::from(*b) % LETTERS.len()])).collect();
    let prefix: String = prefix.chars().take(58).collect();
    format!("{prefix}{suffix}")
}

/// Carries over what an update cannot change.
pub(super) fn carry(old: &Value, new: &mut Value) {
    new["apiVersion"] = old["apiVersion"].clone();
    new["kind"] = old["kind"].clone();
    let kept = [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
        "resourceVersion",
    ];
    let meta = of(new);
    meta.remove("selfLink");
    for field in kept {
        match &old["metadata"][field] {
            Value::Null => drop(meta.remove(field)),
            value => drop(meta.insert(field.to_owned(), value.clone())),
        }
    }
}

pub(super) fn finalizers(value: &Value) -> Vec<&str> {
    let list = value["metadata"]["finalizers"].as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(Value::as_str).collect()
}

pub(super) fn set_finalizers(value: &mut Value, list: &[String]) {
    let meta = of(value);
    if list.is_empty() {
        meta.remove("finalizers");
    } else {
        meta.insert("finalizers".to_owned(), json!(list));
    }
}

pub(super) fn is_terminating(value: &Value) -> bool {
    !value["metadata"]["deletionTimestamp"].is_null()
}

/// Whether nothing keeps a terminating object any more.
pub(super) fn is_finished(kind: &Kind, value: &Value) -> bool {
    let namespace_held = *kind == kinds::NAMESPACE
        && value["spec"]["finalizers"].as_array().is_some_and(|list| !list.is_empty());
    is_terminating(value)
        && finalizers(value).is_empty()
        && value["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
        && !namespace_held
}

/// Counts a change of what the object asks for: everything but metadata and status.
pub(super) fn count_generation(kind: &Kind, old: &Value, new: &mut Value) {
    let wants = |value: &Value| {
        let mut map = value.as_object().cloned().unwrap_or_default();
        map.remove("metadata");
        map.remove("status");
        map
    };
    if kind.has_generation && wants(old) != wants(new) {
        let generation = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
        of(new).insert("generation".to_owned(), generation.into());
    }
}
