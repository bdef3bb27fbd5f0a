//! Strategic merge patch: as a merge patch, but lists of things with a key are merged by that key.
//!
//! Kubernetes reads the keys from its types; here they are a table by field name, which is enough
//! because no field name of the served kinds has two meanings, but `ports` and `conditions`-like
//! lists, whose key is told by their elements.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// How the elements of a list are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ListKind {
    /// By a field.
    Keyed(&'static str),
    /// They are plain values and form a set.
    Set,
    /// Not at all: the list is replaced.
    Atomic,
}

const DIRECTIVE: &str = "$patch";
const DELETE_PRIMITIVES: &str = "$deleteFromPrimitiveList/";
const ORDER: &str = "$setElementOrder/";
const RETAIN_KEYS: &str = "$retainKeys";

pub(crate) fn list_kind(field: &str, elements: &[Value], have: &[Value]) -> ListKind {
    let has = |key: &str| elements.iter().chain(have).any(|e| !e[key].is_null());
    match field {
        "containers"
        | "initContainers"
        | "ephemeralContainers"
        | "volumes"
        | "env"
        | "imagePullSecrets"
        | "secrets"
        | "resourceClaims"
        | "schedulingGates" => ListKind::Keyed("name"),
        "ports" if has("containerPort") => ListKind::Keyed("containerPort"),
        "ports" if has("port") => ListKind::Keyed("port"),
        "volumeMounts" => ListKind::Keyed("mountPath"),
        "volumeDevices" => ListKind::Keyed("devicePath"),
        "conditions" => ListKind::Keyed("type"),
        // A node's addresses have a type; an Endpoints subset's do not and are replaced.
        "addresses" if has("type") => ListKind::Keyed("type"),
        "hostAliases" | "podIPs" | "hostIPs" => ListKind::Keyed("ip"),
        "ownerReferences" => ListKind::Keyed("uid"),
        "topologySpreadConstraints" => ListKind::Keyed("topologyKey"),
        "finalizers" | "podCIDRs" => ListKind::Set,
        _ => ListKind::Atomic,
    }
}

/// Applies `patch` to `target`.
///
/// # Errors
/// 400 when the patch makes no sense.
pub(crate) fn merge(target: &mut Value, patch: &Value) -> Result<(), ApiError> {
    let Some(patch) = patch.as_object() else {
        return Err(ApiError::bad_request(
            "error decoding patch: a strategic merge patch is an object",
        ));
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    match patch.get(DIRECTIVE).and_then(Value::as_str) {
        None | Some("merge") => {}
        Some("replace") => {
            let mut whole = patch.clone();
            whole.remove(DIRECTIVE);
            *target = Value::Object(whole);
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        Some(other) => {
            let text = format!("error decoding patch: unknown patch type \"{other}\" in $patch");
            return Err(ApiError::bad_request(text));
        }
    }
    let Some(map) = target.as_object_mut() else { return Ok(()) };
    retain_keys(map, patch);
    delete_primitives(map, patch);
    for (field, value) in patch.iter().filter(|(field, _)| !field.starts_with('$')) {
        merge_field(map, field, value)?;
    }
    for (directive, order) in patch {
        if let Some(field) = directive.strip_prefix(ORDER)
            && let Some(Value::Array(list)) = map.get_mut(field)
        {
            reorder(field, list, order);
        }
    }
    Ok(())
}

/// `$retainKeys: [a, b]` drops all other fields, as unions need it.
fn retain_keys(map: &mut Map<String, Value>, patch: &Map<String, Value>) {
    if let Some(keys) = patch.get(RETAIN_KEYS).and_then(Value::as_array) {
        map.retain(|field, _| keys.iter().any(|key| key == field));
    }
}

fn delete_primitives(map: &mut Map<String, Value>, patch: &Map<String, Value>) {
    for (directive, gone) in patch {
        if let Some(field) = directive.strip_prefix(DELETE_PRIMITIVES)
            && let (Some(list), Some(gone)) =
                (map.get_mut(field).and_then(Value::as_array_mut), gone.as_array())
        {
            list.retain(|value| !gone.contains(value));
        }
    }
}

fn merge_field(map: &mut Map<String, Value>, field: &str, value: &Value) -> Result<(), ApiError> {
    match value {
        Value::Null => drop(map.remove(field)),
        Value::Object(inner) if inner.get(DIRECTIVE).is_some_and(|d| d == "delete") => {
            map.remove(field);
        }
        Value::Object(_) => {
            let slot = map.entry(field).or_insert(Value::Null);
            merge(slot, value)?;
        }
        Value::Array(elements) => {
            let slot = map.entry(field).or_insert(Value::Null);
            merge_list(field, slot, elements)?;
        }
        plain => drop(map.insert(field.to_owned(), plain.clone())),
    }
    Ok(())
}

fn merge_list(field: &str, slot: &mut Value, elements: &[Value]) -> Result<(), ApiError> {
    let mut have = slot.as_array().cloned().unwrap_or_default();
    let replaces = elements.iter().any(|e| e[DIRECTIVE] == "replace");
    match list_kind(field, elements, &have) {
        _ if replaces => {
            have = elements.iter().filter(|e| e[DIRECTIVE].is_null()).cloned().collect();
        }
        ListKind::Atomic => have = elements.to_vec(),
        ListKind::Set => {
            for element in elements {
                if !have.contains(element) {
                    have.push(element.clone());
                }
            }
        }
        ListKind::Keyed(key) => {
            for element in elements {
                merge_element(field, key, &mut have, element)?;
            }
        }
    }
    *slot = Value::Array(have);
    Ok(())
}

fn merge_element(
    field: &str,
    key: &'static str,
    have: &mut Vec<Value>,
    element: &Value,
) -> Result<(), ApiError> {
    let id = &element[key];
    if id.is_null() {
        let text = format!(
            "error decoding patch: map: {element} does not contain declared merge key: {key} (in {field})"
        );
        return Err(ApiError::bad_request(text));
    }
    if element[DIRECTIVE] == "delete" {
        have.retain(|other| other[key] != *id);
        return Ok(());
    }
    match have.iter_mut().find(|other| other[key] == *id) {
        Some(existing) => merge(existing, element),
        None => {
            let mut fresh = Value::Null;
            merge(&mut fresh, element)?;
            have.push(fresh);
            Ok(())
        }
    }
}

/// Puts the named elements into the given order; elements that the patch does not know keep their
/// place relative to the element before them.
fn reorder(field: &str, list: &mut Vec<Value>, order: &Value) {
    let Some(order) = order.as_array() else { return };
    let kind = list_kind(field, order, list);
    let same = |element: &Value, wanted: &Value| match kind {
        ListKind::Keyed(key) => element[key] == wanted[key],
        _ => element == wanted,
    };
    let place = |element: &Value| order.iter().position(|wanted| same(element, wanted));
    let mut known: Vec<Value> = list.iter().filter(|e| place(e).is_some()).cloned().collect();
    known.sort_by_key(|e| place(e));
    let mut sorted = known.into_iter();
    let mut result = Vec::with_capacity(list.len());
    for element in list.iter() {
        if place(element).is_some() {
            result.extend(sorted.next());
        } else {
            result.push(element.clone());
        }
    }
    *list = result;
}

#[cfg(test)]
mod tests;
