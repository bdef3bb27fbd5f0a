//! The phase: kubelet's `getPhase`.

use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};

use super::StatusInput;
use crate::pod::spec::{self, ContainerKind, RestartPolicy};

#[derive(Default)]
struct Counts {
    unknown: usize,
    waiting: usize,
    running: usize,
    stopped: usize,
    succeeded: usize,
    /// Stopped, and will be started again.
    restarting: usize,
}

pub(super) fn phase(input: &StatusInput, status: &PodStatus) -> &'static str {
    let mains_known = status.container_statuses.iter().flatten().any(was_started);
    match init_state(input, status, mains_known) {
        InitState::Failed => return "Failed",
        InitState::Pending => return "Pending",
        InitState::Done => {}
    }
    let counts = count(input, status);
    if counts.waiting > 0 {
        return "Pending";
    }
    if counts.unknown > 0 || counts.running + counts.stopped == 0 {
        return "Pending";
    }
    if counts.running > 0 || counts.restarting > 0 {
        return "Running";
    }
    if counts.stopped == counts.succeeded { "Succeeded" } else { "Failed" }
}

fn was_started(container: &ContainerStatus) -> bool {
    let state = container.state.as_ref();
    state.is_some_and(|s| s.running.is_some() || s.terminated.is_some())
        || container.last_state.as_ref().is_some_and(|s| s.terminated.is_some())
}

enum InitState {
    Done,
    Pending,
    Failed,
}

fn init_state(input: &StatusInput, status: &PodStatus, mains_known: bool) -> InitState {
    let mut pending = false;
    let statuses = status.init_container_statuses.as_deref().unwrap_or_default();
    for (container, info) in spec::init_containers(input.pod).iter().zip(statuses) {
        let state = info.state.clone().unwrap_or_default();
        let last = info.last_state.as_ref().and_then(|s| s.terminated.as_ref());
        if spec::is_sidecar(container) {
            let coming_up = match (&state.running, &state.waiting) {
                (Some(_), _) => info.started != Some(true),
                (None, Some(_)) => last.is_none(),
                (None, None) => false,
            };
            pending |= coming_up && !mains_known;
            continue;
        }
        let ended = state.terminated.as_ref().or(last);
        match ended {
            Some(end) if end.exit_code == 0 => {}
            Some(end) => {
                let kind = ContainerKind::Init;
                if !spec::restarts_after(input.pod, container, kind, end.exit_code) {
                    return InitState::Failed;
                }
                pending = true;
            }
            None => pending = true,
        }
    }
    if pending { InitState::Pending } else { InitState::Done }
}

fn count(input: &StatusInput, status: &PodStatus) -> Counts {
    let deleting = input.pod.metadata.deletion_timestamp.is_some();
    let over = input.finished || deleting;
    let mut counts = Counts::default();
    for info in status.container_statuses.iter().flatten() {
        let state = info.state.clone().unwrap_or_default();
        let last = info.last_state.as_ref().and_then(|s| s.terminated.as_ref());
        let ended = match (&state.running, &state.terminated, &state.waiting) {
            (Some(_), ..) => {
                counts.running += 1;
                continue;
            }
            (None, Some(end), _) => end,
            // Waiting after a run counts as stopped: a pod in CrashLoopBackOff stays Running.
            (None, None, Some(_)) => match last {
                Some(end) => end,
                None => {
                    counts.waiting += 1;
                    continue;
                }
            },
            (None, None, None) => {
                counts.unknown += 1;
                continue;
            }
        };
        counts.stopped += 1;
        counts.succeeded += usize::from(ended.exit_code == 0);
        let container = spec::container(input.pod, &info.name).map(|(c, _)| c);
        let again = container
            .map_or(spec::restart_policy(input.pod) == RestartPolicy::Always, |c| {
                spec::restarts_after(input.pod, c, ContainerKind::Main, ended.exit_code)
            });
        counts.restarting += usize::from(again && !over);
    }
    counts
}
