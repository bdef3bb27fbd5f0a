//! Pod conditions.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ContainerStatus, PodCondition, PodStatus};

use super::{StatusInput, is_terminal, seconds};
use crate::pod::spec;

const OWNED: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

struct Verdict {
    holds: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    fn yes() -> Self {
        Self { holds: true, reason: None, message: None }
    }

    fn no(reason: &'static str, message: Option<String>) -> Self {
        Self { holds: false, reason: Some(reason), message }
    }
}

/// Our conditions, then those that others have set, untouched.
pub(super) fn all(input: &StatusInput, status: &PodStatus) -> Vec<PodCondition> {
    let containers_ready = containers_ready(input, status);
    let ready = ready(input, &containers_ready);
    let verdicts = [
        ("PodReadyToStartContainers", sandbox_ready(input)),
        ("Initialized", initialized(input, status)),
        ("Ready", ready),
        ("ContainersReady", containers_ready),
        ("PodScheduled", Verdict::yes()),
    ];
    let mut conditions: Vec<_> =
        verdicts.into_iter().map(|(kind, verdict)| condition(input, kind, verdict)).collect();
    let mut foreign: BTreeMap<&str, &PodCondition> = BTreeMap::new();
    // What the API has now wins over what we last saw: others may have changed theirs since.
    let current = input.pod.status.as_ref().and_then(|s| s.conditions.as_deref());
    let remembered = input.previous.conditions.as_deref();
    for known in remembered.into_iter().chain(current).flatten() {
        if !OWNED.contains(&known.type_.as_str()) {
            foreign.insert(&known.type_, known);
        }
    }
    conditions.extend(foreign.into_values().cloned());
    conditions.extend(disruption(input, &conditions));
    conditions
}

/// Those of the conditions that are not ours.
pub fn foreign(mut conditions: Vec<PodCondition>) -> Vec<PodCondition> {
    conditions.retain(|condition| !OWNED.contains(&condition.type_.as_str()));
    conditions
}

pub fn is_true(status: &PodStatus, kind: &str) -> bool {
    find(status, kind).is_some_and(|c| c.status == "True")
}

fn find<'a>(status: &'a PodStatus, kind: &str) -> Option<&'a PodCondition> {
    status.conditions.iter().flatten().find(|c| c.type_ == kind)
}

fn condition(input: &StatusInput, kind: &str, verdict: Verdict) -> PodCondition {
    let status = if verdict.holds { "True" } else { "False" };
    let unchanged = find(input.previous, kind).filter(|c| c.status == status);
    PodCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: verdict.reason.map(str::to_owned),
        message: verdict.message,
        last_transition_time: unchanged
            .and_then(|c| c.last_transition_time.clone())
            .or_else(|| Some(seconds(input.now))),
        observed_generation: input.pod.metadata.generation,
        ..PodCondition::default()
    }
}

fn sandbox_ready(input: &StatusInput) -> Verdict {
    let newest = input.observed.and_then(|pod| pod.sandboxes.iter().max_by_key(|s| s.attempt));
    let ready = newest.is_some_and(|s| s.ready && (s.host_network || !s.ips.is_empty()));
    Verdict { holds: ready, reason: None, message: None }
}

fn initialized(input: &StatusInput, status: &PodStatus) -> Verdict {
    if status.phase.as_deref() == Some("Succeeded") {
        return Verdict { reason: Some("PodCompleted"), ..Verdict::yes() };
    }
    let statuses = status.init_container_statuses.as_deref().unwrap_or_default();
    let mains_ran = status.container_statuses.iter().flatten().any(|c| {
        let state = c.state.clone().unwrap_or_default();
        state.running.is_some() || state.terminated.is_some()
    });
    let incomplete: Vec<&str> = spec::init_containers(input.pod)
        .iter()
        .zip(statuses)
        .filter(|(container, info)| match spec::is_sidecar(container) {
            true => info.started != Some(true) && !mains_ran,
            false => !info.ready && !mains_ran,
        })
        .map(|(container, _)| container.name.as_str())
        .collect();
    if incomplete.is_empty() {
        return Verdict::yes();
    }
    let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
    Verdict::no("ContainersNotInitialized", Some(message))
}

fn containers_ready(input: &StatusInput, status: &PodStatus) -> Verdict {
    match status.phase.as_deref() {
        Some("Succeeded") => return Verdict::no("PodCompleted", None),
        Some("Failed") => return Verdict::no("PodFailed", None),
        _ => {}
    }
    // Decided to end, though the phase is still held back.
    if input.ending.is_some() || is_terminal(input.previous) {
        return Verdict::no("PodFailed", None);
    }
    let sidecars: Vec<&str> = spec::init_containers(input.pod)
        .iter()
        .filter(|c| spec::is_sidecar(c))
        .map(|c| c.name.as_str())
        .collect();
    let init = status.init_container_statuses.iter().flatten();
    let unready: Vec<&str> = init
        .filter(|c| sidecars.contains(&c.name.as_str()))
        .chain(status.container_statuses.iter().flatten())
        .filter(|c: &&ContainerStatus| !c.ready)
        .map(|c| c.name.as_str())
        .collect();
    if unready.is_empty() {
        return Verdict::yes();
    }
    let message = format!("containers with unready status: [{}]", unready.join(" "));
    Verdict::no("ContainersNotReady", Some(message))
}

fn ready(input: &StatusInput, containers: &Verdict) -> Verdict {
    if !containers.holds {
        return Verdict::no(
            containers.reason.unwrap_or("ContainersNotReady"),
            containers.message.clone(),
        );
    }
    let gates = spec::spec(input.pod).and_then(|s| s.readiness_gates.as_deref());
    let current = input.pod.status.clone().unwrap_or_default();
    let unmet: Vec<String> = gates
        .unwrap_or_default()
        .iter()
        .filter_map(|gate| {
            let kind = &gate.condition_type;
            match find(&current, kind).or_else(|| find(input.previous, kind)) {
                None => Some(format!(
                    "corresponding condition of pod readiness gate \"{kind}\" does not exist."
                )),
                Some(c) if c.status != "True" => Some(format!(
                    "the status of pod readiness gate \"{kind}\" is not \"True\", but {}",
                    c.status
                )),
                Some(_) => None,
            }
        })
        .collect();
    match unmet.is_empty() {
        true => Verdict::yes(),
        false => Verdict::no("ReadinessGatesNotReady", Some(unmet.join(", "))),
    }
}

fn disruption(input: &StatusInput, present: &[PodCondition]) -> Option<PodCondition> {
    let ending = input.ending.filter(|e| e.reason == "Evicted" || e.reason == "Terminated")?;
    if present.iter().any(|c| c.type_ == "DisruptionTarget") {
        return None;
    }
    let message = Some(ending.message.clone());
    let verdict = Verdict { holds: true, reason: Some("TerminationByKubelet"), message };
    Some(condition(input, "DisruptionTarget", verdict))
}
