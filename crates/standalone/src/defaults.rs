//! What Kubernetes fills in where a client says nothing. Pure; applied before every write, so it must
//! not change what is there.

mod pod;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

pub(crate) use self::pod::{new_pod, qos_class};
use crate::kinds::{self, Kind};

/// Sets a field that is missing or null.
fn set(object: &mut Value, field: &str, value: impl Into<Value>) {
    if let Some(map) = object.as_object_mut() {
        let slot = map.entry(field).or_insert(Value::Null);
        if slot.is_null() {
            *slot = value.into();
        }
    }
}

/// As [`set`], and an empty text counts as missing.
fn set_text(object: &mut Value, field: &str, value: impl Into<Value>) {
    if object[field] == "" {
        object[field] = Value::Null;
    }
    set(object, field, value);
}

fn each<'a>(object: &'a mut Value, list: &str) -> impl Iterator<Item = &'a mut Value> {
    object
        .get_mut(list)
        .and_then(Value::as_array_mut)
        .map(|items| items.iter_mut())
        .into_iter()
        .flatten()
        .filter(|item| item.is_object())
}

/// Completes an object of `kind`.
pub(crate) fn apply(kind: &Kind, value: &mut Value) {
    if *kind == kinds::POD {
        pod::spec(&mut value["spec"]);
    } else if *kind == kinds::SERVICE {
        service(&mut value["spec"]);
    } else if *kind == kinds::DEPLOYMENT {
        deployment(value);
    } else if *kind == kinds::REPLICA_SET {
        replica_set(value);
    } else if *kind == kinds::SECRET {
        secret(value);
    } else if *kind == kinds::NAMESPACE {
        namespace(value);
    } else if *kind == kinds::ENDPOINT_SLICE {
        for port in each(value, "ports") {
            set(port, "name", "");
            set_text(port, "protocol", "TCP");
        }
    } else if *kind == kinds::ENDPOINTS {
        for subset in each(value, "subsets") {
            for port in each(subset, "ports") {
                set_text(port, "protocol", "TCP");
            }
        }
    } else if *kind == kinds::PERSISTENT_VOLUME_CLAIM || *kind == kinds::PERSISTENT_VOLUME {
        set(&mut value["spec"], "volumeMode", "Filesystem");
    } else if *kind == kinds::STORAGE_CLASS {
        set(value, "reclaimPolicy", "Delete");
        set(value, "volumeBindingMode", "Immediate");
    }
}

fn namespace(value: &mut Value) {
    let name = value["metadata"]["name"].clone();
    if !value["metadata"]["labels"].is_object() {
        value["metadata"]["labels"] = json!({});
    }
    value["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
    if !value["spec"].is_object() {
        value["spec"] = json!({});
    }
    if value["metadata"]["deletionTimestamp"].is_null() {
        set(&mut value["spec"], "finalizers", json!(["kubernetes"]));
    }
}

fn secret(value: &mut Value) {
    set_text(value, "type", "Opaque");
    let Some(plain) = value.as_object_mut().and_then(|map| map.remove("stringData")) else {
        return;
    };
    let Some(plain) = plain.as_object() else { return };
    if !value["data"].is_object() {
        value["data"] = json!({});
    }
    for (key, text) in plain {
        value["data"][key] = STANDARD.encode(text.as_str().unwrap_or_default()).into();
    }
}

fn service(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    set_text(spec, "type", "ClusterIP");
    set_text(spec, "sessionAffinity", "None");
    if spec["sessionAffinity"] == "ClientIP" {
        set(spec, "sessionAffinityConfig", json!({}));
        set(&mut spec["sessionAffinityConfig"], "clientIP", json!({}));
        set(&mut spec["sessionAffinityConfig"]["clientIP"], "timeoutSeconds", 10_800);
    } else if let Some(map) = spec.as_object_mut() {
        map.remove("sessionAffinityConfig");
    }
    for port in each(spec, "ports") {
        set_text(port, "protocol", "TCP");
        let number = port["port"].clone();
        if port["targetPort"] == 0 || port["targetPort"] == "" {
            port["targetPort"] = Value::Null;
        }
        set(port, "targetPort", number);
    }
    let outside = matches!(spec["type"].as_str(), Some("NodePort" | "LoadBalancer"));
    let external_ips = spec["externalIPs"].as_array().is_some_and(|list| !list.is_empty());
    if outside || external_ips {
        set_text(spec, "externalTrafficPolicy", "Cluster");
    } else if let Some(map) = spec.as_object_mut() {
        map.remove("externalTrafficPolicy");
    }
    if spec["type"] == "LoadBalancer" {
        set(spec, "allocateLoadBalancerNodePorts", true);
    }
    if spec["type"] != "ExternalName" {
        set_text(spec, "internalTrafficPolicy", "Cluster");
    }
}

/// An update that says nothing about addresses and ports keeps those that the service has.
pub(crate) fn keep_service_allocation(old: &Value, new: &mut Value) {
    let (old, new) = (&old["spec"], &mut new["spec"]);
    if !new.is_object() || new["type"] == "ExternalName" || old["type"] == "ExternalName" {
        return;
    }
    for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        if new[field] == "" {
            new[field] = Value::Null;
        }
        if !old[field].is_null() {
            set(new, field, old[field].clone());
        }
    }
    if matches!(new["type"].as_str(), Some("NodePort" | "LoadBalancer")) {
        let old_ports = old["ports"].as_array().cloned().unwrap_or_default();
        let taken: Vec<i64> = each(new, "ports").filter_map(|p| p["nodePort"].as_i64()).collect();
        for port in each(new, "ports") {
            let same = |o: &&Value| o["port"] == port["port"] && o["protocol"] == port["protocol"];
            let before = old_ports.iter().find(same).and_then(|o| o["nodePort"].as_i64());
            if let Some(before) = before.filter(|n| *n != 0 && !taken.contains(n)) {
                if port["nodePort"] == 0 {
                    port["nodePort"] = Value::Null;
                }
                set(port, "nodePort", before);
            }
        }
    } else {
        for port in each(new, "ports") {
            let stale = port["nodePort"].as_i64().is_some_and(|n| {
                old["ports"].as_array().is_some_and(|o| o.iter().any(|p| p["nodePort"] == n))
            });
            if stale && let Some(map) = port.as_object_mut() {
                map.remove("nodePort");
            }
        }
    }
    clear_if_absent(old, new);
}

fn clear_if_absent(old: &Value, new: &mut Value) {
    let Some(map) = new.as_object_mut() else { return };
    if old["healthCheckNodePort"].is_null() && map.get("healthCheckNodePort") == Some(&json!(0)) {
        map.remove("healthCheckNodePort");
    }
    map.retain(|_, v| !v.is_null());
}

fn deployment(value: &mut Value) {
    let spec = &mut value["spec"];
    if !spec.is_object() {
        return;
    }
    set(spec, "replicas", 1);
    set(spec, "revisionHistoryLimit", 10);
    set(spec, "progressDeadlineSeconds", 600);
    set(spec, "strategy", json!({}));
    set_text(&mut spec["strategy"], "type", "RollingUpdate");
    if spec["strategy"]["type"] == "RollingUpdate" {
        let strategy = &mut spec["strategy"];
        set(strategy, "rollingUpdate", json!({}));
        set(&mut strategy["rollingUpdate"], "maxUnavailable", "25%");
        set(&mut strategy["rollingUpdate"], "maxSurge", "25%");
    }
    template(spec);
}

fn replica_set(value: &mut Value) {
    let labels = value["spec"]["template"]["metadata"]["labels"].clone();
    if labels.is_object() && value["metadata"]["labels"].as_object().is_none_or(|l| l.is_empty()) {
        value["metadata"]["labels"] = labels;
    }
    let spec = &mut value["spec"];
    if spec.is_object() {
        set(spec, "replicas", 1);
        template(spec);
    }
}

fn template(spec: &mut Value) {
    if !spec["template"].is_object() {
        return;
    }
    set(&mut spec["template"], "metadata", json!({}));
    // As Kubernetes shows it: a template has never been made.
    pod::spec(&mut spec["template"]["spec"]);
}

#[cfg(test)]
mod tests;
