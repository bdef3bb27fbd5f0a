//! Probes: one task per probe of a running container; results wake the pod's worker when they change.
//!
//! Liveness and readiness wait for the startup probe. After a startup or liveness failure the tasks of that container are
//! done: the worker replaces the container, and the new one gets new tasks.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, PodStatus, Probe};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::bell::Bell;
use super::container::field_path;
use super::plan::{ProbeKind, Probed, Probes};
use super::shared::Node;
use super::spec::{self, ContainerKind};
use super::{exec, grpc, http};
use crate::events::Severity;
use crate::runtime::types::{ContainerState, ObservedContainer, ObservedPod};

/// The probes of one pod.
pub(super) struct Prober {
    node: Arc<Node>,
    bell: Arc<Bell>,
    /// Containers that have a startup, liveness or readiness probe, by id.
    running: HashMap<String, Watched>,
}

struct Watched {
    result: Arc<Mutex<Probed>>,
    cancel: CancellationToken,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Prober {
    pub(super) fn new(node: Arc<Node>, bell: Arc<Bell>) -> Self {
        Self { node, bell, running: HashMap::new() }
    }

    /// Starts tasks for containers that run and ends those of containers that do not. `keep_ready_only`: the pod is
    /// stopping, so only readiness still matters.
    pub(super) fn follow(
        &mut self,
        pod: &Arc<Pod>,
        observed: Option<&ObservedPod>,
        previous: &PodStatus,
        stopping: bool,
    ) {
        let live = |c: &&ObservedContainer| matches!(c.state, ContainerState::Running { .. });
        let containers: Vec<_> = observed.iter().flat_map(|o| &o.containers).filter(live).collect();
        self.running.retain(|id, _| !stopping && containers.iter().any(|c| c.id == *id));
        if stopping {
            return;
        }
        let ip = pod_ip(pod, observed, previous, &self.node.config.node_ips);
        for seen in containers {
            if self.running.contains_key(&seen.id) {
                continue;
            }
            let Some((container, kind)) = spec::container(pod, &seen.name) else { continue };
            let has_probe = container.startup_probe.is_some()
                || container.liveness_probe.is_some()
                || container.readiness_probe.is_some();
            if has_probe {
                let known = known(&seen.id, previous);
                let watched = self.watch(pod, container, kind, seen, ip, known);
                self.running.insert(seen.id.clone(), watched);
            }
        }
    }

    pub(super) fn results(&self) -> Probes {
        let read = |w: &Watched| *w.result.lock().unwrap_or_else(PoisonError::into_inner);
        self.running.iter().map(|(id, watched)| (id.clone(), read(watched))).collect()
    }

    fn watch(
        &self,
        pod: &Arc<Pod>,
        container: &Container,
        kind: ContainerKind,
        seen: &ObservedContainer,
        ip: Option<IpAddr>,
        known: Option<&ContainerStatus>,
    ) -> Watched {
        let initial = initial(container, known);
        let (result, cancel) = (Arc::new(Mutex::new(initial)), CancellationToken::new());
        let (startup_done, started) = watch::channel(initial.started);
        let startup_done = Arc::new(startup_done);
        let probes = [
            (ProbeKind::Startup, &container.startup_probe),
            (ProbeKind::Liveness, &container.liveness_probe),
            (ProbeKind::Readiness, &container.readiness_probe),
        ];
        for (probe_kind, probe) in probes {
            let Some(probe) = probe else { continue };
            if probe_kind == ProbeKind::Startup && initial.started {
                continue;
            }
            let job = Job {
                node: self.node.clone(),
                bell: self.bell.clone(),
                pod: pod.clone(),
                container: container.clone(),
                field: field_path(&container.name, kind),
                id: seen.id.clone(),
                ip,
                kind: probe_kind,
                probe: probe.clone(),
                result: result.clone(),
                startup_done: startup_done.clone(),
                adopted: known.is_some(),
            };
            let (cancel, started) = (cancel.clone(), started.clone());
            tokio::spawn(async move { cancel.run_until_cancelled(job.run(started)).await });
        }
        Watched { result, cancel }
    }
}

/// What the pod's status last gave for this very container. Only one that ran before this agent has it when its probes
/// begin. Its id decides and no time: the clock may have stepped since the container was made.
fn known<'a>(id: &str, previous: &'a PodStatus) -> Option<&'a ContainerStatus> {
    let statuses = previous.container_statuses.iter().chain(&previous.init_container_statuses);
    let id = format!("containerd://{id}");
    statuses.flatten().find(|status| status.container_id.as_deref() == Some(&id))
}

/// A restart of the agent does not take pods out of service: what was last known holds until a probe says otherwise.
fn initial(container: &Container, known: Option<&ContainerStatus>) -> Probed {
    Probed {
        started: container.startup_probe.is_none()
            || known.is_some_and(|k| k.started == Some(true)),
        ready: container.readiness_probe.is_none() || known.is_some_and(|k| k.ready),
        failed: None,
    }
}

fn pod_ip(
    pod: &Pod,
    observed: Option<&ObservedPod>,
    previous: &PodStatus,
    node_ips: &[IpAddr],
) -> Option<IpAddr> {
    if spec::host_network(pod) {
        return node_ips.first().copied();
    }
    let newest = observed.and_then(|o| o.sandboxes.iter().max_by_key(|s| s.attempt));
    let ip = newest.and_then(|s| s.ips.first().copied());
    ip.or_else(|| previous.pod_ip.as_deref().and_then(|ip| ip.parse().ok()))
}

struct Job {
    node: Arc<Node>,
    bell: Arc<Bell>,
    pod: Arc<Pod>,
    container: Container,
    field: String,
    id: String,
    ip: Option<IpAddr>,
    kind: ProbeKind,
    probe: Probe,
    result: Arc<Mutex<Probed>>,
    startup_done: Arc<watch::Sender<bool>>,
    adopted: bool,
}

enum Verdict {
    Success,
    Failure(String),
    /// The probe itself could not be run: says nothing about the container.
    Unknown(String),
}

impl Job {
    async fn run(self, mut started: watch::Receiver<bool>) {
        let secs = |value: Option<i32>, default: u64| {
            Duration::from_secs(
                value.and_then(|v| u64::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default),
            )
        };
        let period = secs(self.probe.period_seconds, 10);
        if self.kind != ProbeKind::Startup && started.wait_for(|done| *done).await.is_err() {
            return;
        }
        let delay = secs(self.probe.initial_delay_seconds, 0);
        // After a restart of the agent not all probes of the node fire at once.
        let delay = if self.adopted { spread(&self.id, period) } else { delay };
        tokio::time::sleep(delay).await;
        let (mut successes, mut failures) = (0, 0);
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let limit = secs(self.probe.timeout_seconds, 1);
            match self.check(limit).await {
                Verdict::Success => (successes, failures) = (successes + 1, 0),
                Verdict::Failure(message) => {
                    (successes, failures) = (0, failures + 1);
                    self.tell_failure(&message);
                }
                Verdict::Unknown(message) => {
                    tracing::debug!(
                        pod = spec::key(&self.pod),
                        container = self.container.name,
                        message,
                        "Probe not run"
                    );
                    continue;
                }
            }
            let success_threshold = self.probe.success_threshold.unwrap_or(1).max(1);
            let failure_threshold = self.probe.failure_threshold.unwrap_or(3).max(1);
            let reached_success = successes >= success_threshold;
            if !reached_success && failures < failure_threshold {
                continue;
            }
            if self.settle(reached_success) {
                return;
            }
        }
    }

    /// Notes a result that has reached its threshold. Returns whether this probe's work is done.
    fn settle(&self, success: bool) -> bool {
        let changed = {
            let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
            let before = *result;
            match (self.kind, success) {
                (ProbeKind::Startup, true) => result.started = true,
                (ProbeKind::Readiness, ready) => result.ready = ready,
                (kind, false) => result.failed = Some(kind),
                (ProbeKind::Liveness, true) => {}
            }
            *result != before
        };
        if changed {
            self.bell.ring();
        }
        if self.kind == ProbeKind::Startup && success {
            self.startup_done.send_replace(true);
        }
        match self.kind {
            ProbeKind::Startup => true,
            ProbeKind::Liveness => !success,
            ProbeKind::Readiness => false,
        }
    }

    fn tell_failure(&self, message: &str) {
        let kind = format!("{:?}", self.kind);
        let text = format!("{kind} probe failed: {message}");
        self.node.events.container(&self.pod, &self.field, Severity::Warning, "Unhealthy", text);
    }

    async fn check(&self, limit: Duration) -> Verdict {
        if let Some(action) = &self.probe.exec {
            let command = action.command.clone().unwrap_or_default();
            return match exec::run(&self.node, &self.id, &command, limit).await {
                Ok(outcome) if outcome.code == 0 => Verdict::Success,
                Ok(outcome) => Verdict::Failure(outcome.output),
                Err(exec::ExecError::TimedOut) => {
                    Verdict::Failure(format!("command timed out after {} s", limit.as_secs()))
                }
                Err(error) => Verdict::Unknown(error.to_string()),
            };
        }
        match tokio::time::timeout(limit, self.ask()).await {
            Ok(Ok(())) => Verdict::Success,
            Ok(Err(message)) => Verdict::Failure(message),
            Err(_) => Verdict::Failure(format!("no answer within {} s", limit.as_secs())),
        }
    }

    async fn ask(&self) -> Result<(), String> {
        if let Some(action) = &self.probe.http_get {
            let answer = http::get(action, &self.container, self.ip).await?;
            return match answer.status {
                200..=399 => Ok(()),
                status => {
                    tracing::trace!(status, body = answer.body, "HTTP probe");
                    Err(format!("HTTP probe failed with statuscode: {status}"))
                }
            };
        }
        if let Some(action) = &self.probe.tcp_socket {
            let port = http::port(&action.port, &self.container)?;
            let host = action.host.clone().or_else(|| self.ip.map(|ip| ip.to_string()));
            let host = host.ok_or("the pod has no address")?;
            let connected = TcpStream::connect((host.as_str(), port)).await;
            return connected.map(drop).map_err(|e| format!("dial tcp {host}:{port}: {e}"));
        }
        if let Some(action) = &self.probe.grpc {
            let ip = self.ip.ok_or("the pod has no address")?;
            let port = u16::try_from(action.port).map_err(|e| e.to_string())?;
            return grpc::check(ip, port, action.service.as_deref().unwrap_or_default()).await;
        }
        Ok(())
    }
}

/// A moment within the period that differs from container to container.
fn spread(id: &str, period: Duration) -> Duration {
    let share = spec::fnv1a(&[id.as_bytes()]) % 1000;
    period.mul_f64(f64::from(u32::try_from(share).unwrap_or(0)) / 1000.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_container_that_the_status_calls_ready_stays_ready_after_a_restart_whatever_the_clock_says()
    {
        let status: PodStatus = serde_json::from_value(json!({"containerStatuses": [{
            "name": "web", "containerID": "containerd://c1", "ready": true, "started": true,
            "image": "", "imageID": "", "restartCount": 0,
        }]}))
        .unwrap();
        let probed: Container =
            serde_json::from_value(json!({"name": "web", "readinessProbe": {}})).unwrap();
        assert!(initial(&probed, known("c1", &status)).ready);
        assert!(!initial(&probed, known("c2", &status)).ready, "another container starts unready");
    }
}
