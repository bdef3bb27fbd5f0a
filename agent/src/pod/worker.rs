//! One pod's worker: observes, plans, acts, until nothing differs; then sleeps until something wakes it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::watch;

use super::backoff::CrashBackoff;
use super::bell::Bell;
use super::container::field_path;
use super::image::PullBackoff;
use super::isolation::{self, Kernel};
use super::plan::{self, Action, Hold, Holds, Plan, View, Waiting};
use super::prober::Prober;
use super::shared::Node;
use super::spec;
use super::status::{self, Ending, StatusInput};
use super::status_writer::{StatusSlot, Target, is_urgent};
use crate::events::Severity;
use crate::runtime::types::ObservedPod;

mod finish;
mod kill;
mod start;
mod volumes;

pub(super) use finish::{delete_now, forget_observed};

/// What the sources want of a pod. The newest wins.
#[derive(Debug, Clone)]
pub(super) struct Desired {
    pub pod: Arc<Pod>,
    /// The source no longer has it: stop and clean up, there is nobody to report to.
    pub gone: bool,
    /// The API's image of a static pod.
    pub mirror: Option<Arc<Pod>>,
}

impl Desired {
    fn must_stop(&self) -> bool {
        self.gone || self.pod.metadata.deletion_timestamp.is_some()
    }

    /// Which object carries the status.
    fn target(&self) -> Option<Target> {
        let carrier =
            if spec::is_static(&self.pod) { self.mirror.as_ref() } else { Some(&self.pod) };
        carrier.filter(|_| !self.gone).map(|pod| Target {
            namespace: spec::namespace(pod).to_owned(),
            name: spec::name(pod).to_owned(),
            uid: spec::uid(pod).to_owned(),
        })
    }

    fn known_status(&self) -> Option<PodStatus> {
        let carrier = self.mirror.as_ref().filter(|_| spec::is_static(&self.pod));
        carrier.unwrap_or(&self.pod).status.clone()
    }
}

/// A round's end.
enum Next {
    /// Something was done: look again.
    Again,
    /// Nothing to do before this time or the next event.
    Sleep(Option<Timestamp>),
    /// The pod is over and nothing of it is left.
    Gone,
}

pub(super) struct Worker {
    node: Arc<Node>,
    desired: watch::Receiver<Desired>,
    bell: Arc<Bell>,
    status: StatusSlot,
    previous: PodStatus,
    observed: Option<ObservedPod>,
    backoff: CrashBackoff,
    pulls: PullBackoff,
    holds: Holds,
    prober: Prober,
    ending: Option<Ending>,
    admitted: bool,
    volumes: volumes::VolumeState,
    kill: kill::KillState,
    finish: finish::FinishState,
    /// What was seen and done last.
    last_step: Option<(Option<ObservedPod>, Vec<Action>)>,
    /// How often in a row that changed nothing.
    fruitless: u32,
}

/// Something that failed and will be tried again: longer each time, up to a minute.
fn retry_at(now: Timestamp, failures: u32) -> Timestamp {
    let millis = 500_i64.saturating_mul(1 << failures.min(7));
    now.checked_add(SignedDuration::from_millis(millis)).unwrap_or(now)
}

impl Worker {
    pub(super) fn new(node: Arc<Node>, desired: watch::Receiver<Desired>, bell: Arc<Bell>) -> Self {
        let known = desired.borrow().known_status();
        let prober = Prober::new(node.clone(), bell.clone());
        let backoff = CrashBackoff::with_max(node.config.max_restart_period);
        Self {
            status: StatusSlot::start(node.client.clone(), known.clone()),
            previous: known.unwrap_or_default(),
            node,
            desired,
            bell,
            observed: None,
            backoff,
            pulls: PullBackoff::default(),
            holds: Holds::new(),
            prober,
            ending: None,
            admitted: false,
            volumes: volumes::VolumeState::default(),
            kill: kill::KillState::default(),
            finish: finish::FinishState::default(),
            last_step: None,
            fruitless: 0,
        }
    }

    /// Runs until the pod is gone or the agent ends; then everything stays as it is, for the next agent to adopt.
    pub(super) async fn run(mut self) {
        let cancel = self.node.cancel.clone();
        while !cancel.is_cancelled() {
            let wake_at = match Box::pin(self.round()).await {
                Next::Again => continue,
                Next::Gone => return,
                Next::Sleep(wake_at) => wake_at,
            };
            // Every arm only says "look again", so it does not matter which of several wins.
            tokio::select! {
                () = self.bell.rung() => {}
                changed = self.desired.changed() => if changed.is_err() { return },
                () = sleep_until(wake_at) => {}
                () = cancel.cancelled() => return,
            }
        }
    }

    async fn round(&mut self) -> Next {
        let desired = self.desired.borrow_and_update().clone();
        if self.finish.is_complete(&desired) {
            return self.conclude(&desired, &Plan::default()).await;
        }
        self.observed = match self.node.runtime.observe(spec::uid(&desired.pod)).await {
            Ok(observed) => observed,
            Err(error) => {
                tracing::warn!(pod = spec::key(&desired.pod), %error, "Cannot look at the pod, will retry");
                return Next::Sleep(Some(retry_at(Timestamp::now(), 1)));
            }
        };
        self.admit(&desired);
        let deadline = self.check_deadline(&desired);
        let stop = self.must_stop(&desired);
        self.prober.follow(&desired.pod, self.observed.as_ref(), &self.previous, stop);
        if self.bell.take_objects() {
            self.objects_changed();
        }
        let plan = self.plan(&desired, stop);
        self.tell_backoff(&desired, &plan);
        self.publish(&desired, &plan);
        if plan.finished {
            return self.conclude(&desired, &plan).await;
        }
        if plan.actions.is_empty() {
            self.refresh_volumes(&desired).await;
            return Next::Sleep(earliest([plan.wake_at, deadline, self.volumes.refresh_at]));
        }
        let step = (self.observed.clone(), plan.actions.clone());
        self.perform(&desired, plan).await;
        if self.last_step.as_ref() == Some(&step) {
            // The same was done for the same reason and changed nothing: not again at once.
            self.fruitless += 1;
            return Next::Sleep(Some(retry_at(Timestamp::now(), self.fruitless)));
        }
        (self.last_step, self.fruitless) = (Some(step), 0);
        Next::Again
    }

    fn must_stop(&self, desired: &Desired) -> bool {
        desired.must_stop() || self.ending.is_some() || status::is_terminal(&self.previous)
    }

    fn plan(&self, desired: &Desired, stop: bool) -> Plan {
        plan::plan(&View {
            pod: &desired.pod,
            observed: self.observed.as_ref(),
            stop,
            probes: &self.prober.results(),
            holds: &self.holds,
            backoff: &self.backoff,
            now: Timestamp::now(),
        })
    }

    fn may_run(&self, pod: &Pod) -> Result<(), Ending> {
        let config = &self.node.config;
        isolation::check(pod, Kernel::detect(), &config.allowed_unsafe_sysctls)?;
        self.node.ledger.admit(pod, &config.node_name, &config.allocatable)
    }

    /// Books the pod's resources; a pod that does not fit is failed and never started.
    fn admit(&mut self, desired: &Desired) {
        if self.admitted {
            return;
        }
        self.admitted = true;
        let pod = &desired.pod;
        if desired.must_stop() || status::is_terminal(&self.previous) {
            return;
        }
        // What runs was admitted by an earlier agent.
        let runs = self.observed.as_ref().is_some_and(|o| !o.sandboxes.is_empty());
        if runs {
            self.node.ledger.adopt(pod);
        } else if let Err(ending) = self.may_run(pod) {
            self.node.events.pod(pod, Severity::Warning, &ending.reason, ending.message.clone());
            self.ending = Some(ending);
            return;
        }
        self.node.update_class_shares();
    }

    /// Ends the pod when it has been active for longer than it may; otherwise returns when that will be.
    fn check_deadline(&mut self, desired: &Desired) -> Option<Timestamp> {
        let secs = spec::spec(&desired.pod)?.active_deadline_seconds?;
        let started = self.previous.start_time.as_ref()?.0;
        let deadline = started.checked_add(SignedDuration::from_secs(secs)).ok()?;
        if self.ending.is_some() || desired.must_stop() || status::is_terminal(&self.previous) {
            return None;
        }
        if deadline > Timestamp::now() {
            return Some(deadline);
        }
        let message = "Pod was active on the node longer than the specified deadline".to_owned();
        self.node.events.pod(&desired.pod, Severity::Normal, "DeadlineExceeded", message.clone());
        self.ending = Some(Ending { reason: "DeadlineExceeded".into(), message });
        None
    }

    /// Computes the status and hands it to the writer.
    fn publish(&mut self, desired: &Desired, plan: &Plan) {
        let next = status::status(&StatusInput {
            pod: &desired.pod,
            observed: self.observed.as_ref(),
            previous: &self.previous,
            waiting: &plan.waiting,
            probes: &self.prober.results(),
            host_ips: &self.node.config.node_ips,
            ending: self.ending.as_ref(),
            finished: plan.finished,
            now: Timestamp::now(),
        });
        let urgent = is_urgent(&self.previous, &next);
        self.previous = next.clone();
        let next = Arc::new(next);
        self.status.set(next.clone(), desired.target(), urgent);
        self.node.registry.update(&desired.pod, next, self.observed.clone().map(Arc::new));
    }

    /// Publishes what is known now, between two actions.
    fn publish_again(&mut self, desired: &Desired) {
        let stop = self.must_stop(desired);
        let plan = self.plan(desired, stop);
        self.publish(desired, &plan);
    }

    /// One event per container that has newly run into its back-off.
    fn tell_backoff(&self, desired: &Desired, plan: &Plan) {
        let pod = &desired.pod;
        for (name, _) in plan.waiting.iter().filter(|(_, w)| w.reason == "CrashLoopBackOff") {
            let Some((_, kind)) = spec::container(pod, name) else { continue };
            let known = status::waiting_reason(&self.previous, name);
            if known.as_deref() == Some("CrashLoopBackOff") {
                continue;
            }
            let message = format!(
                "Back-off restarting failed container {name} in pod {}_{}({})",
                spec::name(pod),
                spec::namespace(pod),
                spec::uid(pod)
            );
            let field = field_path(name, kind);
            self.node.events.container(pod, &field, Severity::Warning, "BackOff", message);
        }
    }

    fn objects_changed(&mut self) {
        self.volumes.dirty = true;
        self.pulls.clear();
        // What failed for want of an object may work now.
        self.holds.retain(|_, hold| hold.waiting.reason == "RunContainerError");
    }

    fn hold(&mut self, name: &str, until: Timestamp, waiting: Waiting) {
        self.holds.insert(name.to_owned(), Hold { until, waiting });
    }
}

async fn sleep_until(at: Option<Timestamp>) {
    match at {
        None => std::future::pending().await,
        Some(at) => {
            let left = at.duration_since(Timestamp::now());
            let left = Duration::try_from(left).unwrap_or(Duration::ZERO);
            // A hair later than asked for, so that "until" has passed when we look.
            tokio::time::sleep(left + Duration::from_millis(1)).await;
        }
    }
}

fn earliest<const N: usize>(times: [Option<Timestamp>; N]) -> Option<Timestamp> {
    times.into_iter().flatten().min()
}

type Env = Vec<(String, String)>;
type Variables = BTreeMap<String, String>;
