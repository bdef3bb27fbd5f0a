//! Container statuses.

use k8s_openapi::api::core::v1::{
    Container, ContainerState as ApiState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus,
};

use super::{StatusInput, condition_is_true, seconds};
use crate::pod::plan;
use crate::pod::spec::{self, ContainerKind};
use crate::runtime::types::{ContainerState, Exit, ObservedContainer};

pub(super) fn mains(input: &StatusInput) -> Option<Vec<ContainerStatus>> {
    let mut list: Vec<_> = spec::main_containers(input.pod)
        .iter()
        .map(|c| one(input, Subject::new(c, ContainerKind::Main)))
        .collect();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    Some(list)
}

pub(super) fn inits(input: &StatusInput) -> Option<Vec<ContainerStatus>> {
    let list = spec::init_containers(input.pod);
    let one = |c| one(input, Subject::new(c, ContainerKind::Init));
    (!list.is_empty()).then(|| list.iter().map(one).collect())
}

pub(super) fn ephemerals(input: &StatusInput) -> Option<Vec<ContainerStatus>> {
    let list = spec::ephemeral_containers(input.pod);
    let one = |c: &k8s_openapi::api::core::v1::EphemeralContainer| {
        let stand_in =
            Container { name: c.name.clone(), image: c.image.clone(), ..Container::default() };
        one(input, Subject::new(&stand_in, ContainerKind::Ephemeral))
    };
    (!list.is_empty()).then(|| list.iter().map(one).collect())
}

struct Subject<'a> {
    container: &'a Container,
    kind: ContainerKind,
    sidecar: bool,
}

impl<'a> Subject<'a> {
    fn new(container: &'a Container, kind: ContainerKind) -> Self {
        let sidecar = kind == ContainerKind::Init && spec::is_sidecar(container);
        Self { container, kind, sidecar }
    }
}

fn one(input: &StatusInput, subject: Subject) -> ContainerStatus {
    let name = &subject.container.name;
    let records = records(input, name);
    let previous = previous(input, &subject);
    let mut status = match records.first() {
        Some(newest) => from_record(newest, records.get(1).copied(), previous),
        None => without_record(input, &subject, previous),
    };
    if let Some(waiting) = input.waiting.get(name) {
        override_waiting(&mut status, waiting);
    }
    if input.finished {
        close(input, &mut status);
    }
    set_readiness(input, &subject, records.first().copied(), &mut status);
    if subject.kind != ContainerKind::Ephemeral {
        status.resources = subject.container.resources.clone();
        status.allocated_resources =
            subject.container.resources.as_ref().and_then(|r| r.requests.clone());
    }
    status
}

/// Newest first.
fn records<'a>(input: &StatusInput<'a>, name: &str) -> Vec<&'a ObservedContainer> {
    let all = input.observed.map(|pod| pod.containers.as_slice()).unwrap_or_default();
    let mut found: Vec<_> = all.iter().filter(|c| c.name == name).collect();
    found.sort_by_key(|c| std::cmp::Reverse(c.attempt));
    found
}

fn previous<'a>(input: &StatusInput<'a>, subject: &Subject) -> Option<&'a ContainerStatus> {
    let list = match subject.kind {
        ContainerKind::Main => &input.previous.container_statuses,
        ContainerKind::Init => &input.previous.init_container_statuses,
        ContainerKind::Ephemeral => &input.previous.ephemeral_container_statuses,
    };
    list.iter().flatten().find(|s| s.name == subject.container.name)
}

fn from_record(
    newest: &ObservedContainer,
    older: Option<&ObservedContainer>,
    previous: Option<&ContainerStatus>,
) -> ContainerStatus {
    let id = container_id(newest);
    let last_state = match older.map(|o| (o, &o.state)) {
        Some((older, ContainerState::Exited(exit))) => Some(terminated(older, exit)),
        _ => previous.and_then(|p| inherited_last_state(p, &id)),
    };
    let state = match &newest.state {
        ContainerState::Running { started_at, .. } => ApiState {
            running: Some(ContainerStateRunning { started_at: Some(seconds(*started_at)) }),
            ..ApiState::default()
        },
        ContainerState::Exited(exit) => terminated(newest, exit),
        ContainerState::Created => waiting("ContainerCreating", ""),
        ContainerState::Unknown => waiting(
            "ContainerStatusUnknown",
            "the runtime has the container but cannot say what became of it",
        ),
    };
    let attempt = i32::try_from(newest.attempt).unwrap_or(i32::MAX);
    ContainerStatus {
        name: newest.name.clone(),
        image: newest.image_name.clone(),
        image_id: newest.image.repo_digest.clone(),
        container_id: Some(id),
        // A record that vanished (the runtime's state was wiped) must not make the count fall.
        restart_count: previous.map_or(attempt, |p| attempt.max(p.restart_count)),
        state: Some(state),
        last_state: last_state.or_else(|| Some(ApiState::default())),
        ..ContainerStatus::default()
    }
}

/// The last state that the API has, when the record behind it is gone.
fn inherited_last_state(previous: &ContainerStatus, id: &str) -> Option<ApiState> {
    let ended = previous.state.as_ref().filter(|s| s.terminated.is_some());
    match previous.container_id.as_deref() == Some(id) {
        true => previous.last_state.clone(),
        false => ended.cloned().or_else(|| previous.last_state.clone()),
    }
}

fn without_record(
    input: &StatusInput,
    subject: &Subject,
    previous: Option<&ContainerStatus>,
) -> ContainerStatus {
    let mut status = ContainerStatus {
        name: subject.container.name.clone(),
        image: subject.container.image.clone().unwrap_or_default(),
        state: Some(default_waiting(input)),
        last_state: Some(ApiState::default()),
        ..ContainerStatus::default()
    };
    let deleting = input.pod.metadata.deletion_timestamp.is_some();
    if let Some(previous) = previous {
        let old = previous.state.clone().unwrap_or_default();
        status.restart_count = previous.restart_count;
        status.last_state = previous.last_state.clone().or(status.last_state);
        if old.terminated.is_some() {
            return previous.clone();
        }
        if old.running.is_some() && !deleting && !input.finished {
            status.restart_count += 1;
            status.last_state = Some(lost(previous));
            return status;
        }
        if old.running.is_some() {
            status.container_id = previous.container_id.clone();
            status.image_id = previous.image_id.clone();
            status.state = Some(lost(previous));
            return status;
        }
    }
    let later_ran =
        spec::main_containers(input.pod).iter().any(|c| !records(input, &c.name).is_empty());
    if subject.kind == ContainerKind::Init && !subject.sidecar && later_ran {
        status.state = Some(ApiState {
            terminated: Some(ContainerStateTerminated {
                exit_code: 0,
                reason: Some("Completed".into()),
                message: Some("Unable to get init container status from container runtime and pod has been initialized, treat it as exited normally".into()),
                ..ContainerStateTerminated::default()
            }),
            ..ApiState::default()
        });
    }
    status
}

fn default_waiting(input: &StatusInput) -> ApiState {
    match spec::init_containers(input.pod).is_empty() {
        true => waiting("ContainerCreating", ""),
        false => waiting("PodInitializing", ""),
    }
}

fn waiting(reason: &str, message: &str) -> ApiState {
    let message = (!message.is_empty()).then(|| message.to_owned());
    let waiting = ContainerStateWaiting { reason: Some(reason.to_owned()), message };
    ApiState { waiting: Some(waiting), ..ApiState::default() }
}

fn override_waiting(status: &mut ContainerStatus, why: &plan::Waiting) {
    let state = status.state.clone().unwrap_or_default();
    if state.running.is_some() {
        return;
    }
    if state.terminated.is_some() {
        status.last_state = status.state.take();
    }
    status.state = Some(waiting(&why.reason, &why.message));
}

/// After the end: what had been started and has no exit is lost; what never started stays waiting.
fn close(input: &StatusInput, status: &mut ContainerStatus) {
    let state = status.state.clone().unwrap_or_default();
    if state.terminated.is_some() {
        return;
    }
    // The pod ended during back-off: its last exit is how the container ended.
    if let Some(last) = status.last_state.as_ref().filter(|s| s.terminated.is_some()) {
        status.state = Some(last.clone());
        return;
    }
    if state.running.is_some() || condition_is_true(input.previous, "Initialized") {
        status.state = Some(ApiState { terminated: Some(unknown_exit()), ..ApiState::default() });
    }
}

fn lost(previous: &ContainerStatus) -> ApiState {
    let started_at =
        previous.state.as_ref().and_then(|s| s.running.as_ref()).and_then(|r| r.started_at.clone());
    let container_id = previous.container_id.clone();
    let exit = ContainerStateTerminated { started_at, container_id, ..unknown_exit() };
    ApiState { terminated: Some(exit), ..ApiState::default() }
}

fn unknown_exit() -> ContainerStateTerminated {
    ContainerStateTerminated {
        exit_code: 137,
        reason: Some("ContainerStatusUnknown".into()),
        message: Some("The container could not be located when the pod was terminated".into()),
        ..ContainerStateTerminated::default()
    }
}

fn terminated(container: &ObservedContainer, exit: &Exit) -> ApiState {
    let terminated = ContainerStateTerminated {
        container_id: Some(container_id(container)),
        exit_code: exit.code,
        // A process that a signal ended reports 128 + signal; kubelet leaves `signal` unset, too.
        signal: None,
        reason: (!exit.reason.is_empty()).then(|| exit.reason.clone()),
        message: (!exit.message.is_empty()).then(|| exit.message.clone()),
        started_at: exit.started_at.map(seconds),
        finished_at: Some(seconds(exit.finished_at)),
    };
    ApiState { terminated: Some(terminated), ..ApiState::default() }
}

fn container_id(container: &ObservedContainer) -> String {
    format!("containerd://{}", container.id)
}

fn set_readiness(
    input: &StatusInput,
    subject: &Subject,
    newest: Option<&ObservedContainer>,
    status: &mut ContainerStatus,
) {
    let state = status.state.clone().unwrap_or_default();
    if subject.kind == ContainerKind::Init && !subject.sidecar {
        status.ready = state.terminated.as_ref().is_some_and(|end| end.exit_code == 0);
        status.started = Some(state.running.is_some());
        return;
    }
    let (mut started, mut ready) = (false, false);
    if let (Some(container), true) = (newest, state.running.is_some()) {
        started = plan::started(input.probes, &container.id, subject.container);
        let passed = input
            .probes
            .get(&container.id)
            .map_or(subject.container.readiness_probe.is_none(), |probed| probed.ready);
        ready = started && passed && subject.kind != ContainerKind::Ephemeral;
    }
    status.started = (subject.kind != ContainerKind::Ephemeral).then_some(started);
    status.ready = ready;
}
