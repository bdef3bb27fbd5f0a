//! The pod's row: READY, STATUS and RESTARTS as Kubernetes derives them.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Column, age, since, text, wide};

pub(super) const COLUMNS: &[Column] = &[
    text("Ready"),
    text("Status"),
    text("Restarts"),
    text("Age"),
    wide("IP"),
    wide("Node"),
    wide("Nominated Node"),
    wide("Readiness Gates"),
];

pub(super) fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let state = summarize(pod);
    let or_none = |v: &Value| v.as_str().filter(|t| !t.is_empty()).unwrap_or("<none>").to_owned();
    let restarts = match state.last_restart {
        Some(when) if state.restarts > 0 => {
            format!("{} ({} ago)", state.restarts, since(&json!(when), now))
        }
        _ => state.restarts.to_string(),
    };
    vec![
        json!(format!("{}/{}", state.ready, state.total)),
        json!(state.status),
        json!(restarts),
        age(pod, now),
        json!(or_none(&pod["status"]["podIP"])),
        json!(or_none(&pod["spec"]["nodeName"])),
        json!(or_none(&pod["status"]["nominatedNodeName"])),
        json!(readiness_gates(pod)),
    ]
}

fn readiness_gates(pod: &Value) -> String {
    let Some(gates) = pod["spec"]["readinessGates"].as_array().filter(|g| !g.is_empty()) else {
        return "<none>".to_owned();
    };
    let conditions = list(&pod["status"]["conditions"]);
    let is_true = |gate: &&Value| {
        conditions.iter().any(|c| c["type"] == gate["conditionType"] && c["status"] == "True")
    };
    format!("{}/{}", gates.iter().filter(is_true).count(), gates.len())
}

#[derive(Debug, PartialEq)]
pub(super) struct Summary {
    pub(super) ready: usize,
    pub(super) total: usize,
    pub(super) status: String,
    pub(super) restarts: i64,
    pub(super) last_restart: Option<String>,
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn filled(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| !text.is_empty())
}

/// Why a container does not run.
fn exit_text(terminated: &Value) -> String {
    match (filled(&terminated["reason"]), terminated["signal"].as_i64().unwrap_or(0)) {
        (Some(reason), _) => reason.to_owned(),
        (None, signal) if signal != 0 => format!("Signal:{signal}"),
        _ => format!("ExitCode:{}", terminated["exitCode"].as_i64().unwrap_or(0)),
    }
}

pub(super) fn summarize(pod: &Value) -> Summary {
    let (spec, status) = (&pod["spec"], &pod["status"]);
    let mut summary = Summary {
        ready: 0,
        total: list(&spec["containers"]).len(),
        status: filled(&status["reason"])
            .or_else(|| filled(&status["phase"]))
            .unwrap_or("Unknown")
            .to_owned(),
        restarts: 0,
        last_restart: None,
    };
    let gated = list(&status["conditions"])
        .iter()
        .any(|c| c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated");
    if gated {
        "SchedulingGated".clone_into(&mut summary.status);
    }
    let initializing = init_containers(spec, status, &mut summary);
    let initialized = list(&status["conditions"])
        .iter()
        .any(|c| c["type"] == "Initialized" && c["status"] == "True");
    if !initializing || initialized {
        containers(status, &mut summary);
    }
    if !pod["metadata"]["deletionTimestamp"].is_null() {
        let ended = matches!(status["phase"].as_str(), Some("Succeeded" | "Failed"));
        if status["reason"] == "NodeLost" {
            "Unknown".clone_into(&mut summary.status);
        } else if !ended {
            "Terminating".clone_into(&mut summary.status);
        }
    }
    summary
}

fn count_restart(container: &Value, summary: &mut Summary) {
    summary.restarts += container["restartCount"].as_i64().unwrap_or(0);
    let finished = &container["lastState"]["terminated"]["finishedAt"];
    if let Some(when) = finished.as_str()
        && summary.last_restart.as_deref().is_none_or(|last| last < when)
    {
        summary.last_restart = Some(when.to_owned());
    }
}

fn is_sidecar(spec: &Value, name: &Value) -> bool {
    list(&spec["initContainers"])
        .iter()
        .any(|c| c["name"] == *name && c["restartPolicy"] == "Always")
}

/// Looks for an init container that is not through; true when there is one.
fn init_containers(spec: &Value, status: &Value, summary: &mut Summary) -> bool {
    let total = list(&spec["initContainers"]).len();
    let sidecars =
        list(&spec["initContainers"]).iter().filter(|c| c["restartPolicy"] == "Always").count();
    summary.total += sidecars;
    for (index, container) in list(&status["initContainerStatuses"]).iter().enumerate() {
        count_restart(container, summary);
        let (state, sidecar) = (&container["state"], is_sidecar(spec, &container["name"]));
        if sidecar && container["ready"] == true {
            summary.ready += 1;
        }
        if state["terminated"]["exitCode"] == 0 && state["terminated"].is_object() {
            continue;
        }
        if sidecar && container["started"] == true {
            continue;
        }
        let waiting = filled(&state["waiting"]["reason"]);
        summary.status = if state["terminated"].is_object() {
            format!("Init:{}", exit_text(&state["terminated"]))
        } else if let Some(reason) = waiting.filter(|r| *r != "PodInitializing") {
            format!("Init:{reason}")
        } else {
            format!("Init:{index}/{total}")
        };
        return true;
    }
    false
}

fn containers(status: &Value, summary: &mut Summary) {
    let mut running = false;
    for container in list(&status["containerStatuses"]).iter().rev() {
        count_restart(container, summary);
        let state = &container["state"];
        if let Some(reason) = filled(&state["waiting"]["reason"]) {
            reason.clone_into(&mut summary.status);
        } else if state["terminated"].is_object() {
            summary.status = exit_text(&state["terminated"]);
        } else if container["ready"] == true && state["running"].is_object() {
            running = true;
            summary.ready += 1;
        }
    }
    if summary.status == "Completed" && running {
        let ready = list(&status["conditions"])
            .iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True");
        if ready { "Running" } else { "NotReady" }.clone_into(&mut summary.status);
    }
}
