//! Pods: their containers, volumes and references between them.

mod containers;
mod volumes;

use serde_json::{Value, json};

use super::{choice, list, names, not_negative, string};
use crate::error::Cause;

const MUTABLE: &str = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

pub(super) fn check(pod: &Value, causes: &mut Vec<Cause>) {
    check_spec("spec", &pod["spec"], causes);
}

/// Checks a pod's spec, also one in a template; `at` is its path.
pub(super) fn check_spec(at: &str, spec: &Value, causes: &mut Vec<Cause>) {
    let volumes = volumes::check(at, spec, causes);
    containers::check(at, spec, &volumes, causes);
    let field = |name: &str| format!("{at}.{name}");
    choice(
        &field("restartPolicy"),
        &spec["restartPolicy"],
        &["Always", "OnFailure", "Never"],
        causes,
    );
    let dns = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    choice(&field("dnsPolicy"), &spec["dnsPolicy"], &dns, causes);
    if spec["dnsPolicy"] == "None" && list(&spec["dnsConfig"]["nameservers"]).is_empty() {
        causes.push(Cause::required(
            field("dnsConfig.nameservers"),
            "must provide at least one DNS nameserver when `dnsPolicy` is None",
        ));
    }
    not_negative(
        &field("terminationGracePeriodSeconds"),
        &spec["terminationGracePeriodSeconds"],
        causes,
    );
    if let Some(secs) = spec["activeDeadlineSeconds"].as_i64()
        && secs < 1
    {
        let text = "must be between 1 and 2147483647, inclusive";
        causes.push(Cause::invalid(field("activeDeadlineSeconds"), &json!(secs), text));
    }
    for name in ["hostname", "subdomain"] {
        let text = string(&spec[name]);
        if let Some(why) = names::label(text).filter(|_| !text.is_empty()) {
            causes.push(Cause::invalid(field(name), &spec[name], &why));
        }
    }
    super::labels(&field("nodeSelector"), &spec["nodeSelector"], causes);
    tolerations(at, spec, causes);
}

fn tolerations(at: &str, spec: &Value, causes: &mut Vec<Cause>) {
    for (index, toleration) in list(&spec["tolerations"]).iter().enumerate() {
        let field = format!("{at}.tolerations[{index}]");
        let operators = ["Equal", "Exists", "Lt", "Gt"];
        choice(&format!("{field}.operator"), &toleration["operator"], &operators, causes);
        let effects = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
        if toleration["effect"] != "" {
            choice(&format!("{field}.effect"), &toleration["effect"], &effects, causes);
        }
        if toleration["operator"] == "Exists" && !string(&toleration["value"]).is_empty() {
            let text = "value must be empty when `operator` is 'Exists'";
            causes.push(Cause::invalid(format!("{field}.operator"), &toleration["value"], text));
        }
    }
}

/// The fields of a running pod that may change; all others may not.
pub(super) fn check_update(old: &Value, new: &Value, causes: &mut Vec<Cause>) {
    let mut allowed = new["spec"].clone();
    let before = &old["spec"];
    for containers in ["containers", "initContainers"] {
        let now = allowed.get_mut(containers).and_then(Value::as_array_mut);
        let (Some(now), Some(then)) = (now, before[containers].as_array()) else { continue };
        if now.len() != then.len() {
            let text = "pod updates may not add or remove containers";
            causes.push(Cause::forbidden(format!("spec.{containers}"), text));
            return;
        }
        for (container, was) in now.iter_mut().zip(then) {
            container["image"] = was["image"].clone();
        }
    }
    let deadline =
        (before["activeDeadlineSeconds"].as_i64(), allowed["activeDeadlineSeconds"].as_i64());
    match deadline {
        (Some(was), Some(now)) if now > was => {
            let text = "must be less than or equal to previous value";
            causes.push(Cause::invalid("spec.activeDeadlineSeconds", &json!(now), text));
        }
        (Some(_), None) => {
            let text = "must not update from a positive integer to nil value";
            causes.push(Cause::invalid("spec.activeDeadlineSeconds", &Value::Null, text));
        }
        _ => {}
    }
    if list(&before["tolerations"]).iter().any(|t| !list(&allowed["tolerations"]).contains(t)) {
        causes.push(Cause::forbidden(
            "spec.tolerations",
            "existing toleration can not be modified except its tolerationSeconds",
        ));
    }
    for field in ["activeDeadlineSeconds", "tolerations", "ephemeralContainers", "schedulingGates"]
    {
        match &before[field] {
            Value::Null => drop(allowed.as_object_mut().and_then(|map| map.remove(field))),
            was => allowed[field] = was.clone(),
        }
    }
    if before["terminationGracePeriodSeconds"].as_i64().is_some_and(|n| n < 0) {
        allowed["terminationGracePeriodSeconds"] = before["terminationGracePeriodSeconds"].clone();
    }
    if allowed != *before {
        causes.push(Cause::forbidden("spec", MUTABLE));
    }
}
