//! What the API is told about a pod: a pure function of the manifest, what is there, and what was told before.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{HostIP, Pod, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::plan::{Probes, Waiting};
use super::spec;
use crate::runtime::types::{ContainerState, ObservedPod};

mod conditions;
mod containers;
mod phase;
#[cfg(test)]
mod tests;

pub use conditions::{foreign as foreign_conditions, is_true as condition_is_true};

/// Everything that the status depends on.
#[derive(Debug, Clone, Copy)]
pub struct StatusInput<'a> {
    pub pod: &'a Pod,
    pub observed: Option<&'a ObservedPod>,
    /// What was told last; after a restart of the agent, what the API has.
    pub previous: &'a PodStatus,
    /// Why containers wait, by name.
    pub waiting: &'a BTreeMap<String, Waiting>,
    pub probes: &'a Probes,
    /// The node's addresses, primary first.
    pub host_ips: &'a [IpAddr],
    /// The agent has decided that the pod must end.
    pub ending: Option<&'a Ending>,
    /// Nothing of the pod runs and nothing ever will again.
    pub finished: bool,
    pub now: Timestamp,
}

/// Why the agent ends a pod: it becomes Failed with this reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// `DeadlineExceeded`, `Evicted`, `OutOfcpu`, …
    pub reason: String,
    pub message: String,
}

/// Computes the whole status.
pub fn status(input: &StatusInput) -> PodStatus {
    let mut status = PodStatus {
        container_statuses: containers::mains(input),
        init_container_statuses: containers::inits(input),
        ephemeral_container_statuses: containers::ephemerals(input),
        qos_class: Some(crate::cgroup::qos_class(input.pod).as_str().to_owned()),
        start_time: input.previous.start_time.clone().or_else(|| Some(seconds(input.now))),
        observed_generation: input.pod.metadata.generation,
        nominated_node_name: input.previous.nominated_node_name.clone(),
        resource_claim_statuses: input.previous.resource_claim_statuses.clone(),
        ..PodStatus::default()
    };
    if was_rejected(input) {
        // Nothing was ever made of it: as kubelet, say nothing about containers.
        (status.container_statuses, status.init_container_statuses) = (None, None);
        status.ephemeral_container_statuses = None;
    }
    set_phase(input, &mut status);
    set_addresses(input, &mut status);
    status.conditions = Some(conditions::all(input, &status));
    status
}

/// Why a container waits, as a status says it.
pub fn waiting_reason(status: &PodStatus, name: &str) -> Option<String> {
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    let found = all.filter(|c| c.name == name).find_map(|c| c.state.as_ref()?.waiting.as_ref());
    found.and_then(|waiting| waiting.reason.clone())
}

/// The agent refused the pod before anything of it was made.
fn was_rejected(input: &StatusInput) -> bool {
    let refused = input.ending.is_some() || is_terminal(input.previous);
    let nothing_made =
        input.observed.is_none_or(|o| o.containers.is_empty() && o.sandboxes.is_empty());
    refused && nothing_made && input.previous.container_statuses.is_none()
}

/// Succeeded and Failed are final.
pub fn is_terminal(status: &PodStatus) -> bool {
    matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
}

fn set_phase(input: &StatusInput, status: &mut PodStatus) {
    let previous = input.previous;
    if is_terminal(previous) {
        status.phase = previous.phase.clone();
        status.reason = previous.reason.clone();
        status.message = previous.message.clone();
        return;
    }
    let (mut phase, mut why) = (phase::phase(input, status), None);
    if let Some(ending) = input.ending {
        (phase, why) = ("Failed", Some(ending));
    } else if input.finished && !matches!(phase, "Succeeded" | "Failed") {
        // A deleted pod whose containers never ended by themselves: over, and not with success.
        phase = "Failed";
    }
    // A pod is not over while something of it may still run (a sidecar, a container in its grace period).
    let held_back = matches!(phase, "Succeeded" | "Failed") && !input.finished && may_run(input);
    if held_back {
        status.phase = previous.phase.clone().or_else(|| Some("Pending".into()));
        status.reason = previous.reason.clone();
        status.message = previous.message.clone();
        return;
    }
    status.phase = Some(phase.to_owned());
    status.reason = why.map(|e| e.reason.clone());
    status.message = why.map(|e| e.message.clone());
}

fn may_run(input: &StatusInput) -> bool {
    input.observed.is_some_and(|pod| {
        pod.containers.iter().any(|c| !matches!(c.state, ContainerState::Exited(_)))
    })
}

fn set_addresses(input: &StatusInput, status: &mut PodStatus) {
    let hosts: Vec<String> = input.host_ips.iter().map(ToString::to_string).collect();
    status.host_ip = hosts.first().cloned().or_else(|| input.previous.host_ip.clone());
    status.host_ips = match hosts.is_empty() {
        true => input.previous.host_ips.clone(),
        false => Some(hosts.iter().map(|ip| HostIP { ip: ip.clone() }).collect()),
    };
    let newest = input.observed.and_then(|pod| pod.sandboxes.iter().max_by_key(|s| s.attempt));
    let known = newest.filter(|sandbox| sandbox.ready);
    let ips: Vec<String> = match known {
        // Once set, a host-network pod keeps its addresses though the node's change.
        Some(_) if spec::host_network(input.pod) && input.previous.pod_ip.is_none() => hosts,
        Some(sandbox) => sandbox.ips.iter().map(ToString::to_string).collect(),
        None => Vec::new(),
    };
    // A stopped sandbox no longer says what its addresses were; while the pod winds down they are still its addresses.
    if ips.is_empty() {
        let keep = known.is_some() || input.finished || is_winding_down(input);
        status.pod_ip = input.previous.pod_ip.clone().filter(|_| keep);
        status.pod_ips = input.previous.pod_ips.clone().filter(|_| keep);
        return;
    }
    status.pod_ip = ips.first().cloned();
    status.pod_ips = Some(ips.into_iter().map(|ip| PodIP { ip }).collect());
}

fn is_winding_down(input: &StatusInput) -> bool {
    input.pod.metadata.deletion_timestamp.is_some() || input.ending.is_some()
}

/// The API keeps whole seconds; comparing anything finer would write for ever.
pub fn seconds(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}
