//! What an object must be like to be stored, in Kubernetes' words. Pure; runs after defaulting.
//!
//! The rules are those that people meet: names, labels, references inside an object, numbers, choices, immutable
//! fields. What only an exotic field could violate is left to the component that reads it.

mod names;
mod pod;
mod service;
mod workload;

use serde_json::{Value, json};

use crate::error::Cause;
use crate::kinds::{self, Kind};

/// Most bytes of all annotations, and of the data of a ConfigMap or Secret.
const ANNOTATION_BYTES: usize = 256 << 10;
const DATA_BYTES: usize = 1 << 20;

/// What is wrong with an object as it stands.
pub(crate) fn create(kind: &Kind, value: &Value) -> Vec<Cause> {
    let mut causes = metadata(kind, value);
    if *kind == kinds::POD {
        pod::check(value, &mut causes);
    } else if *kind == kinds::SERVICE {
        service::check(value, &mut causes);
    } else if *kind == kinds::DEPLOYMENT || *kind == kinds::REPLICA_SET {
        workload::check(kind, value, &mut causes);
    } else if *kind == kinds::CONFIG_MAP || *kind == kinds::SECRET {
        data(value, &mut causes);
    } else if *kind == kinds::ENDPOINT_SLICE {
        service::check_slice(value, &mut causes);
    } else if *kind == kinds::NODE {
        node(value, &mut causes);
    }
    causes
}

/// What is wrong with the way from `old` to `new`.
pub(crate) fn update(kind: &Kind, old: &Value, new: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    if *kind == kinds::POD {
        pod::check_update(old, new, &mut causes);
    } else if *kind == kinds::SERVICE {
        service::check_update(old, new, &mut causes);
    } else if *kind == kinds::DEPLOYMENT || *kind == kinds::REPLICA_SET {
        same(old, new, &["spec", "selector"], &mut causes);
    } else if *kind == kinds::CONFIG_MAP || *kind == kinds::SECRET {
        data_update(old, new, &mut causes);
        same(old, new, &["type"], &mut causes);
    } else if *kind == kinds::ENDPOINT_SLICE {
        same(old, new, &["addressType"], &mut causes);
    }
    causes
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn string(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn same(old: &Value, new: &Value, path: &[&str], causes: &mut Vec<Cause>) {
    let at = |value: &Value| path.iter().fold(value.clone(), |v, field| v[*field].clone());
    let (before, after) = (at(old), at(new));
    if before != after {
        causes.push(Cause::invalid(path.join("."), &after, "field is immutable"));
    }
}

/// One of the allowed words; an empty one is for the caller to require.
fn choice(field: &str, value: &Value, allowed: &[&str], causes: &mut Vec<Cause>) {
    if let Some(text) = value.as_str()
        && !allowed.contains(&text)
    {
        causes.push(Cause::not_supported(field, value, allowed));
    }
}

fn not_negative(field: &str, value: &Value, causes: &mut Vec<Cause>) {
    if value.as_i64().is_some_and(|n| n < 0) {
        causes.push(Cause::invalid(field, value, "must be greater than or equal to 0"));
    }
}

fn port(field: &str, value: &Value, causes: &mut Vec<Cause>) {
    if value.as_i64().is_none_or(|n| !(1..=65_535).contains(&n)) {
        causes.push(Cause::invalid(field, value, "must be between 1 and 65535, inclusive"));
    }
}

fn metadata(kind: &Kind, value: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let meta = &value["metadata"];
    let name = string(&meta["name"]);
    let wrong = if name.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
        None
    } else if *kind == kinds::SERVICE {
        names::label_1035(name)
    } else if *kind == kinds::NAMESPACE {
        names::label(name)
    } else if *kind == kinds::IP_ADDRESS {
        None
    } else {
        names::subdomain(name)
    };
    causes.extend(wrong.map(|why| Cause::invalid("metadata.name", &json!(name), &why)));
    labels("metadata.labels", &meta["labels"], &mut causes);
    let mut size = 0;
    for (key, text) in meta["annotations"].as_object().into_iter().flatten() {
        size += key.len() + string(text).len();
        if let Some(why) = names::qualified(&key.to_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", &json!(key), &why));
        }
    }
    if size > ANNOTATION_BYTES {
        causes.push(too_long("metadata.annotations", ANNOTATION_BYTES));
    }
    for (index, owner) in list(&meta["ownerReferences"]).iter().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if string(&owner[field]).is_empty() {
                let path = format!("metadata.ownerReferences[{index}].{field}");
                causes.push(Cause::invalid(
                    path,
                    &json!(""),
                    &format!("{field} must not be empty"),
                ));
            }
        }
    }
    for (index, finalizer) in list(&meta["finalizers"]).iter().enumerate() {
        if let Some(why) = names::qualified(string(finalizer)) {
            causes.push(Cause::invalid(format!("metadata.finalizers[{index}]"), finalizer, &why));
        }
    }
    causes
}

fn too_long(field: &str, most: usize) -> Cause {
    Cause {
        field: field.to_owned(),
        reason: "FieldValueTooLong",
        message: format!("Too long: may not be more than {most} bytes"),
    }
}

fn labels(field: &str, labels: &Value, causes: &mut Vec<Cause>) {
    for (key, value) in labels.as_object().into_iter().flatten() {
        if let Some(why) = names::qualified(key) {
            causes.push(Cause::invalid(field, &json!(key), &why));
        }
        if let Some(why) = names::label_value(string(value)) {
            causes.push(Cause::invalid(field, value, &why));
        }
    }
}

fn data(value: &Value, causes: &mut Vec<Cause>) {
    let mut size = 0;
    for field in ["data", "binaryData"] {
        for (key, content) in value[field].as_object().into_iter().flatten() {
            size += string(content).len();
            if let Some(why) = names::config_key(key) {
                causes.push(Cause::invalid(format!("{field}[{key}]"), &json!(key), &why));
            }
        }
    }
    let doubled = value["data"].as_object().into_iter().flatten();
    for (key, _) in doubled.filter(|(key, _)| !value["binaryData"][key.as_str()].is_null()) {
        let text = "duplicate of key present in binaryData";
        causes.push(Cause::invalid(format!("data[{key}]"), &json!(key), text));
    }
    if size > DATA_BYTES {
        causes.push(too_long("", DATA_BYTES));
    }
}

fn data_update(old: &Value, new: &Value, causes: &mut Vec<Cause>) {
    if old["immutable"] != true {
        return;
    }
    if new["immutable"] != true {
        causes.push(Cause::forbidden("immutable", "field is immutable when `immutable` is set"));
    }
    for field in ["data", "binaryData"] {
        if old[field] != new[field] {
            causes.push(Cause::forbidden(field, "field is immutable when `immutable` is set"));
        }
    }
}

fn node(value: &Value, causes: &mut Vec<Cause>) {
    for (index, taint) in list(&value["spec"]["taints"]).iter().enumerate() {
        let field = format!("spec.taints[{index}]");
        if let Some(why) = names::qualified(string(&taint["key"])) {
            causes.push(Cause::invalid(format!("{field}.key"), &taint["key"], &why));
        }
        let effects = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
        choice(&format!("{field}.effect"), &taint["effect"], &effects, causes);
    }
}

#[cfg(test)]
mod tests;
