//! The steps of starting an agent that touch containerd and the pods.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use kube::Client;
use tokio::sync::Notify;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::describe;
use crate::config::AgentConfig;
use crate::events::EventRecorder;
use crate::node::addresses::node_addresses;
use crate::node::facts::{Machine, Usage};
use crate::node::{NodeImage, RuntimeProbe, status};
use crate::pod::{PodRegistry, Pods, PodsConfig};
use crate::runtime::types::RuntimeEvent;
use crate::runtime::{Runtime, RuntimeError, RuntimeOptions};

const RETRY: Duration = Duration::from_secs(1);
/// How long containerd may be away before that is said again.
const REMIND_EVERY: u32 = 60;

/// Connects to containerd. One that is not there yet is waited for, one that is too old is not;
/// `None` when `shutdown` came first.
///
/// # Errors
/// When what answers can never be used.
pub(super) async fn connect_runtime(
    config: &AgentConfig,
    shutdown: &CancellationToken,
) -> anyhow::Result<Option<Runtime>> {
    let options = runtime_options(config);
    let mut attempt = 0_u32;
    loop {
        let error = match Runtime::connect(options.clone()).await {
            Ok(runtime) => return Ok(Some(runtime)),
            Err(error @ (RuntimeError::Unreachable { .. } | RuntimeError::Call { .. })) => error,
            Err(error) => return Err(error).context("cannot use containerd"),
        };
        if attempt.is_multiple_of(REMIND_EVERY) {
            warn!(
                error = describe(&error),
                "Waiting for containerd; hint: start it, or name its socket with \
                 --container-runtime-endpoint"
            );
        }
        attempt = attempt.saturating_add(1);
        if shutdown.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
            return Ok(None);
        }
    }
}

fn runtime_options(config: &AgentConfig) -> RuntimeOptions {
    let runtime = &config.runtime;
    RuntimeOptions {
        socket: runtime.socket.clone(),
        namespace: runtime.namespace.clone(),
        root_dir: config.root_dir.clone(),
        run_dir: config.run_dir.clone(),
        cni_conf_dir: runtime.cni_conf_dir.clone(),
        cni_bin_dirs: runtime.cni_bin_dirs.clone(),
        cgroup_driver: runtime.cgroup_driver,
        pull_netns: runtime.pull_netns.clone(),
        registry_config_dir: runtime.registry_config_dir.clone(),
        default_runtime: runtime.default_runtime.clone(),
        log_max_bytes: config.pods.log_max_size,
        log_max_files: config.pods.log_max_files,
    }
}

/// Begins to run pods; those that run already are adopted.
///
/// # Errors
/// When the machine's resources cannot be read.
pub(super) fn pods(
    config: &AgentConfig,
    runtime: &Runtime,
    client: Option<&Client>,
    cancel: &CancellationToken,
) -> anyhow::Result<Pods> {
    let machine = Machine::read();
    let usage = Usage::read(&config.root_dir)
        .with_context(|| format!("cannot read the resources of {}", config.root_dir.display()))?;
    let (capacity, allocatable) = status::resources(config, &machine, &usage);
    let pods = &config.pods;
    let events = match client {
        Some(client) => EventRecorder::start(client.clone(), &config.node_name, cancel.clone()),
        None => EventRecorder::log_only(&config.node_name),
    };
    Ok(Pods {
        heartbeats: keelson_supervise::Heartbeats::default(),
        config: PodsConfig {
            node_name: config.node_name.clone(),
            node_ips: node_addresses(&config.node_ips),
            capacity,
            allocatable,
            root_dir: config.root_dir.clone(),
            pod_logs_dir: config.pod_logs_dir.clone(),
            static_pod_path: config.static_pod_path.clone(),
            cgroup_root: config.runtime.cgroup_root.clone(),
            cluster_dns: pods.cluster_dns.clone(),
            cluster_domain: pods.cluster_domain.clone(),
            resolv_conf: pods.resolv_conf.clone(),
            socket_exempt_runtime_classes: pods.socket_exempt_runtime_classes.clone(),
            allowed_unsafe_sysctls: pods.allowed_unsafe_sysctls.clone(),
            pids_limit: pods.pids_limit,
            max_restart_period: pods.max_restart_period,
            max_parallel_image_pulls: pods.max_parallel_image_pulls,
        },
        runtime: runtime.clone(),
        client: client.cloned(),
        events,
        registry: PodRegistry::new(),
    })
}

/// Wakes the node's status when the way to containerd was interrupted or came back.
pub(super) async fn wake_on_resync(runtime: Runtime, wake: Arc<Notify>) {
    let mut events = runtime.events();
    loop {
        match events.recv().await {
            Ok(RuntimeEvent::Resync) | Err(RecvError::Lagged(_)) => wake.notify_one(),
            Ok(RuntimeEvent::Pod { .. }) => {}
            Err(RecvError::Closed) => return info!("Runtime events ended"),
        }
    }
}

/// What the Node object shows of containerd.
pub(super) struct ContainerdProbe(pub(super) Runtime);

impl RuntimeProbe for ContainerdProbe {
    fn version(&self) -> BoxFuture<'_, Result<String, String>> {
        async {
            let version = self.0.version().await.map_err(|error| describe(&error))?;
            Ok(format!("containerd://{version}"))
        }
        .boxed()
    }

    fn images(&self) -> BoxFuture<'_, Result<Vec<NodeImage>, String>> {
        async {
            let images = self.0.list_images().await.map_err(|error| describe(&error))?;
            let node_image = |image: crate::image::ListedImage| NodeImage {
                names: image.names,
                size_bytes: image.size,
            };
            Ok(images.into_iter().map(node_image).collect())
        }
        .boxed()
    }
}
