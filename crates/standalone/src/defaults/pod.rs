//! Defaults of pods and of what is in them.

use serde_json::{Value, json};

use super::{each, set, set_text};

/// Completes a pod's spec, also one in a template.
pub(super) fn spec(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    set_text(spec, "restartPolicy", "Always");
    set_text(spec, "dnsPolicy", "ClusterFirst");
    set_text(spec, "schedulerName", "default-scheduler");
    set(spec, "terminationGracePeriodSeconds", 30);
    set(spec, "securityContext", json!({}));
    if spec["serviceAccountName"] == "" {
        spec["serviceAccountName"] = Value::Null;
    }
    let account = spec["serviceAccountName"].clone();
    let legacy = spec["serviceAccount"].clone();
    if account.is_string() {
        spec["serviceAccount"] = account;
    } else if legacy.as_str().is_some_and(|l| !l.is_empty()) {
        spec["serviceAccountName"] = legacy;
    }
    let host_network = spec["hostNetwork"] == true;
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for one in each(spec, list) {
            container(one, host_network);
        }
    }
    for one in each(spec, "volumes") {
        volume(one);
    }
    if let Some(map) = spec.as_object_mut() {
        map.retain(|_, value| !value.is_null());
    }
}

fn container(container: &mut Value, host_network: bool) {
    let image = container["image"].as_str().unwrap_or_default();
    let policy = if is_latest(image) { "Always" } else { "IfNotPresent" };
    set_text(container, "imagePullPolicy", policy);
    set_text(container, "terminationMessagePath", "/dev/termination-log");
    set_text(container, "terminationMessagePolicy", "File");
    set(container, "resources", json!({}));
    requests(&mut container["resources"]);
    for port in each(container, "ports") {
        set_text(port, "protocol", "TCP");
        if host_network {
            let number = port["containerPort"].clone();
            set(port, "hostPort", number);
        }
    }
    for variable in each(container, "env") {
        if let Some(reference) =
            variable.get_mut("valueFrom").and_then(|from| from.get_mut("fieldRef"))
        {
            set_text(reference, "apiVersion", "v1");
        }
        if let Some(reference) =
            variable.get_mut("valueFrom").and_then(|from| from.get_mut("resourceFieldRef"))
        {
            set(reference, "divisor", "0");
        }
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(one) = container.get_mut(name).filter(|p| p.is_object()) {
            probe(one);
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(get) = container
            .get_mut("lifecycle")
            .and_then(|l| l.get_mut(hook))
            .and_then(|h| h.get_mut("httpGet"))
        {
            http_get(get);
        }
    }
}

/// What is limited and not requested is requested up to its limit.
fn requests(resources: &mut Value) {
    let Some(limits) = resources["limits"].as_object().cloned() else { return };
    if !limits.is_empty() {
        set(resources, "requests", json!({}));
        for (name, quantity) in limits {
            set(&mut resources["requests"], &name, quantity);
        }
    }
}

fn probe(probe: &mut Value) {
    for (field, value) in [
        ("timeoutSeconds", 1),
        ("periodSeconds", 10),
        ("successThreshold", 1),
        ("failureThreshold", 3),
    ] {
        if probe[field] == 0 {
            probe[field] = Value::Null;
        }
        set(probe, field, value);
    }
    if let Some(get) = probe.get_mut("httpGet") {
        http_get(get);
    }
    if let Some(grpc) = probe.get_mut("grpc") {
        set(grpc, "service", "");
    }
}

fn http_get(get: &mut Value) {
    set_text(get, "path", "/");
    set_text(get, "scheme", "HTTP");
}

/// No tag and no digest, or the tag `latest`.
fn is_latest(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let last = image.rsplit('/').next().unwrap_or_default();
    last.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

fn volume(volume: &mut Value) {
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(one) = volume.get_mut(source).filter(|s| s.is_object()) {
            // 0644
            set(one, "defaultMode", 420);
            items(one);
            for part in each(one, "sources") {
                if let Some(token) = part.get_mut("serviceAccountToken") {
                    set(token, "expirationSeconds", 3600);
                }
                if let Some(downward) = part.get_mut("downwardAPI") {
                    items(downward);
                }
            }
        }
    }
    if let Some(path) = volume.get_mut("hostPath") {
        set(path, "type", "");
    }
    // A volume with nothing but a name is an empty directory.
    if volume.as_object().is_some_and(|map| map.len() == 1 && map.contains_key("name")) {
        volume["emptyDir"] = json!({});
    }
}

fn items(source: &mut Value) {
    for item in each(source, "items") {
        if let Some(reference) = item.get_mut("fieldRef") {
            set_text(reference, "apiVersion", "v1");
        }
        if let Some(reference) = item.get_mut("resourceFieldRef") {
            set(reference, "divisor", "0");
        }
    }
}

/// What admission adds to a pod itself, and not to a template.
pub(crate) fn new_pod(pod: &mut Value) {
    let mirror = !pod["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_null();
    let spec = &mut pod["spec"];
    if !spec.is_object() {
        return;
    }
    set(spec, "enableServiceLinks", true);
    set(spec, "priority", 0);
    set(spec, "preemptionPolicy", "PreemptLowerPriority");
    if mirror {
        return;
    }
    set(spec, "tolerations", json!([]));
    let Some(tolerations) = spec["tolerations"].as_array_mut() else { return };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let has = tolerations.iter().any(|t| {
            (t["key"] == key || t["key"].is_null() || t["key"] == "")
                && (t["effect"] == "NoExecute" || t["effect"].is_null() || t["effect"] == "")
        });
        if !has {
            tolerations.push(json!({
                "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300,
            }));
        }
    }
}

/// `Guaranteed`, `Burstable` or `BestEffort`, from requests and limits of CPU and memory.
pub(crate) fn qos_class(spec: &Value) -> &'static str {
    let lists = ["containers", "initContainers"];
    let containers = lists.iter().filter_map(|l| spec[l].as_array()).flatten();
    let (mut any, mut guaranteed) = (false, true);
    for container in containers {
        for resource in ["cpu", "memory"] {
            let limit = &container["resources"]["limits"][resource];
            let request = match &container["resources"]["requests"][resource] {
                Value::Null => limit,
                request => request,
            };
            any |= !limit.is_null() || !request.is_null();
            let same = crate::quantity::compare(limit, request) == Some(std::cmp::Ordering::Equal);
            guaranteed &= !limit.is_null() && same;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}
