//! Volumes: one source each.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::error::Cause;
use crate::validation::{list, names, string};

/// Checks the volumes and returns their names.
pub(super) fn check<'a>(at: &str, spec: &'a Value, causes: &mut Vec<Cause>) -> BTreeSet<&'a str> {
    let mut known = BTreeSet::new();
    for (index, volume) in list(&spec["volumes"]).iter().enumerate() {
        let field = format!("{at}.volumes[{index}]");
        let name = string(&volume["name"]);
        if name.is_empty() {
            causes.push(Cause::required(format!("{field}.name"), ""));
        } else if let Some(why) = names::label(name) {
            causes.push(Cause::invalid(format!("{field}.name"), &volume["name"], &why));
        } else if !known.insert(name) {
            causes.push(Cause::duplicate(format!("{field}.name"), &volume["name"]));
        }
        source(&field, volume, causes);
    }
    known
}

fn source(field: &str, volume: &Value, causes: &mut Vec<Cause>) {
    let sources: Vec<&String> = volume
        .as_object()
        .map(|map| map.keys().filter(|key| *key != "name").collect())
        .unwrap_or_default();
    if sources.is_empty() {
        causes.push(Cause::required(field, "must specify a volume type"));
    }
    for extra in sources.iter().skip(1) {
        let text = "may not specify more than 1 volume type";
        causes.push(Cause::forbidden(format!("{field}.{extra}"), text));
    }
    let required = [
        ("hostPath", "path"),
        ("secret", "secretName"),
        ("configMap", "name"),
        ("persistentVolumeClaim", "claimName"),
        ("csi", "driver"),
        ("nfs", "server"),
    ];
    for (kind, name) in required {
        if volume[kind].is_object() && string(&volume[kind][name]).is_empty() {
            causes.push(Cause::required(format!("{field}.{kind}.{name}"), ""));
        }
    }
    if string(&volume["hostPath"]["path"]).split('/').any(|part| part == "..") {
        let value = &volume["hostPath"]["path"];
        causes.push(Cause::invalid(
            format!("{field}.hostPath.path"),
            value,
            "must not contain '..'",
        ));
    }
    for kind in ["secret", "configMap", "downwardAPI"] {
        for (index, item) in list(&volume[kind]["items"]).iter().enumerate() {
            item_path(&format!("{field}.{kind}.items[{index}]"), kind, item, causes);
        }
    }
}

fn item_path(field: &str, kind: &str, item: &Value, causes: &mut Vec<Cause>) {
    if kind != "downwardAPI" && string(&item["key"]).is_empty() {
        causes.push(Cause::required(format!("{field}.key"), ""));
    }
    let path = string(&item["path"]);
    let field = format!("{field}.path");
    if path.is_empty() {
        causes.push(Cause::required(field, ""));
    } else if path.starts_with('/') {
        causes.push(Cause::invalid(field, &item["path"], "must be a relative path"));
    } else if path.split('/').any(|part| part == "..") {
        causes.push(Cause::invalid(field, &item["path"], "must not contain '..'"));
    }
}
