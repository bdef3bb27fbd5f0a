//! Deployments and ReplicaSets.

use serde_json::Value;

use super::{choice, names, not_negative, pod, string};
use crate::error::Cause;
use crate::kinds::{self, Kind};

pub(super) fn check(kind: &Kind, value: &Value, causes: &mut Vec<Cause>) {
    let spec = &value["spec"];
    for number in ["replicas", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"]
    {
        not_negative(&format!("spec.{number}"), &spec[number], causes);
    }
    selector(spec, causes);
    let template = &spec["template"];
    super::labels("spec.template.metadata.labels", &template["metadata"]["labels"], causes);
    pod::check_spec("spec.template.spec", &template["spec"], causes);
    let policy = &template["spec"]["restartPolicy"];
    if policy.is_string() && policy != "Always" {
        causes.push(Cause::not_supported("spec.template.spec.restartPolicy", policy, &["Always"]));
    }
    if !template["spec"]["activeDeadlineSeconds"].is_null() {
        let text = "activeDeadlineSeconds in ReplicaSet is not Supported";
        causes.push(Cause::forbidden("spec.template.spec.activeDeadlineSeconds", text));
    }
    if *kind == kinds::DEPLOYMENT {
        strategy(&spec["strategy"], causes);
        let (deadline, ready) =
            (spec["progressDeadlineSeconds"].as_i64(), spec["minReadySeconds"].as_i64());
        if let Some(deadline) = deadline
            && deadline <= ready.unwrap_or(0)
        {
            let text = "must be greater than minReadySeconds";
            let value = &spec["progressDeadlineSeconds"];
            causes.push(Cause::invalid("spec.progressDeadlineSeconds", value, text));
        }
    }
}

fn selector(spec: &Value, causes: &mut Vec<Cause>) {
    let selector = &spec["selector"];
    if !selector.is_object() {
        return causes.push(Cause::required("spec.selector", ""));
    }
    let labels = selector["matchLabels"].as_object();
    let expressions = selector["matchExpressions"].as_array();
    if labels.is_none_or(|l| l.is_empty()) && expressions.is_none_or(Vec::is_empty) {
        let text = "empty selector is invalid for deployment";
        return causes.push(Cause::invalid("spec.selector", selector, text));
    }
    super::labels("spec.selector.matchLabels", &selector["matchLabels"], causes);
    for (index, expression) in expressions.into_iter().flatten().enumerate() {
        let field = format!("spec.selector.matchExpressions[{index}]");
        if let Some(why) = names::qualified(string(&expression["key"])) {
            causes.push(Cause::invalid(format!("{field}.key"), &expression["key"], &why));
        }
        let operators = ["DoesNotExist", "Exists", "In", "NotIn"];
        choice(&format!("{field}.operator"), &expression["operator"], &operators, causes);
    }
    let has = &spec["template"]["metadata"]["labels"];
    let fits = labels.into_iter().flatten().all(|(key, value)| has[key.as_str()] == *value)
        && expressions.into_iter().flatten().all(|e| matches(e, has));
    if !fits {
        let text = "`selector` does not match template `labels`";
        causes.push(Cause::invalid("spec.template.metadata.labels", has, text));
    }
}

fn matches(expression: &Value, labels: &Value) -> bool {
    let have = &labels[string(&expression["key"])];
    let listed = super::list(&expression["values"]).contains(have);
    match string(&expression["operator"]) {
        "In" => !have.is_null() && listed,
        "NotIn" => have.is_null() || !listed,
        "Exists" => !have.is_null(),
        "DoesNotExist" => have.is_null(),
        _ => true,
    }
}

fn strategy(strategy: &Value, causes: &mut Vec<Cause>) {
    choice("spec.strategy.type", &strategy["type"], &["Recreate", "RollingUpdate"], causes);
    let rolling = &strategy["rollingUpdate"];
    if strategy["type"] == "Recreate" && rolling.is_object() {
        let text = "may not be specified when strategy `type` is 'Recreate'";
        causes.push(Cause::forbidden("spec.strategy.rollingUpdate", text));
        return;
    }
    if !rolling.is_object() {
        return;
    }
    for name in ["maxSurge", "maxUnavailable"] {
        let (field, value) = (format!("spec.strategy.rollingUpdate.{name}"), &rolling[name]);
        if value.as_i64().is_some_and(|n| n < 0) {
            causes.push(Cause::invalid(field, value, "must be greater than or equal to 0"));
        } else if let Some(text) = value.as_str()
            && percent(text).is_none()
        {
            let why = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";
            causes.push(Cause::invalid(field, value, why));
        }
    }
    let zero =
        |value: &Value| value.as_i64() == Some(0) || value.as_str().and_then(percent) == Some(0);
    if zero(&rolling["maxSurge"]) && zero(&rolling["maxUnavailable"]) {
        let text = "may not be 0 when `maxSurge` is 0";
        let value = &rolling["maxUnavailable"];
        causes.push(Cause::invalid("spec.strategy.rollingUpdate.maxUnavailable", value, text));
    }
}

fn percent(text: &str) -> Option<u32> {
    text.strip_suffix('%')?.parse().ok()
}
