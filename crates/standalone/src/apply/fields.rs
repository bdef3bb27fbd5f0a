//! Sets of fields in the form `FieldsV1`, flat: `f:spec`, `k:{"name":"a"}`, `v:"x"`, `.` for an element itself.

use serde_json::{Map, Value};

use crate::strategic::{ListKind, list_kind};

/// One field's way from the object's root.
pub(super) type Path = Vec<String>;

/// The keys that tell a list's elements apart, if they can be.
fn keys(field: &str, element: &Value) -> Option<Vec<&'static str>> {
    match list_kind(field, std::slice::from_ref(element), &[]) {
        // One number may be open for several protocols.
        ListKind::Keyed(key @ ("containerPort" | "port")) => Some(vec![key, "protocol"]),
        ListKind::Keyed(key @ "topologyKey") => Some(vec![key, "whenUnsatisfiable"]),
        ListKind::Keyed(key) => Some(vec![key]),
        ListKind::Set | ListKind::Atomic => None,
    }
}

/// The element's key as a step.
fn key_step(field: &str, element: &Value) -> Option<String> {
    let mut key = Map::new();
    for name in keys(field, element)? {
        let value = match &element[name] {
            Value::Null if name == "protocol" => Value::from("TCP"),
            Value::Null => return None,
            value => value.clone(),
        };
        key.insert(name.to_owned(), value);
    }
    Some(format!("k:{}", Value::Object(key)))
}

fn is_set(field: &str) -> bool {
    list_kind(field, &[], &[]) == ListKind::Set
}

/// Maps that are one value. (References to keys and fields are too, but get defaults that nobody applied.)
fn is_atomic_map(field: &str) -> bool {
    matches!(field, "selector" | "nodeSelector")
}

/// Every field that `value` sets.
pub(super) fn leaves(value: &Value) -> Vec<Path> {
    let mut found = Vec::new();
    collect(value, "", &mut Vec::new(), &mut found);
    found
}

fn collect(value: &Value, field: &str, at: &mut Path, found: &mut Vec<Path>) {
    let mut below = |step: String, value: &Value, name: &str, at: &mut Path| {
        at.push(step);
        collect(value, name, at, found);
        at.pop();
    };
    match value {
        Value::Null => {}
        Value::Object(map) if (!map.is_empty() && !is_atomic_map(field)) || at.is_empty() => {
            for (name, value) in map {
                below(format!("f:{name}"), value, name, at);
            }
        }
        Value::Array(list)
            if !list.is_empty() && list.iter().all(|e| key_step(field, e).is_some()) =>
        {
            for element in list {
                let Some(step) = key_step(field, element) else { continue };
                at.push(step);
                found.push([at.as_slice(), &[".".to_owned()]].concat());
                for (name, value) in element.as_object().into_iter().flatten() {
                    at.push(format!("f:{name}"));
                    collect(value, name, at, found);
                    at.pop();
                }
                at.pop();
            }
        }
        Value::Array(list) if is_set(field) => {
            for element in list {
                found.push([at.as_slice(), &[format!("v:{element}")]].concat());
            }
        }
        _ => found.push(at.clone()),
    }
}

/// The tree that Kubernetes keeps.
pub(super) fn to_tree(paths: &[Path]) -> Value {
    let mut root = Value::Object(Map::new());
    for path in paths {
        let mut at = &mut root;
        for step in path {
            at = &mut at[step];
            if at.is_null() {
                *at = Value::Object(Map::new());
            }
        }
    }
    root
}

pub(super) fn to_paths(tree: &Value) -> Vec<Path> {
    fn walk(tree: &Value, at: &mut Path, found: &mut Vec<Path>) {
        match tree.as_object().filter(|map| !map.is_empty()) {
            Some(map) => {
                for (step, below) in map {
                    at.push(step.clone());
                    walk(below, at, found);
                    at.pop();
                }
            }
            None if !at.is_empty() => found.push(at.clone()),
            None => {}
        }
    }
    let mut found = Vec::new();
    walk(tree, &mut Vec::new(), &mut found);
    found
}

/// The position of the element that a `k:` or `v:` step names.
fn position(list: &[Value], field: &str, step: &str) -> Option<usize> {
    match step.strip_prefix("v:") {
        Some(text) => {
            let wanted: Value = serde_json::from_str(text).ok()?;
            list.iter().position(|e| *e == wanted)
        }
        None => list.iter().position(|e| key_step(field, e).as_deref() == Some(step)),
    }
}

/// What stands at `path`.
pub(super) fn lookup<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    let (mut at, mut field) = (value, "");
    for step in path {
        match step.strip_prefix("f:") {
            Some(name) => (at, field) = (at.get(name)?, name),
            None if step == "." => {}
            None => {
                let list = at.as_array()?;
                at = &list[position(list, field, step)?];
            }
        }
    }
    Some(at)
}

/// Takes away what stands at `path`, and maps that are empty then. An element of a list goes only when nobody in
/// `kept` has a part of it.
pub(super) fn remove(value: &mut Value, path: &[String], kept: &[Path]) {
    let whole = path.last().is_some_and(|step| step == ".");
    let path = if whole { &path[..path.len() - 1] } else { path };
    if whole && kept.iter().any(|other| other.starts_with(path)) {
        return;
    }
    remove_at(value, "", path);
}

fn remove_at(value: &mut Value, field: &str, path: &[String]) {
    let Some((step, rest)) = path.split_first() else { return };
    if let Some(name) = step.strip_prefix("f:") {
        let Some(map) = value.as_object_mut() else { return };
        if rest.is_empty() {
            map.remove(name);
        } else if let Some(below) = map.get_mut(name) {
            remove_at(below, name, rest);
            let empty = below.as_object().is_some_and(Map::is_empty)
                || below.as_array().is_some_and(Vec::is_empty);
            if empty {
                map.remove(name);
            }
        }
    } else if let Some(list) = value.as_array_mut()
        && let Some(index) = position(list, field, step)
    {
        if rest.is_empty() {
            list.remove(index);
        } else {
            remove_at(&mut list[index], field, rest);
        }
    }
}

/// Lays `applied` over `live`: maps by field, lists by their keys, all else whole.
pub(super) fn merge(live: &mut Value, applied: &Value, field: &str) {
    match applied {
        Value::Null => {}
        Value::Object(map) if !is_atomic_map(field) || field.is_empty() => {
            if !live.is_object() {
                *live = Value::Object(Map::new());
            }
            for (name, value) in map.iter().filter(|(_, value)| !value.is_null()) {
                merge(&mut live[name.as_str()], value, name);
            }
        }
        Value::Array(list)
            if !list.is_empty() && list.iter().all(|e| key_step(field, e).is_some()) =>
        {
            if !live.is_array() {
                *live = Value::Array(Vec::new());
            }
            let Some(have) = live.as_array_mut() else { return };
            for element in list {
                let step = key_step(field, element).unwrap_or_default();
                match position(have, field, &step) {
                    Some(index) => merge(&mut have[index], element, ""),
                    None => have.push(element.clone()),
                }
            }
        }
        Value::Array(list) if is_set(field) && live.is_array() => {
            let Some(have) = live.as_array_mut() else { return };
            for element in list {
                if !have.contains(element) {
                    have.push(element.clone());
                }
            }
        }
        whole => *live = whole.clone(),
    }
}
