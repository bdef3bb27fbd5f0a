use std::fmt::Write as _;
use std::net::IpAddr;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

use super::*;
use crate::runtime::types::{Exit, ImageRef, PodId};

pub(crate) fn at(secs: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + secs).unwrap()
}

/// `web: Always; init=a,b; sidecar=s; mains=m,n` in short: each word is `[init:|side:]name`.
pub(crate) fn pod(policy: &str, containers: &str) -> Pod {
    let mut init = Vec::new();
    let mut mains = Vec::new();
    for word in containers.split_whitespace() {
        let (kind, name) = word.split_once(':').unwrap_or(("main", word));
        let mut container = serde_json::json!({ "name": name, "image": format!("img-{name}") });
        match kind {
            "init" => init.push(container),
            "side" => {
                container["restartPolicy"] = "Always".into();
                init.push(container);
            }
            _ => mains.push(container),
        }
    }
    serde_json::from_value(serde_json::json!({
        "metadata": { "name": "web", "namespace": "default", "uid": "u1", "generation": 3 },
        "spec": { "restartPolicy": policy, "initContainers": init, "containers": mains },
    }))
    .unwrap()
}

/// `m0=running n1=exit3@50 a0=created`: name, attempt, state; `sandbox` before them: `s0` ready, `s0!` dead.
pub(crate) fn observed(pod: &Pod, text: &str) -> ObservedPod {
    let mut seen = ObservedPod {
        pod: PodId { namespace: "default".into(), name: "web".into(), uid: "u1".into() },
        sandboxes: Vec::new(),
        containers: Vec::new(),
    };
    for word in text.split_whitespace() {
        match word.split_once('=') {
            None => seen.sandboxes.insert(0, sandbox(word)),
            Some((name, state)) => {
                let sandbox_id = seen.sandboxes.first().map(|s| s.id.clone()).unwrap_or_default();
                seen.containers.insert(0, container(pod, name, state, sandbox_id));
            }
        }
    }
    seen
}

fn sandbox(word: &str) -> ObservedSandbox {
    let ready = !word.ends_with('!');
    ObservedSandbox {
        id: word.trim_end_matches('!').into(),
        attempt: word.trim_start_matches('s').trim_end_matches('!').parse().unwrap(),
        ready,
        created_at: at(0),
        ips: vec![IpAddr::from([10, 66, 0, 2])],
        host_network: false,
    }
}

fn container(pod: &Pod, word: &str, state: &str, sandbox_id: String) -> ObservedContainer {
    let split = word.find(|c: char| c.is_ascii_digit()).unwrap();
    let (name, attempt) = word.split_at(split);
    let hash = spec::container(pod, name).map(|(c, _)| spec::spec_hash(c)).unwrap_or_default();
    let (state, stale) = match state.strip_suffix('~') {
        Some(state) => (state, true),
        None => (state, false),
    };
    let state = match state {
        "running" => ContainerState::Running { started_at: at(1), pid: 42 },
        "created" => ContainerState::Created,
        "unknown" => ContainerState::Unknown,
        other => {
            let (code, finished) = other.trim_start_matches("exit").split_once('@').unwrap();
            let code: i32 = code.parse().unwrap();
            ContainerState::Exited(Exit {
                code,
                reason: if code == 0 { "Completed".into() } else { "Error".into() },
                message: String::new(),
                started_at: Some(at(1)),
                finished_at: at(finished.parse().unwrap()),
            })
        }
    };
    ObservedContainer {
        id: word.to_owned(),
        name: name.to_owned(),
        attempt: attempt.parse().unwrap(),
        sandbox_id,
        spec_hash: if stale { "stale".into() } else { hash },
        image_name: format!("img-{name}"),
        image: ImageRef { id: "sha256:1".into(), repo_digest: "sha256:1".into() },
        state,
        created_at: at(500),
        log_path: "/var/log/x".into(),
    }
}

struct Case {
    pod: Pod,
    stop: bool,
    probes: Probes,
    holds: Holds,
    now: i64,
}

fn case(policy: &str, containers: &str) -> Case {
    let pod = pod(policy, containers);
    Case { pod, stop: false, probes: Probes::new(), holds: Holds::new(), now: 1000 }
}

impl Case {
    fn plan(&self, seen: &str) -> Plan {
        let observed = observed(&self.pod, seen);
        plan(&View {
            pod: &self.pod,
            observed: (!seen.is_empty()).then_some(&observed),
            stop: self.stop,
            probes: &self.probes,
            holds: &self.holds,
            backoff: &CrashBackoff::default(),
            now: at(self.now),
        })
    }

    #[track_caller]
    fn check(&self, seen: &str, want: &str) {
        assert_eq!(render(&self.plan(seen)), want, "seen: {seen}");
    }
}

fn render(plan: &Plan) -> String {
    let mut out = String::new();
    for action in &plan.actions {
        let text = match action {
            Action::KillPod => "kill-pod".into(),
            Action::StopContainer { id, why, .. } => format!("stop {id} {why:?}"),
            Action::RemoveContainer { id } => format!("rm {id}"),
            Action::RemoveSandbox { id } => format!("rm-sandbox {id}"),
            Action::CreateSandbox { attempt } => format!("sandbox {attempt}"),
            Action::StartContainer { name, kind, attempt } => {
                let kind = format!("{kind:?}").to_lowercase();
                format!("start {kind} {name}{attempt}")
            }
        };
        write!(out, "{}{text}", if out.is_empty() { "" } else { "; " }).unwrap();
    }
    for (name, waiting) in &plan.waiting {
        write!(out, " [{name}: {}]", waiting.reason).unwrap();
    }
    if let Some(at_time) = plan.wake_at {
        write!(out, " wake@{}", at_time.duration_since(at(0)).as_secs()).unwrap();
    }
    if plan.finished {
        out.push_str(" finished");
    }
    out.trim().to_owned()
}

#[test]
fn a_new_pod_gets_a_sandbox_and_then_all_its_containers() {
    let case = case("Always", "m n");
    case.check("", "sandbox 0");
    case.check("s0", "start main m0; start main n0");
    case.check("s0 m0=running n0=running", "");
}

#[test]
fn init_containers_run_one_after_the_other() {
    let case = case("Always", "init:a init:b m");
    case.check("s0", "start init a0");
    case.check("s0 a0=running", "");
    case.check("s0 a0=exit0@5", "start init b0");
    case.check("s0 a0=exit0@5 b0=running", "");
    case.check("s0 a0=exit0@5 b0=exit0@6", "start main m0");
    case.check("s0 b0=exit0@6", "start main m0");
    case.check("s0 m0=running", "");
}

#[test]
fn a_failed_init_container_is_restarted_or_fails_the_pod() {
    case("Always", "init:a m").check("s0 a0=exit1@5", "start init a1");
    case("OnFailure", "init:a m").check("s0 a0=exit1@5", "start init a1");
    case("Never", "init:a m").check("s0 a0=exit1@5", "kill-pod");
    case("Never", "init:a m").check("s0! a0=exit1@5", "finished");
    case("Always", "init:a m").check("s0 a1=exit1@999", "[a: CrashLoopBackOff] wake@1009");
}

#[test]
fn sidecars_start_in_order_and_are_kept_alive() {
    let mut case = case("Never", "init:a side:s init:b m");
    case.check("s0 a0=exit0@5", "start init s0");
    case.check("s0 a0=exit0@5 s0=running", "start init b0");
    case.check("s0 s0=running b0=running", "");
    // It is restarted while a later init container runs, and although the pod says Never.
    case.check("s0 s0=exit0@5 b0=running", "start init s1");
    case.check("s0 s0=running b0=exit0@6", "start main m0");
    case.check("s0 s0=exit1@7 b0=exit0@6 m0=running", "start init s1");
    // A startup probe holds the next container back until it has succeeded.
    case.pod.spec.as_mut().unwrap().init_containers.as_mut().unwrap()[1].startup_probe =
        Some(k8s_openapi::api::core::v1::Probe::default());
    case.check("s0 a0=exit0@5 s0=running", "");
    case.probes.insert("s0".into(), Probed { started: true, ready: false, failed: None });
    case.check("s0 a0=exit0@5 s0=running", "start init b0");
}

#[test]
fn when_all_mains_have_ended_for_good_the_sidecars_go_too() {
    let case = case("Never", "side:s m");
    case.check("s0 s0=running m0=exit0@5", "kill-pod");
    case.check("s0! s0=exit143@6 m0=exit0@5", "finished");
}

#[test]
fn restart_policy_decides_what_runs_again() {
    for (policy, code, want) in [
        ("Always", 0, "start main m1"),
        ("Always", 1, "start main m1"),
        ("OnFailure", 0, "kill-pod"),
        ("OnFailure", 1, "start main m1"),
        ("Never", 0, "kill-pod"),
        ("Never", 1, "kill-pod"),
    ] {
        case(policy, "m").check(&format!("s0 m0=exit{code}@5"), want);
    }
    case("Never", "m n").check("s0 m0=exit0@5 n0=running", "");
    case("OnFailure", "m n").check("s0 m0=exit0@5 n0=exit0@6", "kill-pod");
}

#[test]
fn an_exit_code_rule_beats_the_pods_policy() {
    let mut case = case("Never", "m");
    let rules = serde_json::json!([
        { "action": "Restart", "exitCodes": { "operator": "In", "values": [42] } }
    ]);
    case.pod.spec.as_mut().unwrap().containers[0].restart_policy_rules =
        serde_json::from_value(rules).unwrap();
    case.check("s0 m0=exit42@5", "start main m1");
    case.check("s0 m0=exit1@5", "kill-pod");
}

#[test]
fn only_a_changed_image_replaces_a_running_container() {
    let case = case("Always", "m n");
    case.check("s0 m0=running~ n0=running", "stop m0 SpecChanged");
    case.check("s0 m0=exit143@999~ n0=running", "start main m1");
}

#[test]
fn a_failed_probe_stops_the_container_and_policy_decides_the_rest() {
    let mut case = case("Never", "m");
    let failed = Probed { started: true, ready: false, failed: Some(ProbeKind::Liveness) };
    case.probes.insert("m0".into(), failed);
    case.check("s0 m0=running", "stop m0 ProbeFailed(Liveness)");
    case.check("s0 m0=exit137@7", "kill-pod");
}

#[test]
fn crash_loops_wait_from_the_end_of_the_last_run() {
    let mut case = case("Always", "m");
    // The first restart is immediate, later ones wait 10, 20, 40 … 300 s.
    case.check("s0 m0=exit1@1000", "start main m1");
    case.check("s0 m1=exit1@995", "[m: CrashLoopBackOff] wake@1005");
    case.check("s0 m2=exit1@995", "[m: CrashLoopBackOff] wake@1015");
    case.check("s0 m1=exit1@990", "start main m2");
    let waiting = case.plan("s0 m1=exit1@995").waiting.remove("m").unwrap();
    // Ran for more than 600 s since it was restarted at 500: starts anew.
    case.now = 1200;
    case.check("s0 m9=exit1@1150", "start main m10");
    assert_eq!(waiting.message, "back-off 10s restarting failed container=m pod=web_default(u1)");
}

#[test]
fn a_dead_sandbox_is_replaced_and_everything_starts_over() {
    let both = case("Always", "init:a m");
    both.check("s0! a0=exit0@1 m0=exit137@5", "sandbox 1");
    both.check("s0! m0=exit137@5 s1", "start init a0");
    both.check("s0! a0=exit0@1 m0=exit137@5 s1", "start init a1");
    both.check("s0! a0=exit0@1 m0=exit137@5 s1 a1=exit0@6", "start main m1");
    both.check("s0! m0=running", "kill-pod; sandbox 1");
    both.check("s0 s1", "kill-pod; sandbox 2");
}

#[test]
fn a_dead_sandbox_ends_a_pod_that_never_restarts() {
    case("Never", "m").check("s0! m0=exit137@5", "finished");
    case("Never", "m").check("s0! m0=running", "kill-pod");
    case("Never", "m").check("s0!", "sandbox 1");
    case("OnFailure", "m n").check("s0! m0=exit0@5 n0=exit137@5", "sandbox 1");
    case("OnFailure", "m n").check("s0! m0=exit0@5 n0=exit137@5 s1", "start main n1");
    case("OnFailure", "m").check("s0! m0=exit0@5", "finished");
}

#[test]
fn a_deleted_pod_is_stopped_and_nothing_starts_again() {
    let mut case = case("Always", "init:a m");
    case.stop = true;
    case.check("", "finished");
    case.check("s0 m0=running", "kill-pod");
    case.check("s0 m0=exit0@5", "kill-pod");
    case.check("s0! m0=exit0@5", "finished");
    case.check("s0! m0=created", "kill-pod");
}

#[test]
fn a_start_that_was_cut_short_is_made_again_with_the_same_attempt() {
    case("Always", "m").check("s0 m0=created", "rm m0; start main m0");
    case("Always", "m").check("s0 m3=unknown", "stop m3 Unknown; start main m4");
}

#[test]
fn a_failed_step_waits_for_its_hold() {
    let mut case = case("Always", "m n");
    let waiting = Waiting { reason: "ImagePullBackOff".into(), message: "x".into() };
    case.holds.insert("m".into(), Hold { until: at(1010), waiting: waiting.clone() });
    case.check("s0", "start main n0 [m: ImagePullBackOff] wake@1010");
    case.now = 1010;
    case.check("s0", "start main m0; start main n0");
    case.holds.insert(SANDBOX.into(), Hold { until: at(1020), waiting });
    case.check("", "wake@1020");
}

#[test]
fn one_record_before_the_newest_is_kept_per_container() {
    let case = case("Always", "m");
    case.check("s0 m0=exit1@1 m1=exit1@2 m2=running", "rm m0");
    case.check("s0! m0=exit1@1 s1! m1=exit1@2 s2 m2=running", "rm m0; rm-sandbox s0");
}

#[test]
fn ephemeral_containers_start_at_once_and_only_once() {
    let mut case = case("Always", "init:a m");
    case.pod.spec.as_mut().unwrap().ephemeral_containers =
        serde_json::from_value(serde_json::json!([{ "name": "debug", "image": "x" }])).unwrap();
    case.check("s0 a0=running", "start ephemeral debug0");
    case.check("s0 a0=running debug0=exit1@5", "");
}

mod properties {
    use proptest::prelude::*;

    use super::*;
    use crate::pod::status::{StatusInput, is_terminal, status};
    use k8s_openapi::api::core::v1::PodStatus;

    /// What the world may do between two rounds.
    #[derive(Debug, Clone)]
    enum Fate {
        Exit { which: usize, code: i32 },
        LoseSandbox,
        ForgetContainer { which: usize },
        Delete,
        Wait { secs: i64 },
    }

    fn fate() -> impl Strategy<Value = Fate> {
        prop_oneof![
            4 => (0_usize..4, prop_oneof![Just(0), Just(1)])
                .prop_map(|(which, code)| Fate::Exit { which, code }),
            1 => Just(Fate::LoseSandbox),
            1 => (0_usize..4).prop_map(|which| Fate::ForgetContainer { which }),
            1 => Just(Fate::Delete),
            2 => (1_i64..700).prop_map(|secs| Fate::Wait { secs }),
        ]
    }

    /// A runtime in memory: performs actions, suffers fates.
    struct World {
        pod: Pod,
        seen: ObservedPod,
        previous: PodStatus,
        now: i64,
        stop: bool,
    }

    impl World {
        fn round(&mut self) {
            for _ in 0..20 {
                let (none, empty) = (Probes::new(), Holds::new());
                let plan = plan(&View {
                    pod: &self.pod,
                    observed: Some(&self.seen),
                    stop: self.stop || is_terminal(&self.previous),
                    probes: &none,
                    holds: &empty,
                    backoff: &CrashBackoff::default(),
                    now: at(self.now),
                });
                let next = status(&StatusInput {
                    pod: &self.pod,
                    observed: Some(&self.seen),
                    previous: &self.previous,
                    waiting: &plan.waiting,
                    probes: &none,
                    host_ips: &[],
                    ending: None,
                    finished: plan.finished,
                    now: at(self.now),
                });
                self.check(&next, &plan);
                self.previous = next;
                if plan.actions.is_empty() {
                    return;
                }
                for action in plan.actions {
                    self.perform(action);
                }
            }
            panic!("no fixpoint: {:?}", self.seen);
        }

        fn check(&self, next: &PodStatus, plan: &Plan) {
            let rank = |s: &PodStatus| match s.phase.as_deref() {
                None | Some("Pending") => 0,
                Some("Running") => 1,
                _ => 2,
            };
            assert!(rank(next) >= rank(&self.previous) || rank(&self.previous) == 1, "phase fell");
            if is_terminal(&self.previous) {
                assert_eq!(next.phase, self.previous.phase, "a final phase changed");
                let starts = |a: &Action| {
                    matches!(a, Action::StartContainer { .. } | Action::CreateSandbox { .. })
                };
                assert!(!plan.actions.iter().any(starts), "started after the end");
            }
            for now in next.container_statuses.iter().flatten() {
                let before = self.previous.container_statuses.iter().flatten();
                for old in before.filter(|c| c.name == now.name) {
                    assert!(now.restart_count >= old.restart_count, "restart count fell");
                }
            }
        }

        fn perform(&mut self, action: Action) {
            let exit = |code, now| {
                ContainerState::Exited(Exit {
                    code,
                    reason: String::new(),
                    message: String::new(),
                    started_at: None,
                    finished_at: at(now),
                })
            };
            match action {
                Action::KillPod => {
                    self.seen.sandboxes.iter_mut().for_each(|s| s.ready = false);
                    let now = self.now;
                    let alive = self.seen.containers.iter_mut().filter(|c| !is_exited(c));
                    alive.for_each(|c| c.state = exit(137, now));
                }
                Action::StopContainer { id, .. } => {
                    let now = self.now;
                    let hit = self.seen.containers.iter_mut().filter(|c| c.id == id);
                    hit.for_each(|c| c.state = exit(137, now));
                }
                Action::RemoveContainer { id } => self.seen.containers.retain(|c| c.id != id),
                Action::RemoveSandbox { id } => self.seen.sandboxes.retain(|s| s.id != id),
                Action::CreateSandbox { attempt } => {
                    assert!(!self.seen.sandboxes.iter().any(|s| s.ready), "two sandboxes");
                    self.seen.sandboxes.insert(0, sandbox(&format!("s{attempt}")));
                }
                Action::StartContainer { name, attempt, .. } => {
                    let twice = |c: &&ObservedContainer| c.name == name && !is_exited(c);
                    assert!(self.seen.containers.iter().find(twice).is_none(), "two of {name}");
                    let sandbox_id = self.seen.sandboxes[0].id.clone();
                    let word = format!("{name}{attempt}");
                    let mut new = super::container(&self.pod, &word, "running", sandbox_id);
                    new.created_at = at(self.now);
                    self.seen.containers.insert(0, new);
                }
            }
        }

        fn suffer(&mut self, fate: Fate) {
            match fate {
                Fate::Exit { which, code } => {
                    let now = self.now;
                    let running = |c: &&mut ObservedContainer| !is_exited(c);
                    if let Some(hit) = self.seen.containers.iter_mut().filter(running).nth(which) {
                        hit.state = ContainerState::Exited(Exit {
                            code,
                            reason: String::new(),
                            message: String::new(),
                            started_at: None,
                            finished_at: at(now),
                        });
                    }
                }
                Fate::LoseSandbox => self.seen.sandboxes.iter_mut().for_each(|s| s.ready = false),
                Fate::ForgetContainer { which } => {
                    if which < self.seen.containers.len() {
                        self.seen.containers.remove(which);
                    }
                }
                Fate::Delete => {
                    self.stop = true;
                    self.pod.metadata.deletion_timestamp =
                        Some(crate::pod::status::seconds(at(self.now)));
                }
                Fate::Wait { secs } => self.now += secs,
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_happens_phases_and_counts_never_go_back(
            policy in prop_oneof![Just("Always"), Just("OnFailure"), Just("Never")],
            shape in prop_oneof![Just("m"), Just("m n"), Just("init:a m"), Just("init:a side:s m n")],
            fates in proptest::collection::vec(fate(), 0..25),
        ) {
            let pod = pod(policy, shape);
            let seen = observed(&pod, "");
            let previous = PodStatus::default();
            let mut world = World { pod, seen, previous, now: 10, stop: false };
            world.round();
            for fate in fates {
                world.suffer(fate);
                world.round();
            }
        }
    }
}

#[test]
fn backoff_doubles_up_to_five_minutes_and_then_stays() {
    let pod = pod("Always", "m");
    let mut backoff = CrashBackoff::default();
    let (mut now, mut waits) = (0, Vec::new());
    for attempt in 0..8 {
        let seen = observed(&pod, &format!("s0 m{attempt}=exit1@{now}"));
        let ContainerState::Exited(exit) = seen.containers[0].state.clone() else { panic!() };
        let container = ObservedContainer { created_at: at(now), ..seen.containers[0].clone() };
        let wait = backoff
            .blocked_until(&container, &exit, at(now))
            .map_or(0, |(until, _)| until.duration_since(at(now)).as_secs());
        waits.push(wait);
        now += wait;
        backoff.note_restart(&container, &exit, at(now));
        now += 1;
    }
    assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 300]);
    let late = at(now).checked_add(SignedDuration::from_secs(601)).unwrap();
    let seen = observed(&pod, "s0 m9=exit1@0");
    let exit = Exit {
        code: 1,
        reason: String::new(),
        message: String::new(),
        started_at: None,
        finished_at: late,
    };
    assert_eq!(backoff.blocked_until(&seen.containers[0], &exit, late), None);
}
