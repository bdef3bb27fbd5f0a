//! Server-side apply: who applies what is remembered in `metadata.managedFields`.
//!
//! A manager's fields that it does not apply any more are removed, unless another manager applies them too; a field of
//! another manager with another value is a conflict, unless forced. What is left out: writers that do not apply are
//! not remembered as managers, so that their changes never conflict (docs/standalone.md).

mod fields;

use serde_json::{Value, json};

use self::fields::{Path, leaves, lookup, merge, remove, to_paths, to_tree};
use crate::error::ApiError;
use crate::kinds::Kind;

/// Fields that name the object and belong to nobody.
const IDENTITY: &[&str] = &[
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "generation",
    "managedFields",
];

/// The object as it is after `manager` has applied `applied` to `live`.
pub(crate) fn apply(
    kind: &Kind,
    live: &Value,
    applied: &Value,
    manager: &str,
    force: bool,
) -> Result<Value, ApiError> {
    check(applied, manager)?;
    let mut wanted = applied.clone();
    for field in ["apiVersion", "kind", "status"] {
        wanted.as_object_mut().map(|map| map.remove(field));
    }
    if let Some(meta) = wanted.get_mut("metadata").and_then(Value::as_object_mut) {
        meta.retain(|field, _| !IDENTITY.contains(&field.as_str()));
        if meta.is_empty() {
            wanted.as_object_mut().map(|map| map.remove("metadata"));
        }
    }
    let new = leaves(&wanted);
    let entries = live["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let (own, mut others): (Vec<Value>, Vec<Value>) =
        entries.into_iter().partition(|e| e["manager"] == manager && e["operation"] == "Apply");
    let conflicts = conflicts(live, &wanted, &new, &others);
    if !conflicts.is_empty() && !force {
        return Err(refusal(&conflicts));
    }
    for (_, path) in &conflicts {
        disown(&mut others, path);
    }

    let mut value = live.clone();
    let before = own.first().map(|e| to_paths(&e["fieldsV1"])).unwrap_or_default();
    let still: Vec<Path> = others.iter().flat_map(|e| to_paths(&e["fieldsV1"])).collect();
    let gone = before.iter().filter(|path| !new.contains(path) && !still.contains(path));
    for path in gone {
        remove(&mut value, path, &still);
    }
    merge(&mut value, &wanted, "");
    if let Some(version) = applied["metadata"]["resourceVersion"].as_str() {
        value["metadata"]["resourceVersion"] = version.into();
    }
    others.push(entry(kind, manager, &new, own.first()));
    others.retain(|e| e["fieldsV1"].as_object().is_some_and(|fields| !fields.is_empty()));
    value["metadata"]["managedFields"] = others.into();
    Ok(value)
}

fn check(applied: &Value, manager: &str) -> Result<(), ApiError> {
    if manager.is_empty() {
        let text = "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch";
        return Err(ApiError::new(422, "Invalid", text));
    }
    if !applied.is_object() {
        return Err(ApiError::bad_request("error decoding YAML: an applied object is a map"));
    }
    if applied["metadata"]["managedFields"].as_array().is_some_and(|list| !list.is_empty()) {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    Ok(())
}

/// Fields that another manager applies with another value: the manager and the field.
fn conflicts(live: &Value, wanted: &Value, new: &[Path], others: &[Value]) -> Vec<(String, Path)> {
    let mut found = Vec::new();
    for other in others {
        let name = other["manager"].as_str().unwrap_or_default();
        for path in to_paths(&other["fieldsV1"]) {
            let clashes = path.last().is_none_or(|step| step != ".")
                && new.contains(&path)
                && lookup(live, &path) != lookup(wanted, &path);
            if clashes {
                found.push((name.to_owned(), path));
            }
        }
    }
    found
}

fn refusal(conflicts: &[(String, Path)]) -> ApiError {
    let text = |path: &Path| {
        path.iter()
            .map(|step| match step.strip_prefix("f:") {
                Some(field) => format!(".{field}"),
                None => format!("[{}]", step.get(2..).unwrap_or_default()),
            })
            .collect::<String>()
    };
    let lines: Vec<String> = conflicts
        .iter()
        .map(|(manager, path)| format!("conflict with \"{manager}\": {}", text(path)))
        .collect();
    let plural = if lines.len() == 1 { "" } else { "s" };
    let message =
        format!("Apply failed with {} conflict{plural}: {}", lines.len(), lines.join("; "));
    let causes: Vec<Value> = conflicts
        .iter()
        .map(|(manager, path)| {
            json!({
                "reason": "FieldManagerConflict", "field": text(path),
                "message": format!("conflict with \"{manager}\""),
            })
        })
        .collect();
    let mut error = ApiError::new(409, "Conflict", message);
    error.details = json!({"causes": causes});
    error
}

fn disown(others: &mut [Value], path: &Path) {
    for other in others {
        let mut paths = to_paths(&other["fieldsV1"]);
        paths.retain(|p| p != path);
        other["fieldsV1"] = to_tree(&paths);
    }
}

/// The manager's record. Its time stays when its fields do: applying twice changes nothing.
fn entry(kind: &Kind, manager: &str, paths: &[Path], before: Option<&Value>) -> Value {
    let tree = to_tree(paths);
    let time = match before {
        Some(before) if before["fieldsV1"] == tree => before["time"].clone(),
        _ => crate::registry::now().into(),
    };
    json!({
        "manager": manager, "operation": "Apply", "apiVersion": kind.api_version(), "time": time,
        "fieldsType": "FieldsV1", "fieldsV1": tree,
    })
}

#[cfg(test)]
mod tests;
