use k8s_openapi::api::core::v1::PodStatus;

use super::*;
use crate::pod::plan::tests::{at, observed, pod};
use crate::pod::plan::{Probed, Waiting};

struct Case {
    pod: Pod,
    previous: PodStatus,
    waiting: BTreeMap<String, Waiting>,
    probes: Probes,
    ending: Option<Ending>,
    finished: bool,
}

fn case(policy: &str, containers: &str) -> Case {
    Case {
        pod: pod(policy, containers),
        previous: PodStatus::default(),
        waiting: BTreeMap::new(),
        probes: Probes::new(),
        ending: None,
        finished: false,
    }
}

impl Case {
    fn status(&self, seen: &str) -> PodStatus {
        let observed = observed(&self.pod, seen);
        status(&StatusInput {
            pod: &self.pod,
            observed: (!seen.is_empty()).then_some(&observed),
            previous: &self.previous,
            waiting: &self.waiting,
            probes: &self.probes,
            host_ips: &[IpAddr::from([192, 0, 2, 1])],
            ending: self.ending.as_ref(),
            finished: self.finished,
            now: at(100),
        })
    }

    fn wait(&mut self, name: &str, reason: &str) {
        let waiting = Waiting { reason: reason.into(), message: "why".into() };
        self.waiting.insert(name.into(), waiting);
    }
}

/// `phase | name:state(last)xN[+]… | conditions that are True`.
fn render(status: &PodStatus) -> String {
    let inits = status.init_container_statuses.iter().flatten();
    let containers: Vec<String> = inits
        .chain(status.container_statuses.iter().flatten())
        .map(|c| {
            let state = state(c.state.as_ref());
            let last = state_or_empty(c.last_state.as_ref());
            let ready = if c.ready { "+" } else { "" };
            format!("{}:{state}{last}x{}{ready}", c.name, c.restart_count)
        })
        .collect();
    let holds: Vec<&str> = status
        .conditions
        .iter()
        .flatten()
        .filter(|c| c.status == "True")
        .map(|c| c.type_.as_str())
        .collect();
    let phase = status.phase.as_deref().unwrap_or("-");
    format!("{phase} | {} | {}", containers.join(" "), holds.join(" "))
}

fn state(state: Option<&k8s_openapi::api::core::v1::ContainerState>) -> String {
    let state = state.cloned().unwrap_or_default();
    if state.running.is_some() {
        return "running".into();
    }
    if let Some(end) = state.terminated {
        return format!("exit{}", end.exit_code);
    }
    state.waiting.and_then(|w| w.reason).unwrap_or_else(|| "?".into())
}

fn state_or_empty(last: Option<&k8s_openapi::api::core::v1::ContainerState>) -> String {
    match last.filter(|l| l.terminated.is_some()) {
        Some(last) => format!("({})", state(Some(last))),
        None => String::new(),
    }
}

const UP: &str = "PodReadyToStartContainers Initialized Ready ContainersReady PodScheduled";

#[track_caller]
fn check(case: &Case, seen: &str, want: &str) {
    assert_eq!(render(&case.status(seen)), want.replace("UP", UP), "seen: {seen}");
}

#[test]
fn a_pod_comes_up() {
    let one = case("Always", "m");
    check(&one, "", "Pending | m:ContainerCreatingx0 | Initialized PodScheduled");
    check(
        &one,
        "s0",
        "Pending | m:ContainerCreatingx0 | PodReadyToStartContainers Initialized PodScheduled",
    );
    check(&one, "s0 m0=running", "Running | m:runningx0+ | UP");
    let two = case("Always", "m n");
    check(
        &two,
        "s0 m0=running",
        "Pending | m:runningx0+ n:ContainerCreatingx0 | PodReadyToStartContainers Initialized PodScheduled",
    );
}

#[test]
fn init_containers_keep_a_pod_pending() {
    let case = case("Always", "init:a m");
    let pending = "PodReadyToStartContainers PodScheduled";
    check(&case, "", "Pending | a:PodInitializingx0 m:PodInitializingx0 | PodScheduled");
    check(
        &case,
        "s0 a0=running",
        &format!("Pending | a:runningx0 m:PodInitializingx0 | {pending}"),
    );
    check(
        &case,
        "s0 a0=exit0@5",
        "Pending | a:exit0x0+ m:PodInitializingx0 | PodReadyToStartContainers Initialized PodScheduled",
    );
    check(&case, "s0 a0=exit0@5 m0=running", "Running | a:exit0x0+ m:runningx0+ | UP");
    check(&case, "s0 m0=running", "Running | a:exit0x0+ m:runningx0+ | UP");
}

#[test]
fn a_failed_init_container_fails_a_pod_that_never_restarts() {
    let mut case = case("Never", "init:a m");
    case.finished = true;
    check(&case, "s0! a0=exit1@5", "Failed | a:exit1x0 m:PodInitializingx0 | PodScheduled");
}

#[test]
fn crash_looping_pods_stay_running() {
    let mut case = case("Always", "m");
    case.wait("m", "CrashLoopBackOff");
    check(
        &case,
        "s0 m1=exit1@5",
        "Running | m:CrashLoopBackOff(exit1)x1 | PodReadyToStartContainers Initialized PodScheduled",
    );
    case.waiting.clear();
    check(&case, "s0 m0=exit1@5 m1=running", "Running | m:running(exit1)x1+ | UP");
}

#[test]
fn ends_by_policy() {
    for (policy, codes, want) in [
        ("Never", (0, 0), "Succeeded"),
        ("Never", (0, 1), "Failed"),
        ("OnFailure", (0, 0), "Succeeded"),
        ("OnFailure", (0, 1), "Running"),
        ("Always", (0, 0), "Running"),
    ] {
        let case = case(policy, "m n");
        let status = case.status(&format!("s0! m0=exit{}@5 n0=exit{}@5", codes.0, codes.1));
        assert_eq!(status.phase.as_deref(), Some(want), "{policy} {codes:?}");
    }
}

#[test]
fn a_final_phase_is_held_back_while_a_sidecar_runs() {
    let mut case = case("Never", "side:s m");
    case.previous = case.status("s0 s0=running m0=running");
    let held = case.status("s0 s0=running m0=exit0@5");
    assert_eq!(held.phase.as_deref(), Some("Running"));
    assert!(!condition_is_true(&held, "Ready"));
    let over = case.status("s0! s0=exit143@6 m0=exit0@5");
    assert_eq!(over.phase.as_deref(), Some("Succeeded"));
}

#[test]
fn a_final_phase_never_changes() {
    let mut case = case("Always", "m");
    case.previous.phase = Some("Failed".into());
    case.previous.reason = Some("Evicted".into());
    let status = case.status("s0 m0=running");
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.reason.as_deref(), Some("Evicted"));
    assert!(!condition_is_true(&status, "Ready"));
}

#[test]
fn a_container_that_vanished_is_counted_as_a_restart() {
    let mut case = case("Always", "m");
    case.previous = case.status("s0 m2=running");
    let status = case.status("s0");
    let m = &status.container_statuses.as_ref().unwrap()[0];
    assert_eq!(m.restart_count, 3);
    let last = m.last_state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!((last.exit_code, last.reason.as_deref()), (137, Some("ContainerStatusUnknown")));
    assert_eq!(status.phase.as_deref(), Some("Running"));
}

#[test]
fn a_deleted_pod_that_never_ran_ends_as_failed() {
    let mut case = case("Always", "init:a m");
    case.pod.metadata.deletion_timestamp = Some(seconds(at(50)));
    case.finished = true;
    check(&case, "", "Failed | a:PodInitializingx0 m:PodInitializingx0 | PodScheduled");
}

#[test]
fn addresses_outlive_the_sandbox_of_a_pod_that_ended() {
    let mut case = case("Never", "m");
    case.previous = case.status("s0 m0=running");
    assert_eq!(case.previous.pod_ip.as_deref(), Some("10.66.0.2"));
    assert_eq!(case.previous.host_ip.as_deref(), Some("192.0.2.1"));
    case.finished = true;
    assert_eq!(case.status("s0! m0=exit0@5").pod_ip.as_deref(), Some("10.66.0.2"));
}

#[test]
fn readiness_needs_probe_and_startup() {
    let mut case = case("Always", "m");
    let container = &mut case.pod.spec.as_mut().unwrap().containers[0];
    container.readiness_probe = Some(Default::default());
    container.startup_probe = Some(Default::default());
    assert!(!condition_is_true(&case.status("s0 m0=running"), "Ready"));
    let mut probed = Probed { started: false, ready: true, failed: None };
    case.probes.insert("m0".into(), probed);
    let status = case.status("s0 m0=running");
    assert_eq!(status.container_statuses.as_ref().unwrap()[0].started, Some(false));
    assert!(!condition_is_true(&status, "Ready"));
    probed.started = true;
    case.probes.insert("m0".into(), probed);
    assert!(condition_is_true(&case.status("s0 m0=running"), "Ready"));
}

#[test]
fn readiness_gates_hold_ready_back_and_foreign_conditions_survive() {
    let mut case = case("Always", "m");
    case.pod.spec.as_mut().unwrap().readiness_gates =
        serde_json::from_value(serde_json::json!([{ "conditionType": "lb/ready" }])).unwrap();
    let status = case.status("s0 m0=running");
    assert!(condition_is_true(&status, "ContainersReady"));
    let ready = status.conditions.iter().flatten().find(|c| c.type_ == "Ready").unwrap();
    assert_eq!(ready.reason.as_deref(), Some("ReadinessGatesNotReady"));
    case.pod.status = serde_json::from_value(serde_json::json!({
        "conditions": [{ "type": "lb/ready", "status": "True", "reason": "theirs" }]
    }))
    .unwrap();
    let status = case.status("s0 m0=running");
    assert!(condition_is_true(&status, "Ready") && condition_is_true(&status, "lb/ready"));
}

#[test]
fn conditions_carry_the_generation_and_keep_their_transition_time() {
    let mut case = case("Always", "m");
    let mut first = case.status("s0 m0=running");
    assert!(first.conditions.iter().flatten().all(|c| c.observed_generation == Some(3)));
    assert_eq!(first.observed_generation, Some(3));
    for condition in first.conditions.iter_mut().flatten() {
        condition.last_transition_time = Some(seconds(at(7)));
    }
    case.previous = first.clone();
    assert_eq!(case.status("s0 m0=running"), first);
}

#[test]
fn a_deadline_fails_the_pod_once_its_containers_are_gone() {
    let mut case = case("Always", "m");
    case.previous = case.status("s0 m0=running");
    case.ending = Some(Ending { reason: "DeadlineExceeded".into(), message: "too long".into() });
    let held = case.status("s0 m0=running");
    assert_eq!(held.phase.as_deref(), Some("Running"));
    assert!(!condition_is_true(&held, "Ready"));
    case.finished = true;
    let over = case.status("s0! m0=exit137@9");
    assert_eq!(
        (over.phase.as_deref(), over.reason.as_deref()),
        (Some("Failed"), Some("DeadlineExceeded"))
    );
}
