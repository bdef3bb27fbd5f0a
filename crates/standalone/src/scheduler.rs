//! The scheduler: finds a node for each pod, at once.
//!
//! ```text
//!  pod without node ─► active ─► decide ─► assume in the ledger ─► bind
//!                        ▲          └─ no node ─► parked ─┐            │ failed
//!                        └──── a node or a pod changed ◄──┘◄───────────┘
//! ```
//! Decisions are taken one after the other on a ledger that counts what was just promised; bindings are written side
//! by side, so that a burst of pods shares the store's commits.

mod affinity;
mod decide;
mod ledger;
mod pending;
mod resources;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::{Node, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

pub(crate) use self::affinity::tolerates;
use self::decide::{Decision, decide};
use self::ledger::Ledger;
use self::ledger::{has_ended, node_of};
use self::pending::Pending;
use crate::controllers::cluster::{Change, Cluster, Delta, Key};
use crate::controllers::pods::{condition, is_deleting};
use crate::controllers::recorder::{Recorder, Tone};
use crate::controllers::worker::Observer;
use crate::{Api, ApiError, Registry};

/// The name that pods ask for in `spec.schedulerName`.
const NAME: &str = "default-scheduler";
/// How long a pod waits whose binding was refused for a reason that may pass.
const RETRY: Duration = Duration::from_millis(200);

/// The scheduler's shell: state under a lock for the informers' quick calls, and one task that decides.
pub(crate) struct Scheduler {
    registry: Registry,
    cluster: Arc<Cluster>,
    pods: Api<Pod>,
    recorder: Recorder,
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Default)]
struct State {
    ledger: Ledger,
    pending: Pending,
}

impl Observer for Scheduler {
    fn observe(&self, change: &Change) {
        let wake = match change {
            Change::Pod(delta) => self.observe_pod(delta),
            Change::Node(delta) => self.observe_node(delta),
            _ => false,
        };
        if wake {
            self.wake.notify_one();
        }
    }
}

impl Scheduler {
    pub(crate) fn new(
        registry: &Registry,
        cluster: &Arc<Cluster>,
        recorder: Recorder,
    ) -> Result<Arc<Self>, ApiError> {
        Ok(Arc::new(Self {
            registry: registry.clone(),
            cluster: cluster.clone(),
            pods: registry.api()?,
            recorder,
            state: Mutex::new(State::default()),
            wake: Notify::new(),
        }))
    }

    /// Schedules until cancelled.
    pub(crate) async fn run(self: Arc<Self>, cancel: CancellationToken) {
        let mut writing = FuturesUnordered::new();
        loop {
            while let Some((key, pod, decision)) = self.next() {
                writing.push(self.carry_out(key, pod, decision));
            }
            // Every arm is cancellation-safe: `Notify` keeps a permit, the set keeps its futures.
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                Some(()) = writing.next() => {}
                () = self.wake.notified() => {}
            }
        }
    }

    fn observe_pod(&self, delta: &Delta<Pod>) -> bool {
        let Some(latest) = delta.latest() else { return false };
        let key = Key::of(&latest.metadata).to_string();
        let mut state = self.lock();
        let freed = state.ledger.observe_pod(&key, delta.new.as_deref());
        if freed {
            state.pending.wake_all();
        }
        match delta.new.as_deref().filter(|pod| needs_node(pod)) {
            Some(pod) if worth_a_look(delta.old.as_deref(), pod) => {
                state.pending.add(&key, priority(pod));
                true
            }
            Some(_) => freed,
            None => {
                state.pending.remove(&key);
                freed
            }
        }
    }

    fn observe_node(&self, delta: &Delta<Node>) -> bool {
        let Some(latest) = delta.latest() else { return false };
        let name = latest.metadata.name.clone().unwrap_or_default();
        let relevant = match (&delta.old, &delta.new) {
            (Some(old), Some(new)) => scheduling_facts(old) != scheduling_facts(new),
            _ => true,
        };
        if relevant {
            let mut state = self.lock();
            state.ledger.observe_node(&name, delta.new.clone());
            state.pending.wake_all();
        }
        relevant
    }

    /// The next pod with what is to become of it.
    fn next(&self) -> Option<(Key, Arc<Pod>, Decision)> {
        let mut state = self.lock();
        loop {
            let name = state.pending.pop()?;
            let (namespace, pod_name) = name.split_once('/').unwrap_or(("", &name));
            let key = Key::new(namespace, pod_name);
            let pod = self.cluster.pods.get(&key).filter(|pod| needs_node(pod));
            let Some(pod) = pod else {
                state.pending.remove(&name);
                continue;
            };
            let decision = decide(&pod, &state.ledger);
            match &decision {
                Decision::Bind(node) => state.ledger.assume(&name, &pod, node),
                Decision::Unschedulable(reason) => {
                    if !state.pending.park(&name, reason, told(&pod)) {
                        continue;
                    }
                }
            }
            return Some((key, pod, decision));
        }
    }

    async fn carry_out(&self, key: Key, pod: Arc<Pod>, decision: Decision) {
        let result = match &decision {
            Decision::Bind(node) => self.bind(&key, &pod, node).await,
            Decision::Unschedulable(reason) => self.report(&key, &pod, reason).await,
        };
        let Err(error) = result else { return };
        if error.is_not_found() {
            debug!(pod = %key, "Pod is gone before it was bound");
        } else {
            warn!(pod = %key, %error, "Decision not written, trying again");
        }
        // Also after a conflict: the change that caused it is on its way, and takes the pod out if it has a node now.
        tokio::time::sleep(RETRY).await;
        let mut state = self.lock();
        let name = key.to_string();
        if matches!(decision, Decision::Bind(_)) {
            state.ledger.release(&name);
        }
        state.pending.retry(&name);
        drop(state);
        self.wake.notify_one();
    }

    async fn bind(&self, key: &Key, pod: &Pod, node: &str) -> Result<(), ApiError> {
        self.registry.bind(&key.namespace, &key.name, node).await?;
        let text = format!("Successfully assigned {key} to {node}");
        self.recorder.record::<Pod>(&pod.metadata, Tone::Normal, "Scheduled", &text);
        Ok(())
    }

    /// Tells why the pod has no node: condition for programs, event for people.
    async fn report(&self, key: &Key, pod: &Pod, reason: &str) -> Result<(), ApiError> {
        self.recorder.record::<Pod>(&pod.metadata, Tone::Warning, "FailedScheduling", reason);
        let now = Timestamp::now();
        let held = condition(pod, "PodScheduled");
        let since = held
            .filter(|held| held.status == "False")
            .and_then(|held| held.last_transition_time.clone())
            .unwrap_or(Time(now));
        let mut pod = pod.clone();
        let conditions = pod.status.get_or_insert_default().conditions.get_or_insert_default();
        conditions.retain(|condition| condition.type_ != "PodScheduled");
        conditions.push(PodCondition {
            type_: "PodScheduled".into(),
            status: "False".into(),
            reason: Some("Unschedulable".into()),
            message: Some(reason.to_owned()),
            last_transition_time: Some(since),
            ..PodCondition::default()
        });
        match self.pods.update_status(&pod).await {
            // Somebody changed the pod meanwhile: that change brings it back here.
            Err(error) if error.is_conflict() || error.is_not_found() => {
                debug!(pod = %key, %error, "Condition not written");
                Ok(())
            }
            result => result.map(drop),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the pod waits for this scheduler.
fn needs_node(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let ours = spec.scheduler_name.as_deref().is_none_or(|name| name.is_empty() || name == NAME);
    let gated = spec.scheduling_gates.as_ref().is_some_and(|gates| !gates.is_empty());
    ours && !gated && node_of(pod).is_none() && !is_deleting(pod) && !has_ended(pod)
}

/// Whether a change of a waiting pod can change the decision: its own status cannot.
fn worth_a_look(old: Option<&Pod>, new: &Pod) -> bool {
    old.is_none_or(|old| {
        old.spec != new.spec || old.metadata.labels != new.metadata.labels || !needs_node(old)
    })
}

fn priority(pod: &Pod) -> i32 {
    pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)
}

/// The reason that the pod's condition states already.
fn told(pod: &Pod) -> Option<&str> {
    let held = condition(pod, "PodScheduled").filter(|held| held.status == "False")?;
    held.message.as_deref()
}

/// What of a node matters to decisions: not its heartbeats.
fn scheduling_facts(node: &Node) -> impl PartialEq + '_ {
    let spec = node.spec.as_ref();
    (
        node.metadata.labels.as_ref(),
        spec.and_then(|spec| spec.taints.as_ref()),
        spec.and_then(|spec| spec.unschedulable),
        node.status.as_ref().and_then(|status| status.allocatable.as_ref()),
        decide::is_ready(node),
    )
}
