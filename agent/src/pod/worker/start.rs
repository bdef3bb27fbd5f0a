//! Performing a plan: sandbox, volumes, images, containers.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::api::node::v1::RuntimeClass;

use super::{Desired, Env, Variables, Worker, retry_at};
use crate::dns::{self, ClusterDns};
use crate::env::{self, EnvContext, FieldContext};
use crate::events::Severity;
use crate::pod::container::{self, Ingredients, field_path};
use crate::pod::plan::{Action, Plan, SANDBOX, Waiting};
use crate::pod::shared::Node;
use crate::pod::spec::{self, ContainerKind};
use crate::pod::{hook, image};
use crate::runtime::types::{ContainerConfig, ContainerState, ObservedSandbox, SandboxConfig};
use crate::runtime::{RuntimeError, SandboxFiles};

/// A postStart hook that never ends would block the pod for ever.
const HOOK_LIMIT: Duration = Duration::from_secs(600);

/// A container that is ready to be made.
struct Prepared {
    config: ContainerConfig,
    container: Container,
    field: String,
}

/// A start that failed.
struct StartFailure {
    name: String,
    waiting: Waiting,
    retry_at: Timestamp,
}

impl Worker {
    pub(super) async fn perform(&mut self, desired: &Desired, plan: Plan) {
        let mut starts = Vec::new();
        for action in plan.actions {
            match action {
                Action::KillPod => self.kill_pod(desired).await,
                Action::StopContainer { id, name, why } => {
                    self.stop_one(desired, &id, &name, why).await
                }
                Action::RemoveContainer { id } => {
                    let removed = self.node.runtime.remove_container(&id).await;
                    self.tell(desired, "remove a container", removed);
                }
                Action::RemoveSandbox { id } => {
                    let stopped = self.node.runtime.stop_sandbox(&id).await;
                    self.tell(desired, "stop a sandbox", stopped);
                    let removed = self.node.runtime.remove_sandbox(&id).await;
                    self.tell(desired, "remove a sandbox", removed);
                }
                Action::CreateSandbox { attempt } => {
                    if self.create_sandbox(desired, attempt).await {
                        // Straight on to the containers: nothing else can have changed.
                        let stop = self.must_stop(desired);
                        let plan = self.plan(desired, stop);
                        self.publish(desired, &plan);
                        starts.extend(plan.actions.into_iter().filter_map(start_of));
                    }
                }
                Action::StartContainer { name, kind, attempt } => {
                    starts.push((name, kind, attempt))
                }
            }
        }
        if !starts.is_empty() {
            self.start_containers(desired, starts).await;
        }
    }

    fn tell(&self, desired: &Desired, what: &str, result: Result<(), RuntimeError>) {
        if let Err(error) = result {
            tracing::warn!(pod = spec::key(&desired.pod), what, %error, "Step failed, will retry");
        }
    }

    /// Volumes and sandbox side by side. Returns whether containers can be started.
    async fn create_sandbox(&mut self, desired: &Desired, attempt: u32) -> bool {
        let pod = desired.pod.clone();
        self.subscribe(&pod);
        let sandbox = run_sandbox(self.node.clone(), pod.clone(), attempt);
        // A task of its own: once begun, a sandbox is made to its end, so that nothing half-made is left.
        let sandbox = tokio::spawn(sandbox);
        let began = Instant::now();
        let mounted =
            if self.volumes.mounted.is_none() { self.mount(desired).await } else { Ok(()) };
        tracing::debug!(pod = spec::key(&pod), elapsed = ?began.elapsed(), "Volumes mounted");
        let made = match sandbox.await {
            Ok(made) => made,
            Err(error) => Err(error.to_string()),
        };
        tracing::debug!(pod = spec::key(&pod), elapsed = ?began.elapsed(), "Sandbox made");
        match made {
            Ok(sandbox) => self.note_sandbox(&pod, sandbox),
            Err(message) => {
                let text = format!("Failed to create pod sandbox: {message}");
                self.node.events.pod(
                    &pod,
                    Severity::Warning,
                    "FailedCreatePodSandBox",
                    text.clone(),
                );
                self.volumes.failures += 1;
                let until = retry_at(Timestamp::now(), self.volumes.failures);
                let waiting = Waiting { reason: "ContainerCreating".into(), message: text };
                self.hold(SANDBOX, until, waiting);
                return false;
            }
        }
        self.holds.remove(SANDBOX);
        match mounted {
            Ok(()) => true,
            Err(message) => {
                self.mount_failed(&pod, message);
                false
            }
        }
    }

    /// All containers wait until the volumes can be had.
    fn mount_failed(&mut self, pod: &Arc<Pod>, message: String) {
        self.node.events.pod(pod, Severity::Warning, "FailedMount", message);
        self.volumes.failures += 1;
        let until = retry_at(Timestamp::now(), self.volumes.failures);
        let reason = match spec::init_containers(pod).is_empty() {
            true => "ContainerCreating",
            false => "PodInitializing",
        };
        let all = spec::main_containers(pod).iter().chain(spec::init_containers(pod));
        for container in all {
            let waiting = Waiting { reason: reason.into(), message: String::new() };
            self.hold(&container.name, until, waiting);
        }
    }

    fn note_sandbox(&mut self, pod: &Pod, sandbox: ObservedSandbox) {
        let observed = self.observed.get_or_insert_with(|| crate::runtime::types::ObservedPod {
            pod: spec::id(pod),
            sandboxes: Vec::new(),
            containers: Vec::new(),
        });
        observed.sandboxes.iter_mut().for_each(|s| s.ready = false);
        observed.sandboxes.insert(0, sandbox);
    }

    async fn start_containers(
        &mut self,
        desired: &Desired,
        starts: Vec<(String, ContainerKind, u32)>,
    ) {
        let newest = self.observed.iter().flat_map(|o| &o.sandboxes).max_by_key(|s| s.attempt);
        let Some(sandbox) = newest.map(|s| s.id.clone()) else { return };
        let mut ready = Vec::new();
        for (name, kind, attempt) in starts {
            match self.prepare(desired, &name, kind, attempt).await {
                Ok(Some(prepared)) => {
                    self.note_restart(&name);
                    ready.push(prepared);
                }
                Ok(None) => return,
                Err(failure) => self.hold(&failure.name, failure.retry_at, failure.waiting),
            }
        }
        let (node, pod, ip) = (self.node.clone(), desired.pod.clone(), self.pod_ip());
        // A postStart hook holds back the containers after it, as kubelet does; without hooks order does not matter.
        let hooks = ready
            .iter()
            .any(|p| p.container.lifecycle.as_ref().is_some_and(|l| l.post_start.is_some()));
        let mut failures = Vec::new();
        if hooks {
            for prepared in &ready {
                failures.extend(start_one(&node, &pod, &sandbox, prepared).await.err());
                self.post_start(desired, prepared, ip).await;
            }
        } else {
            let starting = ready.iter().map(|prepared| start_one(&node, &pod, &sandbox, prepared));
            failures.extend(join_all(starting).await.into_iter().filter_map(Result::err));
        }
        for failure in failures {
            self.hold(&failure.name, failure.retry_at, failure.waiting);
        }
    }

    /// Counts the restart for the back-off of the next one.
    fn note_restart(&mut self, name: &str) {
        let containers = self.observed.iter().flat_map(|o| &o.containers);
        let newest = containers.filter(|c| c.name == name).max_by_key(|c| c.attempt);
        if let Some(container) = newest
            && let ContainerState::Exited(exit) = &container.state
        {
            self.backoff.note_restart(container, exit, Timestamp::now());
        }
        self.holds.remove(name);
    }

    /// Everything that a container needs before it can be made. `None`: the pod is being stopped meanwhile.
    async fn prepare(
        &mut self,
        desired: &Desired,
        name: &str,
        kind: ContainerKind,
        attempt: u32,
    ) -> Result<Option<Prepared>, StartFailure> {
        let pod = &desired.pod;
        let Some(container) = find(pod, name, kind) else { return Ok(None) };
        let field = field_path(name, kind);
        if self.volumes.mounted.is_none()
            && let Err(message) = self.mount(desired).await
        {
            self.mount_failed(pod, message);
            return Ok(None);
        }
        let mut watcher = self.desired.clone();
        let mut pulls = std::mem::take(&mut self.pulls);
        let interrupted = async { drop(watcher.wait_for(Desired::must_stop).await) };
        // A pull may take minutes; a deletion does not wait for it.
        let image = tokio::select! {
            image = image::ensure(&self.node, pod, &container, &field, &mut pulls) => Some(image),
            () = interrupted => None,
        };
        self.pulls = pulls;
        let Some(image) = image else { return Ok(None) };
        let image = image.map_err(|failure| StartFailure {
            name: name.to_owned(),
            waiting: failure.waiting,
            retry_at: failure.retry_at,
        })?;
        let config = self.container_config(pod, &container, kind, attempt, &image).await;
        match config {
            Ok(config) => Ok(Some(Prepared { config, container, field })),
            Err(message) => {
                let text = format!("Error: {message}");
                self.node.events.container(pod, &field, Severity::Warning, "Failed", text);
                Err(config_failure(name, message))
            }
        }
    }

    async fn container_config(
        &mut self,
        pod: &Arc<Pod>,
        container: &Container,
        kind: ContainerKind,
        attempt: u32,
        image: &crate::runtime::types::ImageRef,
    ) -> Result<ContainerConfig, String> {
        if !spec::is_static(pod) {
            self.node.services.wait_synced().await;
        }
        self.objects_for_env(pod).await?;
        let env = self.environment(pod, container)?;
        let log_dir = container::log_dir(&self.node.config.pod_logs_dir, pod);
        let attempt = attempt.max(self.next_log(&log_dir, &container.name, attempt));
        let mounted = self.volumes.mounted.clone().unwrap_or_default();
        let config = container::config(&Ingredients {
            pod,
            container,
            kind,
            attempt,
            image,
            env: &env,
            mounted: &mounted,
            pod_dir: &self.pod_volumes(pod).pod_dir,
            log_dir: &log_dir,
            memory_capacity: self.node.memory_capacity(),
            observed: self.observed.as_ref(),
        })?;
        if let Some(folder) = config.log_path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|e| format!("cannot make {}: {e}", folder.display()))?;
        }
        Ok(config)
    }

    fn environment(&self, pod: &Pod, container: &Container) -> Result<Env, String> {
        let newest = self.observed.iter().flat_map(|o| &o.sandboxes).max_by_key(|s| s.attempt);
        let ips = match (spec::host_network(pod), newest) {
            (true, _) => self.node.config.node_ips.clone(),
            (false, newest) => newest.map(|s| s.ips.clone()).unwrap_or_default(),
        };
        let links = spec::spec(pod).and_then(|s| s.enable_service_links).unwrap_or(true);
        let services: Variables = self.node.services.variables(spec::namespace(pod), links);
        let fields = FieldContext {
            pod_ips: &ips,
            host_ips: &self.node.config.node_ips,
            node_name: &self.node.config.node_name,
            allocatable: &self.node.config.allocatable,
        };
        let context = EnvContext {
            pod,
            objects: &self.volumes.objects,
            fields: &fields,
            services: &services,
        };
        env::build(container, &context).map_err(|e| e.to_string())
    }

    /// With no record in the runtime (a reboot wiped it) the log files still say how often the container has run.
    fn next_log(&self, log_dir: &Path, name: &str, attempt: u32) -> u32 {
        let known = self.observed.iter().flat_map(|o| &o.containers).any(|c| c.name == name);
        if known {
            return attempt;
        }
        let files = std::fs::read_dir(log_dir.join(name)).into_iter().flatten().flatten();
        let numbers = files.filter_map(|entry| {
            let name = entry.file_name();
            name.to_str()?.split('.').next()?.parse::<u32>().ok()
        });
        numbers.max().map_or(attempt, |highest| highest + 1)
    }

    async fn post_start(
        &mut self,
        desired: &Desired,
        prepared: &Prepared,
        ip: Option<std::net::IpAddr>,
    ) {
        let hook = prepared.container.lifecycle.as_ref().and_then(|l| l.post_start.as_ref());
        let Some(hook) = hook else { return };
        let uid = spec::uid(&desired.pod).to_owned();
        let Ok(Some(observed)) = self.node.runtime.observe(&uid).await else { return };
        let name = &prepared.container.name;
        let running = observed
            .containers
            .iter()
            .find(|c| c.name == *name && matches!(c.state, ContainerState::Running { .. }));
        let Some(id) = running.map(|c| c.id.clone()) else { return };
        self.observed = Some(observed);
        self.publish_again(desired);
        let mut watcher = self.desired.clone();
        let interrupted = async { drop(watcher.wait_for(Desired::must_stop).await) };
        let result = tokio::select! {
            result = hook::run(&self.node, &prepared.container, &id, ip, hook, HOOK_LIMIT) => result,
            () = interrupted => return,
        };
        if let Err(message) = result {
            let events = &self.node.events;
            let text = format!("PostStartHook failed: {message}");
            events.container(
                &desired.pod,
                &prepared.field,
                Severity::Warning,
                "FailedPostStartHook",
                text,
            );
            let killing = "FailedPostStartHook".to_owned();
            events.container(&desired.pod, &prepared.field, Severity::Normal, "Killing", killing);
            let grace =
                Duration::from_secs(u64::try_from(spec::grace_secs(&desired.pod)).unwrap_or(30));
            let stopped = self.node.runtime.stop_container(&id, grace).await;
            self.tell(desired, "stop a container whose postStart hook failed", stopped);
        }
    }
}

fn start_of(action: Action) -> Option<(String, ContainerKind, u32)> {
    match action {
        Action::StartContainer { name, kind, attempt } => Some((name, kind, attempt)),
        _ => None,
    }
}

/// The container's manifest; an ephemeral one is turned into an ordinary one.
fn find(pod: &Pod, name: &str, kind: ContainerKind) -> Option<Container> {
    if kind != ContainerKind::Ephemeral {
        return spec::container(pod, name).map(|(c, _)| c.clone());
    }
    let ephemeral = spec::ephemeral_containers(pod).iter().find(|c| c.name == name)?;
    let value = serde_json::to_value(ephemeral).ok()?;
    serde_json::from_value(value).ok()
}

fn config_failure(name: &str, message: String) -> StartFailure {
    let waiting = Waiting { reason: "CreateContainerConfigError".into(), message };
    let retry_at = Timestamp::now().checked_add(SignedDuration::from_secs(10));
    StartFailure { name: name.to_owned(), waiting, retry_at: retry_at.unwrap_or(Timestamp::MAX) }
}

async fn start_one(
    node: &Node,
    pod: &Pod,
    sandbox: &str,
    prepared: &Prepared,
) -> Result<(), StartFailure> {
    let name = &prepared.container.name;
    let fail = |reason: &str, error: &RuntimeError| {
        let message = image::chain(error);
        node.events.container(
            pod,
            &prepared.field,
            Severity::Warning,
            "Failed",
            format!("Error: {message}"),
        );
        let waiting = Waiting { reason: reason.to_owned(), message };
        StartFailure { name: name.clone(), waiting, retry_at: retry_at(Timestamp::now(), 4) }
    };
    let began = Instant::now();
    let id = match node.runtime.create_container(sandbox, &prepared.config).await {
        Ok(id) => id,
        Err(error @ RuntimeError::Invalid { .. }) => {
            return Err(fail("CreateContainerConfigError", &error));
        }
        Err(error) => return Err(fail("CreateContainerError", &error)),
    };
    let told = format!("Created container: {name}");
    node.events.container(pod, &prepared.field, Severity::Normal, "Created", told);
    let created = began.elapsed();
    match node.runtime.start_container(&id).await {
        Ok(()) => {
            tracing::debug!(pod = spec::key(pod), container = name, ?created, elapsed = ?began.elapsed(), "Container started");
            let told = format!("Started container {name}");
            node.events.container(pod, &prepared.field, Severity::Normal, "Started", told);
            Ok(())
        }
        Err(error) => Err(fail("RunContainerError", &error)),
    }
}

/// A pod that asks for another runtime, such as one with virtual machines, must not run in plain runc. A class that
/// cannot be read is as one that is not there.
async fn check_runtime_class(node: &Node, pod: &Pod) -> Result<(), String> {
    let name = spec::spec(pod).and_then(|spec| spec.runtime_class_name.as_deref());
    let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(()) };
    let failed =
        |why: &str| format!("failed to get sandbox runtime: RuntimeClass \"{name}\" {why}");
    let Some(client) = node.client.clone() else {
        return Err(failed("cannot be read without an API server"));
    };
    let classes: kube::Api<RuntimeClass> = kube::Api::all(client);
    let class = classes.get(name).await.map_err(|error| failed(&format!("not read: {error}")))?;
    match class.handler.as_str() {
        "" | "runc" => Ok(()),
        other => Err(failed(&format!("has the handler {other}: no runtime for it is configured"))),
    }
}

async fn run_sandbox(
    node: Arc<Node>,
    pod: Arc<Pod>,
    attempt: u32,
) -> Result<ObservedSandbox, String> {
    check_runtime_class(&node, &pod).await?;
    let cgroup =
        node.cgroups.ensure_pod(&pod, node.config.pids_limit).map_err(|e| image::chain(&e))?;
    let domain = &node.config.cluster_domain;
    let names = dns::hostname(&pod, &node_hostname(), domain)?;
    let cluster = ClusterDns { servers: &node.config.cluster_dns, domain };
    let resolv_conf = dns::resolver(&pod, &node.host_resolver(), cluster).render();
    let config: SandboxConfig = container::sandbox(
        &pod,
        attempt,
        names.hostname.clone(),
        cgroup,
        &node.config.socket_exempt_runtime_classes,
    );
    let for_hosts = pod.clone();
    let hosts = move |ips: &[std::net::IpAddr]| {
        let own = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
        dns::hosts_file(&for_hosts, &names, ips, &own)
    };
    let files = SandboxFiles { hosts: Some(Arc::new(hosts)), resolv_conf };
    node.runtime.run_sandbox(&config, files).await.map_err(|e| image::chain(&e))
}

fn node_hostname() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default()
}
