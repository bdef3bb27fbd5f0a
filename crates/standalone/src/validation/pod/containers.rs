//! Containers: names, images, ports, variables, mounts, probes, resources.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::error::Cause;
use crate::quantity;
use crate::validation::{choice, list, names, not_negative, port, string};

/// Checks all containers against each other and against the pod's volumes.
pub(super) fn check(at: &str, spec: &Value, volumes: &BTreeSet<&str>, causes: &mut Vec<Cause>) {
    if list(&spec["containers"]).is_empty() {
        causes.push(Cause::required(format!("{at}.containers"), ""));
    }
    let mut known = BTreeSet::new();
    for group in ["containers", "initContainers", "ephemeralContainers"] {
        for (index, container) in list(&spec[group]).iter().enumerate() {
            let field = format!("{at}.{group}[{index}]");
            name(&field, container, &mut known, causes);
            one(&field, container, volumes, causes);
            if spec["hostNetwork"] == true {
                host_ports(&field, container, causes);
            }
        }
    }
    for (index, container) in list(&spec["initContainers"]).iter().enumerate() {
        // Only a container that runs beside the others has somebody to ask whether it is ready.
        let sidecar = container["restartPolicy"] == "Always";
        for probe in ["livenessProbe", "readinessProbe", "startupProbe", "lifecycle"] {
            if !sidecar && !container[probe].is_null() {
                let text = "may not be set for init containers without restartPolicy=Always";
                causes
                    .push(Cause::forbidden(format!("{at}.initContainers[{index}].{probe}"), text));
            }
        }
    }
}

fn name<'a>(
    field: &str,
    container: &'a Value,
    known: &mut BTreeSet<&'a str>,
    causes: &mut Vec<Cause>,
) {
    let name = string(&container["name"]);
    let field = format!("{field}.name");
    if name.is_empty() {
        causes.push(Cause::required(field, ""));
    } else if let Some(why) = names::label(name) {
        causes.push(Cause::invalid(field, &container["name"], &why));
    } else if !known.insert(name) {
        causes.push(Cause::duplicate(field, &container["name"]));
    }
}

fn one(field: &str, container: &Value, volumes: &BTreeSet<&str>, causes: &mut Vec<Cause>) {
    let image = string(&container["image"]);
    if image.is_empty() {
        causes.push(Cause::required(format!("{field}.image"), ""));
    } else if image.trim() != image {
        let text = "must not have leading or trailing whitespace";
        causes.push(Cause::invalid(format!("{field}.image"), &container["image"], text));
    }
    let policies = ["Always", "IfNotPresent", "Never"];
    choice(&format!("{field}.imagePullPolicy"), &container["imagePullPolicy"], &policies, causes);
    let messages = ["File", "FallbackToLogsOnError"];
    let policy = &container["terminationMessagePolicy"];
    choice(&format!("{field}.terminationMessagePolicy"), policy, &messages, causes);
    ports(field, container, causes);
    variables(field, container, causes);
    mounts(field, container, volumes, causes);
    resources(field, &container["resources"], causes);
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if container[name].is_object() {
            probe(&format!("{field}.{name}"), name, &container[name], causes);
        }
    }
    for hook in ["postStart", "preStop"] {
        let handler = &container["lifecycle"][hook];
        if handler.is_object() {
            let kinds = ["exec", "httpGet", "tcpSocket", "sleep"];
            handlers(&format!("{field}.lifecycle.{hook}"), handler, &kinds, causes);
        }
    }
}

fn ports(field: &str, container: &Value, causes: &mut Vec<Cause>) {
    let mut known = BTreeSet::new();
    for (index, one) in list(&container["ports"]).iter().enumerate() {
        let field = format!("{field}.ports[{index}]");
        let name = string(&one["name"]);
        if let Some(why) = names::port_name(name).filter(|_| !name.is_empty()) {
            causes.push(Cause::invalid(format!("{field}.name"), &one["name"], &why));
        } else if !name.is_empty() && !known.insert(name) {
            causes.push(Cause::duplicate(format!("{field}.name"), &one["name"]));
        }
        if one["containerPort"].as_i64().unwrap_or(0) == 0 {
            causes.push(Cause::required(format!("{field}.containerPort"), ""));
        } else {
            port(&format!("{field}.containerPort"), &one["containerPort"], causes);
        }
        if one["hostPort"].as_i64().unwrap_or(0) != 0 {
            port(&format!("{field}.hostPort"), &one["hostPort"], causes);
        }
        choice(&format!("{field}.protocol"), &one["protocol"], &["SCTP", "TCP", "UDP"], causes);
    }
}

fn host_ports(field: &str, container: &Value, causes: &mut Vec<Cause>) {
    for (index, one) in list(&container["ports"]).iter().enumerate() {
        if one["hostPort"] != one["containerPort"] {
            let text = "must match `hostPort` when `hostNetwork` is true";
            let field = format!("{field}.ports[{index}].containerPort");
            causes.push(Cause::invalid(field, &one["containerPort"], text));
        }
    }
}

fn variables(field: &str, container: &Value, causes: &mut Vec<Cause>) {
    for (index, variable) in list(&container["env"]).iter().enumerate() {
        let field = format!("{field}.env[{index}]");
        let name = string(&variable["name"]);
        if name.is_empty() {
            causes.push(Cause::required(format!("{field}.name"), ""));
        } else if let Some(why) = names::variable(name) {
            causes.push(Cause::invalid(format!("{field}.name"), &variable["name"], &why));
        }
        let from = &variable["valueFrom"];
        if from.is_object() {
            if !string(&variable["value"]).is_empty() {
                let text = "may not be specified when `value` is not empty";
                causes.push(Cause::invalid(format!("{field}.valueFrom"), &json!(""), text));
            }
            let sources = from.as_object().map_or(0, serde_json::Map::len);
            if sources != 1 {
                let text = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`";
                causes.push(Cause::invalid(format!("{field}.valueFrom"), &json!(""), text));
            }
            for source in ["configMapKeyRef", "secretKeyRef"] {
                if from[source].is_object() && string(&from[source]["key"]).is_empty() {
                    causes.push(Cause::required(format!("{field}.valueFrom.{source}.key"), ""));
                }
            }
        }
    }
}

fn mounts(field: &str, container: &Value, volumes: &BTreeSet<&str>, causes: &mut Vec<Cause>) {
    let mut places = BTreeSet::new();
    for (index, mount) in list(&container["volumeMounts"]).iter().enumerate() {
        let field = format!("{field}.volumeMounts[{index}]");
        let (name, path) = (string(&mount["name"]), string(&mount["mountPath"]));
        if name.is_empty() {
            causes.push(Cause::required(format!("{field}.name"), ""));
        } else if !volumes.contains(name) {
            causes.push(Cause::not_found(format!("{field}.name"), &mount["name"]));
        }
        if path.is_empty() {
            causes.push(Cause::required(format!("{field}.mountPath"), ""));
        } else if !places.insert(path) {
            let text = "must be unique";
            causes.push(Cause::invalid(format!("{field}.mountPath"), &mount["mountPath"], text));
        }
        for name in ["subPath", "subPathExpr"] {
            let path = string(&mount[name]);
            let field = format!("{field}.{name}");
            if path.starts_with('/') {
                causes.push(Cause::invalid(field, &mount[name], "must be a relative path"));
            } else if path.split('/').any(|part| part == "..") {
                causes.push(Cause::invalid(field, &mount[name], "must not contain '..'"));
            }
        }
    }
}

fn resources(field: &str, resources: &Value, causes: &mut Vec<Cause>) {
    for kind in ["limits", "requests"] {
        for (name, value) in resources[kind].as_object().into_iter().flatten() {
            let field = format!("{field}.resources.{kind}[{name}]");
            match quantity::of(value) {
                None => {
                    let text = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";
                    causes.push(Cause::invalid(field, value, text));
                }
                Some(amount) if amount < 0 => {
                    causes.push(Cause::invalid(field, value, "must be greater than or equal to 0"));
                }
                Some(_) => {}
            }
        }
    }
    for (name, request) in resources["requests"].as_object().into_iter().flatten() {
        let limit = &resources["limits"][name.as_str()];
        if quantity::compare(request, limit) == Some(Ordering::Greater) {
            let text = format!("must be less than or equal to {name} limit of {}", string(limit));
            causes.push(Cause::invalid(format!("{field}.resources.requests"), request, &text));
        }
    }
}

fn probe(field: &str, name: &str, probe: &Value, causes: &mut Vec<Cause>) {
    handlers(field, probe, &["exec", "httpGet", "tcpSocket", "grpc"], causes);
    for number in [
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ] {
        not_negative(&format!("{field}.{number}"), &probe[number], causes);
    }
    if name != "readinessProbe" && probe["successThreshold"].as_i64().is_some_and(|n| n > 1) {
        let value = &probe["successThreshold"];
        causes.push(Cause::invalid(format!("{field}.successThreshold"), value, "must be 1"));
    }
}

fn handlers(field: &str, handler: &Value, kinds: &[&str], causes: &mut Vec<Cause>) {
    let set: Vec<_> = kinds.iter().filter(|kind| !handler[**kind].is_null()).collect();
    if set.is_empty() {
        causes.push(Cause::required(field, "must specify a handler type"));
    }
    for extra in set.iter().skip(1) {
        let text = "may not specify more than 1 handler type";
        causes.push(Cause::forbidden(format!("{field}.{extra}"), text));
    }
    if handler["exec"].is_object() && list(&handler["exec"]["command"]).is_empty() {
        causes.push(Cause::required(format!("{field}.exec.command"), ""));
    }
    for kind in ["httpGet", "tcpSocket"] {
        if handler[kind].is_object() && !handler[kind]["port"].is_string() {
            port(&format!("{field}.{kind}.port"), &handler[kind]["port"], causes);
        }
    }
}
