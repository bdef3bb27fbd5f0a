//! What to do next for one pod: a pure function of what is wanted, what is there, and the time.
//!
//! The rules are kubelet's (`computePodActions`, `computeInitContainerActions`), which is what workloads rely on. The caller
//! performs the actions in order, observes again and asks again; an empty answer means that nothing is to be done before
//! `wake_at` or the next event.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::backoff::CrashBackoff;
use super::spec::{self, ContainerKind};
use crate::runtime::types::{ContainerState, ObservedContainer, ObservedPod, ObservedSandbox};

#[cfg(test)]
pub(super) mod tests;

/// Everything that the next step depends on.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub pod: &'a Pod,
    /// `None`: the runtime knows nothing of the pod.
    pub observed: Option<&'a ObservedPod>,
    /// The pod shall end: it is being deleted, was evicted, or exceeded its deadline.
    pub stop: bool,
    pub probes: &'a Probes,
    pub holds: &'a Holds,
    pub backoff: &'a CrashBackoff,
    pub now: Timestamp,
}

/// What the probes of each container (by id) have found.
pub type Probes = BTreeMap<String, Probed>;

/// The state of one container's probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Probed {
    /// The startup probe has succeeded, or there is none.
    pub started: bool,
    pub ready: bool,
    /// A liveness or startup probe has failed for good: the container must go.
    pub failed: Option<ProbeKind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProbeKind {
    Startup,
    Liveness,
    Readiness,
}

/// Steps that failed and may not be tried again before a time, by container name; [`SANDBOX`] for the sandbox.
pub type Holds = BTreeMap<String, Hold>;

/// The key of the sandbox in [`Holds`]; no container can have that name.
pub const SANDBOX: &str = "";

#[derive(Debug, Clone, PartialEq)]
pub struct Hold {
    pub until: Timestamp,
    pub waiting: Waiting,
}

/// Why a container is not running yet, as `state.waiting` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub reason: String,
    pub message: String,
}

/// One step. All steps are idempotent.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Stop every container and the sandbox.
    KillPod,
    StopContainer {
        id: String,
        name: String,
        why: StopReason,
    },
    RemoveContainer {
        id: String,
    },
    RemoveSandbox {
        id: String,
    },
    CreateSandbox {
        attempt: u32,
    },
    StartContainer {
        name: String,
        kind: ContainerKind,
        attempt: u32,
    },
}

/// Why a single container is stopped while its pod goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    SpecChanged,
    ProbeFailed(ProbeKind),
    /// The runtime lost track of it.
    Unknown,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    pub actions: Vec<Action>,
    /// Why containers wait, by name.
    pub waiting: BTreeMap<String, Waiting>,
    /// When to ask again though nothing happened.
    pub wake_at: Option<Timestamp>,
    /// Nothing of this pod runs and nothing ever will again.
    pub finished: bool,
}

/// Decides the next steps.
pub fn plan(view: &View) -> Plan {
    let mut plan = Plan::default();
    if view.stop {
        stop_pod(view, &mut plan);
        return plan;
    }
    match sandbox_verdict(view) {
        SandboxVerdict::Keep(sandbox) => containers(view, sandbox, &mut plan),
        SandboxVerdict::Replace { attempt } => replace_sandbox(view, attempt, &mut plan),
    }
    if !plan.finished && !plan.actions.contains(&Action::KillPod) {
        collect_garbage(view, &mut plan);
    }
    plan
}

fn stop_pod(view: &View, plan: &mut Plan) {
    if something_lives(view) {
        plan.actions.push(Action::KillPod);
    } else {
        plan.finished = true;
    }
}

/// Whether a container may still run or a sandbox still stands.
pub fn something_lives(view: &View) -> bool {
    view.observed.is_some_and(|pod| {
        pod.sandboxes.iter().any(|s| s.ready) || pod.containers.iter().any(|c| !is_exited(c))
    })
}

enum SandboxVerdict<'a> {
    Keep(&'a ObservedSandbox),
    Replace { attempt: u32 },
}

fn sandbox_verdict<'a>(view: &View<'a>) -> SandboxVerdict<'a> {
    let sandboxes = view.observed.map(|pod| pod.sandboxes.as_slice()).unwrap_or_default();
    let next = sandboxes.iter().map(|s| s.attempt + 1).max().unwrap_or(0);
    let Some(newest) = sandboxes.iter().max_by_key(|s| s.attempt) else {
        return SandboxVerdict::Replace { attempt: 0 };
    };
    let host_network = spec::host_network(view.pod);
    let usable = newest.ready
        && sandboxes.iter().filter(|s| s.ready).count() == 1
        && newest.host_network == host_network
        && (host_network || !newest.ips.is_empty());
    if usable { SandboxVerdict::Keep(newest) } else { SandboxVerdict::Replace { attempt: next } }
}

/// Everything starts over in a new sandbox, except what has ended and shall not run again.
fn replace_sandbox(view: &View, attempt: u32, plan: &mut Plan) {
    let known = view.observed.is_some_and(|pod| !pod.containers.is_empty());
    let never = spec::restart_policy(view.pod) == spec::RestartPolicy::Never
        && !spec::main_containers(view.pod).iter().any(|c| c.restart_policy_rules.is_some());
    let init_failed = spec::init_containers(view.pod).iter().any(|c| {
        !spec::is_sidecar(c)
            && newest(view, &c.name, None).and_then(exit_code).is_some_and(|code| {
                code != 0 && !spec::restarts_after(view.pod, c, ContainerKind::Init, code)
            })
    });
    let wanted = spec::main_containers(view.pod).iter().any(|c| wants_to_run(view, c));
    if init_failed || (known && ((never && attempt != 0) || !wanted)) {
        stop_pod(view, plan);
        return;
    }
    if something_lives(view) {
        plan.actions.push(Action::KillPod);
    }
    if held(view, SANDBOX, plan) {
        return;
    }
    plan.actions.push(Action::CreateSandbox { attempt });
}

fn wants_to_run(view: &View, container: &Container) -> bool {
    match newest(view, &container.name, None).and_then(exit_code) {
        Some(code) => spec::restarts_after(view.pod, container, ContainerKind::Main, code),
        None => true,
    }
}

fn containers(view: &View, sandbox: &ObservedSandbox, plan: &mut Plan) {
    let mut walk = Walk { view, sandbox: &sandbox.id, plan };
    walk.ephemeral();
    match walk.init() {
        Init::Failed => {
            stop_pod(view, plan);
            return;
        }
        Init::InProgress => return,
        Init::Done => {}
    }
    if !walk.main() {
        stop_pod(view, plan);
    }
}

enum Init {
    Done,
    InProgress,
    Failed,
}

struct Walk<'a, 'p> {
    view: &'a View<'a>,
    sandbox: &'a str,
    plan: &'p mut Plan,
}

impl Walk<'_, '_> {
    fn current(&self, name: &str) -> Option<&ObservedContainer> {
        newest(self.view, name, Some(self.sandbox))
    }

    /// Init containers in order; sidecars are started in their turn and then kept alive.
    fn init(&mut self) -> Init {
        let view = self.view;
        let containers = spec::init_containers(view.pod);
        let mains_exist =
            spec::main_containers(view.pod).iter().any(|c| self.current(&c.name).is_some());
        // A record that was collected counts as done when something later has been started.
        let last_known = containers.iter().rposition(|c| self.current(&c.name).is_some());
        for (index, container) in containers.iter().enumerate() {
            let passed = mains_exist || last_known.is_some_and(|last| index < last);
            let outcome = if spec::is_sidecar(container) {
                self.sidecar(container, passed)
            } else if passed {
                Init::Done
            } else {
                self.init_step(container)
            };
            match outcome {
                Init::Done => {}
                other => return other,
            }
        }
        Init::Done
    }

    fn init_step(&mut self, container: &Container) -> Init {
        let Some(current) = self.current(&container.name) else {
            self.start(container, ContainerKind::Init, None);
            return Init::InProgress;
        };
        let (current, view) = (current.clone(), self.view);
        match &current.state {
            ContainerState::Exited(exit) if exit.code == 0 => Init::Done,
            ContainerState::Exited(exit) => {
                if !spec::restarts_after(view.pod, container, ContainerKind::Init, exit.code) {
                    return Init::Failed;
                }
                self.start(container, ContainerKind::Init, Some(&current));
                Init::InProgress
            }
            ContainerState::Running { .. } => {
                if current.spec_hash != spec::spec_hash(container) {
                    self.stop(&current, StopReason::SpecChanged);
                }
                Init::InProgress
            }
            ContainerState::Created | ContainerState::Unknown => {
                self.start(container, ContainerKind::Init, Some(&current));
                Init::InProgress
            }
        }
    }

    fn sidecar(&mut self, container: &Container, passed: bool) -> Init {
        let go_on = |done: bool| if done { Init::Done } else { Init::InProgress };
        let Some(current) = self.current(&container.name).cloned() else {
            self.start(container, ContainerKind::Init, None);
            return go_on(passed);
        };
        if !matches!(current.state, ContainerState::Running { .. }) {
            self.start(container, ContainerKind::Init, Some(&current));
            return go_on(passed);
        }
        if let Some(why) = self.must_stop(&current, container) {
            self.stop(&current, why);
            return go_on(passed);
        }
        go_on(passed || started(self.view.probes, &current.id, container))
    }

    /// Returns whether anything runs or will: if not, the pod is over.
    fn main(&mut self) -> bool {
        let mut alive = false;
        for container in spec::main_containers(self.view.pod) {
            let Some(current) = self.current(&container.name).cloned() else {
                // After a new sandbox, what ended for good in the old one stays ended.
                if wants_to_run(self.view, container) {
                    let older = newest(self.view, &container.name, None).cloned();
                    self.start(container, ContainerKind::Main, older.as_ref());
                    alive = true;
                }
                continue;
            };
            alive |= self.main_step(container, &current);
        }
        alive
    }

    fn main_step(&mut self, container: &Container, current: &ObservedContainer) -> bool {
        match &current.state {
            ContainerState::Running { .. } => {
                if let Some(why) = self.must_stop(current, container) {
                    self.stop(current, why);
                }
                true
            }
            ContainerState::Exited(exit) => {
                let kind = ContainerKind::Main;
                let again = spec::restarts_after(self.view.pod, container, kind, exit.code);
                if again {
                    self.start(container, kind, Some(current));
                }
                again
            }
            ContainerState::Created | ContainerState::Unknown => {
                self.start(container, ContainerKind::Main, Some(current));
                true
            }
        }
    }

    fn ephemeral(&mut self) {
        for container in spec::ephemeral_containers(self.view.pod) {
            let seen = newest(self.view, &container.name, None).is_some();
            if !seen && !held(self.view, &container.name, self.plan) {
                let name = container.name.clone();
                let kind = ContainerKind::Ephemeral;
                self.plan.actions.push(Action::StartContainer { name, kind, attempt: 0 });
            }
        }
    }

    fn must_stop(&self, current: &ObservedContainer, container: &Container) -> Option<StopReason> {
        if current.spec_hash != spec::spec_hash(container) {
            return Some(StopReason::SpecChanged);
        }
        let failed = self.view.probes.get(&current.id)?.failed?;
        Some(StopReason::ProbeFailed(failed))
    }

    fn stop(&mut self, current: &ObservedContainer, why: StopReason) {
        let (id, name) = (current.id.clone(), current.name.clone());
        self.plan.actions.push(Action::StopContainer { id, name, why });
    }

    /// Starts a container, or notes why it has to wait. `previous` is its last incarnation.
    fn start(
        &mut self,
        container: &Container,
        kind: ContainerKind,
        previous: Option<&ObservedContainer>,
    ) {
        let view = self.view;
        let name = container.name.clone();
        let anywhere = newest(view, &name, None);
        let mut attempt = anywhere.map_or(0, |c| c.attempt + 1);
        match previous.map(|p| (p, &p.state)) {
            Some((previous, ContainerState::Exited(exit)))
                if previous.spec_hash == spec::spec_hash(container) =>
            {
                if let Some((until, delay)) = view.backoff.blocked_until(previous, exit, view.now) {
                    self.crash_loop(&name, until, delay.as_secs());
                    return;
                }
            }
            // Created, never started: what is left of a start that was cut short. The same attempt is made again.
            Some((previous, ContainerState::Created)) => {
                self.plan.actions.push(Action::RemoveContainer { id: previous.id.clone() });
                attempt = previous.attempt;
            }
            Some((previous, ContainerState::Unknown)) => self.stop(previous, StopReason::Unknown),
            _ => {}
        }
        if !held(view, &name, self.plan) {
            self.plan.actions.push(Action::StartContainer { name, kind, attempt });
        }
    }

    fn crash_loop(&mut self, name: &str, until: Timestamp, delay_secs: u64) {
        let (minutes, secs) = (delay_secs / 60, delay_secs % 60);
        let shown = if minutes > 0 { format!("{minutes}m{secs}s") } else { format!("{secs}s") };
        let (pod, uid) = (self.view.pod, spec::uid(self.view.pod));
        let message = format!(
            "back-off {shown} restarting failed container={name} pod={}_{}({uid})",
            spec::name(pod),
            spec::namespace(pod),
        );
        let waiting = Waiting { reason: "CrashLoopBackOff".into(), message };
        self.plan.waiting.insert(name.to_owned(), waiting);
        wake(self.plan, until);
    }
}

/// Whether the container's startup probe, if it has one, has succeeded.
pub fn started(probes: &Probes, id: &str, container: &Container) -> bool {
    probes.get(id).map_or(container.startup_probe.is_none(), |probed| probed.started)
}

fn held(view: &View, name: &str, plan: &mut Plan) -> bool {
    let Some(hold) = view.holds.get(name) else { return false };
    if hold.until <= view.now {
        return false;
    }
    if name != SANDBOX {
        plan.waiting.insert(name.to_owned(), hold.waiting.clone());
    }
    wake(plan, hold.until);
    true
}

fn wake(plan: &mut Plan, at: Timestamp) {
    plan.wake_at = Some(plan.wake_at.map_or(at, |earlier| earlier.min(at)));
}

/// The newest container of that name, in one sandbox or in any.
pub fn newest<'a>(
    view: &View<'a>,
    name: &str,
    sandbox: Option<&str>,
) -> Option<&'a ObservedContainer> {
    let containers = view.observed.map(|pod| pod.containers.as_slice()).unwrap_or_default();
    containers
        .iter()
        .filter(|c| c.name == name && sandbox.is_none_or(|id| c.sandbox_id == id))
        .max_by_key(|c| c.attempt)
}

fn is_exited(container: &ObservedContainer) -> bool {
    matches!(container.state, ContainerState::Exited(_))
}

fn exit_code(container: &ObservedContainer) -> Option<i32> {
    match &container.state {
        ContainerState::Exited(exit) => Some(exit.code),
        _ => None,
    }
}

/// Per name the newest record and one before it are kept (for `lastState` and `logs --previous`); of the sandboxes the
/// newest and those that kept containers still refer to.
fn collect_garbage(view: &View, plan: &mut Plan) {
    let Some(pod) = view.observed else { return };
    let mut by_name: BTreeMap<&str, Vec<&ObservedContainer>> = BTreeMap::new();
    for container in &pod.containers {
        by_name.entry(&container.name).or_default().push(container);
    }
    let mut kept_sandboxes = Vec::new();
    for containers in by_name.values_mut() {
        containers.sort_by_key(|c| std::cmp::Reverse(c.attempt));
        for (index, container) in containers.iter().enumerate() {
            if index < 2 || !is_exited(container) {
                kept_sandboxes.push(container.sandbox_id.as_str());
            } else {
                plan.actions.push(Action::RemoveContainer { id: container.id.clone() });
            }
        }
    }
    let newest = pod.sandboxes.iter().map(|s| s.attempt).max();
    for sandbox in &pod.sandboxes {
        let stale = Some(sandbox.attempt) != newest && !sandbox.ready;
        if stale && !kept_sandboxes.contains(&sandbox.id.as_str()) {
            plan.actions.push(Action::RemoveSandbox { id: sandbox.id.clone() });
        }
    }
}
