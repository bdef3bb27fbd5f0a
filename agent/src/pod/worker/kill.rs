//! Stopping: one container, or the whole pod within its grace period.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::{Desired, Worker};
use crate::events::Severity;
use crate::pod::container::field_path;
use crate::pod::plan::{ProbeKind, StopReason};
use crate::pod::shared::Node;
use crate::pod::spec::{self, ContainerKind};
use crate::pod::{hook, image};
use crate::runtime::RuntimeError;
use crate::runtime::types::{ContainerState, ObservedContainer};

/// What every container gets between its preStop hook and SIGKILL, however long the hook took.
const MIN_AFTER_HOOK: Duration = Duration::from_secs(2);

/// How long the runtime may take beyond the grace period.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct KillState {
    /// The grace period may only shrink.
    grace: Option<Duration>,
    /// When the pod's end began; a second attempt only has what is left of the grace period.
    began: Option<Instant>,
    /// Containers (by id) whose end has been announced and whose preStop hook has been run.
    announced: BTreeSet<String>,
}

impl Worker {
    /// Stops one container of a pod that goes on.
    pub(super) async fn stop_one(
        &mut self,
        desired: &Desired,
        id: &str,
        name: &str,
        why: StopReason,
    ) {
        let pod = &desired.pod;
        let Some((container, kind)) = spec::container(pod, name) else { return };
        let message = match why {
            StopReason::SpecChanged => {
                format!("Container {name} definition changed, will be restarted")
            }
            StopReason::ProbeFailed(probe) => {
                let probe = format!("{probe:?}").to_lowercase();
                format!("Container {name} failed {probe} probe, will be restarted")
            }
            StopReason::Unknown => {
                format!("Container {name} is in unknown state, try killing it before restart")
            }
        };
        self.node.events.container(
            pod,
            &field_path(name, kind),
            Severity::Normal,
            "Killing",
            message,
        );
        let grace = match why {
            StopReason::ProbeFailed(probe) => probe_grace(container, probe),
            _ => None,
        };
        let secs = grace.unwrap_or_else(|| spec::grace_secs(pod));
        let grace = Duration::from_secs(u64::try_from(secs).unwrap_or(1));
        end_container(&self.node, pod, container, id, self.pod_ip(), grace, true).await;
    }

    /// Stops all containers and the sandbox. Returns early when the grace period has been shortened; the next round goes on.
    pub(super) async fn kill_pod(&mut self, desired: &Desired) {
        let grace = self.effective_grace(desired);
        let began = *self.kill.began.get_or_insert_with(Instant::now);
        let pod = desired.pod.clone();
        let observed = self.observed.clone();
        let containers: Vec<ObservedContainer> = observed
            .iter()
            .flat_map(|o| &o.containers)
            .filter(|c| !matches!(c.state, ContainerState::Exited(_)))
            .cloned()
            .collect();
        let first: BTreeSet<String> = containers
            .iter()
            .filter(|c| !self.kill.announced.contains(&c.id))
            .map(|c| c.id.clone())
            .collect();
        for container in containers.iter().filter(|c| first.contains(&c.id)) {
            let kind =
                spec::container(&pod, &container.name).map_or(ContainerKind::Ephemeral, |(_, k)| k);
            let message = format!("Stopping container {}", container.name);
            let field = field_path(&container.name, kind);
            self.node.events.container(&pod, &field, Severity::Normal, "Killing", message);
        }
        self.kill.announced.extend(first.iter().cloned());
        let (node, ip) = (self.node.clone(), self.pod_ip());
        let work = async {
            end_all(&node, &pod, &containers, &first, ip, grace, began).await;
            for sandbox in observed.iter().flat_map(|o| &o.sandboxes) {
                if let Err(problem) = stop_sandbox(&node, &sandbox.id).await {
                    let message = format!("Failed to stop the sandbox: {problem}");
                    node.events.pod(&pod, Severity::Warning, "FailedKillPod", message);
                }
            }
        };
        let mut watcher = self.desired.clone();
        let shortened = async {
            // Ends only when the pod's worker does.
            drop(watcher.wait_for(|d| grace_of(d).is_some_and(|g| g < grace)).await);
        };
        // Dropping the work is safe: stopping is idempotent, and the next round begins with what still runs.
        tokio::select! {
            () = work => {}
            () = shortened => {}
        }
    }

    fn effective_grace(&mut self, desired: &Desired) -> Duration {
        let evicted = self.ending.as_ref().is_some_and(|e| e.reason == "Evicted");
        let wanted = match grace_of(desired) {
            Some(grace) => grace,
            None if evicted => Duration::from_secs(1),
            None => seconds(spec::grace_secs(&desired.pod)),
        };
        let grace = self.kill.grace.map_or(wanted, |earlier| earlier.min(wanted));
        self.kill.grace = Some(grace);
        grace
    }

    pub(super) fn pod_ip(&self) -> Option<IpAddr> {
        let ip = self.previous.pod_ip.as_deref().and_then(|ip| ip.parse().ok());
        let newest = self.observed.iter().flat_map(|o| &o.sandboxes).max_by_key(|s| s.attempt);
        newest.and_then(|s| s.ips.first().copied()).or(ip)
    }
}

/// The deletion's grace period, when there is a deletion.
fn grace_of(desired: &Desired) -> Option<Duration> {
    let deleting = desired.pod.metadata.deletion_timestamp.is_some();
    deleting.then(|| seconds(spec::grace_secs(&desired.pod)))
}

fn seconds(secs: i64) -> Duration {
    Duration::from_secs(u64::try_from(secs).unwrap_or(1).max(1))
}

fn probe_grace(container: &Container, probe: ProbeKind) -> Option<i64> {
    let probe = match probe {
        ProbeKind::Startup => container.startup_probe.as_ref(),
        ProbeKind::Liveness => container.liveness_probe.as_ref(),
        ProbeKind::Readiness => None,
    };
    probe?.termination_grace_period_seconds
}

/// Mains side by side, then sidecars one by one in reverse order, all within one grace period.
async fn end_all(
    node: &Node,
    pod: &Pod,
    containers: &[ObservedContainer],
    first: &BTreeSet<String>,
    ip: Option<IpAddr>,
    grace: Duration,
    began: Instant,
) {
    let left = || grace.saturating_sub(began.elapsed());
    let sidecar_rank = |c: &ObservedContainer| {
        let inits = spec::init_containers(pod);
        inits.iter().position(|i| i.name == c.name && spec::is_sidecar(i))
    };
    let mains = containers.iter().filter(|c| sidecar_rank(c).is_none());
    join_all(mains.map(|c| end_observed(node, pod, c, ip, left(), first))).await;
    let mut sidecars: Vec<_> =
        containers.iter().filter_map(|c| Some((sidecar_rank(c)?, c))).collect();
    sidecars.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
    for (_, sidecar) in sidecars {
        end_observed(node, pod, sidecar, ip, left(), first).await;
    }
}

async fn end_observed(
    node: &Node,
    pod: &Pod,
    seen: &ObservedContainer,
    ip: Option<IpAddr>,
    grace: Duration,
    first: &BTreeSet<String>,
) {
    let stand_in = Container { name: seen.name.clone(), ..Container::default() };
    let container = spec::container(pod, &seen.name).map_or(&stand_in, |(c, _)| c);
    let running = matches!(seen.state, ContainerState::Running { .. });
    let with_hook = running && first.contains(&seen.id);
    end_container(node, pod, container, &seen.id, ip, grace, with_hook).await;
    // Made but never started (the agent was killed in between): it has no end that could be recorded, so it goes as a whole.
    if seen.state == ContainerState::Created
        && let Err(error) = node.runtime.remove_container(&seen.id).await
    {
        tracing::warn!(pod = spec::key(pod), container = container.name, %error, "Container not removed, will retry");
    }
}

/// The preStop hook inside the grace period, then the stop signal, then SIGKILL.
async fn end_container(
    node: &Node,
    pod: &Pod,
    container: &Container,
    id: &str,
    ip: Option<IpAddr>,
    grace: Duration,
    with_hook: bool,
) {
    let mut grace = grace;
    let hook = container.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref()).filter(|_| with_hook);
    if let Some(hook) = hook {
        let began = Instant::now();
        if let Err(message) = hook::run(node, container, id, ip, hook, grace).await {
            let field = field_path(&container.name, ContainerKind::Main);
            node.events.container(pod, &field, Severity::Warning, "FailedPreStopHook", message);
        }
        grace = grace.saturating_sub(began.elapsed()).max(MIN_AFTER_HOOK);
    }
    let stopped = limited(grace + PATIENCE, node.runtime.stop_container(id, grace)).await;
    if let Err(problem) = stopped {
        tracing::warn!(
            pod = spec::key(pod),
            container = container.name,
            problem,
            "Container not stopped, will retry"
        );
    }
}

/// Stops a sandbox, giving up when the runtime does not come back: the next round tries again.
pub(in crate::pod) async fn stop_sandbox(node: &Node, id: &str) -> Result<(), String> {
    limited(PATIENCE, node.runtime.stop_sandbox(id)).await
}

async fn limited(
    limit: Duration,
    work: impl Future<Output = Result<(), RuntimeError>>,
) -> Result<(), String> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done.map_err(|error| image::chain(&error)),
        Err(_) => Err(format!("the runtime has not answered for {} s", limit.as_secs())),
    }
}
