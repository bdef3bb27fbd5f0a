//! Performs what the status function asks for: reads the machine, the runtime and the Node, writes
//! the difference.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeStatus};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::facts::{Machine, Usage};
use super::status::{Observation, Pressure, differs, status};
use super::{NodeImage, RuntimeProbe, addresses, backoff, cni_conf, register};
use crate::config::AgentConfig;

/// Images come and go with pods; listing them more often than this is not worth its cost.
const IMAGES_EVERY: Duration = Duration::from_secs(60);
/// A resource counts as scarce for this long after it last was, so that conditions do not flap.
const PRESSURE_HOLD: Duration = Duration::from_secs(300);

pub(super) struct Reconciler {
    config: Arc<AgentConfig>,
    api: Api<Node>,
    probe: Arc<dyn RuntimeProbe>,
    machine: Machine,
    runtime_version: String,
    images: Vec<NodeImage>,
    images_at: Option<Instant>,
    pressure: [Option<Instant>; 3],
    written_at: Option<Instant>,
    ready: Option<bool>,
}

impl Reconciler {
    pub(super) fn new(
        config: Arc<AgentConfig>,
        client: Client,
        probe: Arc<dyn RuntimeProbe>,
    ) -> Self {
        Self {
            config,
            api: Api::all(client),
            probe,
            machine: Machine::read(),
            runtime_version: String::new(),
            images: Vec::new(),
            images_at: None,
            pressure: [None; 3],
            written_at: None,
            ready: None,
        }
    }

    pub(super) fn config(&self) -> &AgentConfig {
        &self.config
    }

    /// Creates the Node or puts the labels of the existing one right; returns when that is done.
    pub(super) async fn register(&mut self) {
        let mut attempt = 0;
        while let Err(error) = self.try_register().await {
            // A control plane that is still starting is no news; one that stays away is.
            if attempt == 5 {
                warn!(
                    node = self.config.node_name,
                    error = describe(&error),
                    "Cannot register the node yet, trying on"
                );
            }
            tokio::time::sleep(backoff(attempt)).await;
            attempt = attempt.saturating_add(1);
        }
    }

    async fn try_register(&mut self) -> Result<(), kube::Error> {
        let name = &self.config.node_name.clone();
        if !self.config.node.register {
            return self.api.get(name).await.map(drop);
        }
        let seen = self.observe(None).await;
        let fresh = status(&self.config, &seen, &NodeStatus::default(), Timestamp::now());
        let wanted = register::node(&self.config, self.machine.architecture, fresh);
        match self.api.create(&PostParams::default(), &wanted).await {
            Ok(_) => info!(node = name, "Node registered"),
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                let existing = self.api.get(name).await?;
                if let Some(patch) = register::metadata_patch(&wanted, &existing) {
                    self.api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
                }
                info!(node = name, "Node is registered already");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// One round: looks at everything and writes what is different. `known` is the Node as the
    /// watch showed it.
    pub(super) async fn reconcile(&mut self, known: Option<Arc<Node>>) {
        if let Some(node) = &known {
            self.ensure_cni_conf(node);
        }
        let seen = self.observe(known.as_deref()).await;
        let ready = seen.not_ready.is_empty();
        if self.ready != Some(ready) {
            info!(
                node = self.config.node_name,
                ready,
                reasons = seen.not_ready.join(", "),
                "Node readiness"
            );
            self.ready = Some(ready);
        }
        if let Some(node) = &known {
            let previous = node.status.clone().unwrap_or_default();
            let wanted = status(&self.config, &seen, &previous, Timestamp::now());
            let overdue = self
                .written_at
                .is_none_or(|at| at.elapsed() >= self.config.node.status_report_frequency);
            if !overdue && !differs(&previous, &wanted) {
                return;
            }
        }
        if let Err(error) = self.write(&seen).await {
            warn!(
                node = self.config.node_name,
                error = describe(&error),
                "Cannot write the node status, trying again at the next look"
            );
        }
    }

    /// Writes the status over the newest Node, again when somebody else wrote in between.
    async fn write(&mut self, seen: &Observation) -> Result<(), kube::Error> {
        let name = self.config.node_name.clone();
        for attempt in 0.. {
            let node = match self.api.get(&name).await {
                Err(kube::Error::Api(status)) if status.is_not_found() => {
                    // Somebody deleted the Node while its pods run here: they have a node again.
                    return self.try_register().await;
                }
                other => other?,
            };
            let previous = node.status.clone().unwrap_or_default();
            let wanted = status(&self.config, seen, &previous, Timestamp::now());
            let Some(patch) = status_patch(&node, &previous, &wanted) else { return Ok(()) };
            let params = PatchParams::default();
            match self.api.patch_status(&name, &params, &Patch::Merge(patch)).await {
                Ok(_) => {
                    self.written_at = Some(Instant::now());
                    return Ok(());
                }
                Err(kube::Error::Api(status)) if status.is_conflict() && attempt < 4 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn observe(&mut self, known: Option<&Node>) -> Observation {
        let mut not_ready = Vec::new();
        match self.probe.version().await {
            Ok(version) => self.runtime_version = version,
            Err(error) => not_ready.push(format!("container runtime is down: {error}")),
        }
        if let Err(error) = cni_conf::check(&self.config.runtime) {
            not_ready.push(format!(
                "container runtime network not ready: NetworkReady=false \
                 reason:NetworkPluginNotReady message:Network plugin returns error: {error}"
            ));
        }
        self.list_images().await;
        let usage = Usage::read(&self.config.root_dir).unwrap_or_else(|error| {
            not_ready.push(format!(
                "cannot read the resources of {}: {error}",
                self.config.root_dir.display()
            ));
            Usage::default()
        });
        let pressure = if usage == Usage::default() {
            Pressure::default()
        } else {
            self.hold(Pressure::measure(&self.config, &self.machine, &usage))
        };
        let addresses = addresses::node_addresses(&self.config.node_ips);
        if addresses.is_empty() && known.is_none() {
            warn!("No address found on this node; hint: give --node-ip");
        }
        Observation {
            machine: self.machine.clone(),
            usage,
            addresses,
            runtime_version: self.runtime_version.clone(),
            images: self.images.clone(),
            not_ready,
            pressure,
        }
    }

    async fn list_images(&mut self) {
        if self.images_at.is_some_and(|at| at.elapsed() < IMAGES_EVERY) {
            return;
        }
        if let Ok(images) = self.probe.images().await {
            self.images = images;
            self.images_at = Some(Instant::now());
        }
    }

    /// What is scarce now or was a moment ago.
    fn hold(&mut self, now: Pressure) -> Pressure {
        for (since, scarce) in self.pressure.iter_mut().zip([now.memory, now.disk, now.pid]) {
            if scarce {
                *since = Some(Instant::now());
            }
        }
        let held = |since: Option<Instant>| since.is_some_and(|at| at.elapsed() < PRESSURE_HOLD);
        let [memory, disk, pid] = self.pressure.map(held);
        now.or(Pressure { memory, disk, pid })
    }

    /// Gives pods a network as soon as the control plane has said which addresses they may have.
    fn ensure_cni_conf(&self, node: &Node) {
        let spec = node.spec.as_ref();
        let cidrs = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
        if cidrs.is_empty() {
            return;
        }
        match cni_conf::ensure_default(&self.config.runtime.cni_conf_dir, &cidrs) {
            Ok(None) => {}
            Ok(Some(path)) => {
                info!(path = %path.display(), "Wrote the default network configuration")
            }
            Err(error) => warn!(%error, "Cannot write the default network configuration"),
        }
    }
}

/// The difference as a merge patch that holds only for the Node that was read.
fn status_patch(node: &Node, previous: &NodeStatus, wanted: &NodeStatus) -> Option<Value> {
    let before = serde_json::to_value(previous).ok()?;
    let after = serde_json::to_value(wanted).ok()?;
    let status = register::merge_diff(&before, &after);
    let version = node.metadata.resource_version.as_deref();
    Some(json!({"metadata": {"resourceVersion": version}, "status": status}))
}

/// The error with its causes in one line.
pub(super) fn describe(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
