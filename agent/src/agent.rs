//! The node agent, from its configuration to a node that runs pods.
//!
//! ```text
//! run ─ folders ─ containerd ─ API client ─┬─ pods        (adopts what runs)
//!                                          └─ serve_node ─┬─ Node, Lease
//!                                                         ├─ HTTPS API, /healthz
//!                                                         └─ READY to systemd
//! ```
//! Stopping the agent stops none of the pods: the next one adopts them.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use keelson_supervise::Heartbeats;
use kube::Client;
use kube::client::ConfigExt;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use crate::config::AgentConfig;
use crate::node::addresses::node_addresses;
use crate::node::{self, NodeShared, RuntimeProbe};
use crate::server;
use crate::server::auth::Access;
use crate::server::containers::Containers;
use crate::server::logs::follow::Logs;
use crate::server::metrics::Metrics;
use crate::server::routes::{Routes, Settings};
use crate::server::tls::Certificates;

mod bootstrap;
mod containers;
mod image_gc;
mod start;

/// What the node's API and status show of the machinery that runs pods.
#[derive(Clone)]
pub struct NodeParts {
    pub probe: Arc<dyn RuntimeProbe>,
    pub containers: Arc<dyn Containers>,
    pub shared: NodeShared,
    pub heartbeats: Heartbeats,
}

/// Runs a node agent until `shutdown`; its pods run on.
///
/// # Errors
/// When something cannot be used that waiting will not mend; the text names it.
pub async fn run(config: AgentConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    ensure_folders(&config)?;
    // A stop of any part stops all: half an agent would only look alive.
    let stop = shutdown.child_token();
    let _stops_with_us = stop.clone().drop_guard();
    let Some(runtime) = start::connect_runtime(&config, &stop).await? else { return Ok(()) };
    let client = api_client(&config).await?;
    let pods = start::pods(&config, &runtime, client.as_ref(), &stop)?;
    let shared = NodeShared::default();
    let containers = containers::NodeContainers {
        registry: pods.registry.clone(),
        runtime: runtime.clone(),
        cgroups: crate::cgroup::CgroupTree::detect(&config.runtime.cgroup_root).ok(),
        run_dir: config.run_dir.clone(),
    };
    let parts = NodeParts {
        probe: Arc::new(start::ContainerdProbe(runtime.clone())),
        containers: Arc::new(containers),
        shared: shared.clone(),
        heartbeats: pods.heartbeats.clone(),
    };
    let images = image_gc::ImageCollector::new(&config, runtime.clone(), pods.events.clone()).run();
    supervised("image garbage collection", &stop, images);
    let tidy = crate::memory::give_back_after_bursts(runtime.events());
    supervised("memory", &stop, tidy);
    let wake = start::wake_on_resync(runtime, shared.wake);
    supervised("wake on resync", &stop, wake);
    let pods = async {
        let ended = crate::pod::run(pods, stop.clone()).await;
        stop.cancel();
        ended.context("cannot run pods")
    };
    let node = async {
        let ended = serve_node(Arc::new(config), client, parts, stop.clone()).await;
        stop.cancel();
        ended
    };
    let (pods, node) = tokio::join!(pods, node);
    node.and(pods)
}

/// Starts a task that runs until `stop`. Its panic ends the agent, which is started again: half an agent would only look
/// alive.
fn supervised(
    name: &'static str,
    stop: &CancellationToken,
    work: impl Future<Output = ()> + Send + 'static,
) {
    let stop = stop.clone();
    let work = keelson_supervise::caught(name, work);
    tokio::spawn(async move {
        if let Some(Err(_)) = stop.run_until_cancelled(work).await {
            stop.cancel();
        }
    });
}

/// An error with its causes in one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Makes the folders that the agent writes to.
///
/// # Errors
/// When one cannot be made; it is named.
pub fn ensure_folders(config: &AgentConfig) -> anyhow::Result<()> {
    let failed = |folder: &Path| {
        format!("cannot create {}; hint: keelson agent needs root", folder.display())
    };
    for folder in [&config.pod_logs_dir, &config.runtime.cni_conf_dir] {
        std::fs::create_dir_all(folder).with_context(|| failed(folder))?;
    }
    // What pods have there is nothing for other users of the machine.
    for folder in [&config.root_dir, &config.root_dir.join("pods"), &config.run_dir] {
        close_to_others(folder).with_context(|| failed(folder))?;
    }
    Ok(())
}

/// Makes a folder that only root and its group may enter; takes rights away from one that is there.
fn close_to_others(folder: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(folder)?;
    let mode = std::fs::metadata(folder)?.permissions().mode() & 0o7777;
    if mode & !0o750 == 0 {
        return Ok(());
    }
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode & 0o750))
}

/// A client for the API server, or `None` when the agent works without one.
///
/// # Errors
/// When the kubeconfig cannot be used, or no certificate can be had with the bootstrap one.
pub async fn api_client(config: &AgentConfig) -> anyhow::Result<Option<Client>> {
    // Whoever hosts the agent may have chosen a provider already: either is good.
    drop(rustls::crypto::ring::default_provider().install_default());
    let Some(path) = &config.kubeconfig else { return Ok(None) };
    if !path.exists()
        && let Some(bootstrap) = &config.bootstrap_kubeconfig
    {
        bootstrap::request_kubeconfig(config, bootstrap, path).await?;
    }
    client_from(path).await.map(Some)
}

async fn client_from(path: &Path) -> anyhow::Result<Client> {
    let bad = || format!("cannot use the kubeconfig {}", path.display());
    let kubeconfig = kube::config::Kubeconfig::read_from(path).with_context(bad)?;
    let options = kube::config::KubeConfigOptions::default();
    let config =
        kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.with_context(bad)?;
    with_few_idle_connections(config).with_context(bad)
}

/// kube's own client keeps every connection of a burst for a minute and a half, with the buffers of TLS and HTTP.
fn with_few_idle_connections(config: kube::Config) -> anyhow::Result<Client> {
    let connections = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(4)
        .pool_idle_timeout(Duration::from_secs(10))
        .pool_timer(TokioTimer::new())
        .build(config.rustls_https_connector()?);
    let service = tower::ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .map_err(tower::BoxError::from)
        .service(connections);
    Ok(Client::new(service, config.default_namespace))
}

/// Keeps the node's object, its HTTPS API and its health checks up until `shutdown`. Everything that
/// must be able to start is started before systemd hears that the agent is ready.
///
/// # Errors
/// When a port cannot be opened or a certificate cannot be used.
pub async fn serve_node(
    config: Arc<AgentConfig>,
    client: Option<Client>,
    parts: NodeParts,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let heartbeats = parts.heartbeats.clone();
    let tasks = TaskTracker::new();
    let addresses = node_addresses(&config.node_ips);
    let (cert_dir, name) = (config.cert_dir(), &config.node_name);
    let certificates = Certificates::load(&config.server, &cert_dir, name, &addresses)?;
    let listener = server::bind(config.server.address, config.server.port).await?;
    let routes = Arc::new(routes(&config, client.clone(), &parts, &tasks, &shutdown));
    if let Some(address) = config.healthz {
        let healthz = server::bind(address.ip(), address.port()).await?;
        tasks.spawn(server::serve_healthz(healthz, routes.clone(), shutdown.clone()));
    }
    tasks.spawn(server::serve(listener, Arc::new(certificates), routes, shutdown.clone()));
    match client {
        Some(client) => {
            let NodeParts { probe, shared, .. } = parts;
            tasks.spawn(node::run(config.clone(), client, probe, shared, shutdown.clone()));
        }
        None => warn!("No --kubeconfig: only static pods run here, and no Node is registered"),
    }
    info!(node = config.node_name, port = config.server.port, "Agent is ready");
    tell_systemd(&tasks, &shutdown, heartbeats);
    shutdown.cancelled().await;
    info!(node = config.node_name, "Agent stops; its pods run on");
    tasks.close();
    tasks.wait().await;
    Ok(())
}

fn routes(
    config: &Arc<AgentConfig>,
    client: Option<Client>,
    parts: &NodeParts,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) -> Routes {
    Routes {
        access: Access::new(config.server.clone(), config.node_name.clone(), client),
        containers: parts.containers.clone(),
        logs: Logs::default(),
        settings: Settings {
            streaming_idle_timeout: config.server.streaming_idle_timeout,
            debugging_handlers: config.server.debugging_handlers,
            configz: configz(config),
        },
        health: health(&parts.heartbeats),
        metrics: Metrics::new(config.node_name.clone(), parts.containers.clone()),
        sessions: tasks.clone(),
        cancel: shutdown.clone(),
    }
}

/// What is in force, in the words of the file that it may have come from.
fn configz(config: &AgentConfig) -> serde_json::Value {
    let seconds = |duration: std::time::Duration| format!("{}s", duration.as_secs());
    json!({"kubeletconfig": {
        "address": config.server.address,
        "port": config.server.port,
        "authentication": {
            "anonymous": {"enabled": config.server.anonymous},
            "webhook": {"enabled": config.server.token_review,
                "cacheTTL": seconds(config.server.token_review_ttl)},
            "x509": {"clientCAFile": config.server.client_ca_file},
        },
        "cgroupDriver": config.runtime.cgroup_driver.as_str(),
        "cgroupRoot": config.runtime.cgroup_root,
        "clusterDNS": config.pods.cluster_dns,
        "clusterDomain": config.pods.cluster_domain,
        "containerLogMaxFiles": config.pods.log_max_files,
        "containerLogMaxSize": config.pods.log_max_size.to_string(),
        "containerRuntimeEndpoint": format!("unix://{}", config.runtime.socket.display()),
        "imageGCHighThresholdPercent": config.image_gc.high_threshold_percent,
        "imageGCLowThresholdPercent": config.image_gc.low_threshold_percent,
        "imageMaximumGCAge": seconds(config.image_gc.maximum_age.unwrap_or_default()),
        "imageMinimumGCAge": seconds(config.image_gc.minimum_age),
        "maxPods": config.node.max_pods,
        "nodeLeaseDurationSeconds": config.node.lease_duration.as_secs(),
        "nodeStatusReportFrequency": seconds(config.node.status_report_frequency),
        "nodeStatusUpdateFrequency": seconds(config.node.status_update_frequency),
        "registerNode": config.node.register,
        "resolvConf": config.pods.resolv_conf,
        "staticPodPath": config.static_pod_path,
    }})
}

/// What is wrong with the agent, for health checks. A runtime or an API server that is away is not: a new agent would
/// not mend it, and the Node says so.
fn health(heartbeats: &Heartbeats) -> Box<dyn Fn() -> Option<String> + Send + Sync> {
    let heartbeats = heartbeats.clone();
    Box::new(move || heartbeats.stalled(Instant::now()).first().map(ToString::to_string))
}

/// Says READY, and goes on to say that the agent lives where systemd asked for that.
fn tell_systemd(tasks: &TaskTracker, shutdown: &CancellationToken, heartbeats: Heartbeats) {
    use sd_notify::NotifyState;
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        debug!(%error, "Cannot notify systemd");
    }
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let shutdown = shutdown.clone();
    tasks.spawn(async move {
        let beat = async {
            let mut ticks = tokio::time::interval(limit / 2);
            loop {
                ticks.tick().await;
                // Without a sign of life systemd starts the agent again, which is what a part that hangs needs.
                let stalled = heartbeats.stalled(Instant::now());
                if let Some(part) = stalled.first() {
                    error!(%part, "A part of the agent hangs");
                    continue;
                }
                if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
                    debug!(%error, "Cannot notify systemd's watchdog");
                }
            }
        };
        shutdown.run_until_cancelled(beat).await;
    });
}

/// Where the agent keeps the key of a certificate that it asked the API server for.
fn client_key_path(config: &AgentConfig) -> PathBuf {
    config.cert_dir().join("kubelet-client.key")
}
