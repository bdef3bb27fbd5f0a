//! The running proxy: watches on the async side, the engine on a thread of its own.

use std::sync::Arc;

use anyhow::Context;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio_util::sync::CancellationToken;

use crate::clock::Now;
use crate::config::ProxyConfig;
use crate::engine::{Engine, Listeners, Progress};
use crate::events::{Notices, publish};
use crate::health_checks::{self, HealthChecks};
use crate::loopback6::{self, Loopback6};
use crate::metrics::Metrics;
use crate::server::{Pages, serve};
use crate::watch::{Wake, follow};

/// Runs the proxy until `shutdown` is cancelled. Services stay in force afterwards.
///
/// Works in the network namespace of the calling thread. An API server that cannot be reached is
/// waited for; an unusable configuration or kernel is an error at once.
pub async fn run(config: ProxyConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    run_with(config, shutdown, || {}).await
}

/// As [`run`]; calls `on_synced` when all Services are in force for the first time.
pub async fn run_with(
    config: ProxyConfig,
    shutdown: CancellationToken,
    on_synced: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    let client = client(&config).await?;
    let mode = crate::switch::choose(config.modes, &config.ebpf)?;
    let (metrics, progress) = (Arc::new(Metrics::new(mode)), Arc::new(Progress::default()));
    let (notices, noticed) = Notices::channel();
    let (health_checks, wanted) = HealthChecks::channel();
    let (loopback6, relayed) = Loopback6::channel();
    let listeners = Listeners {
        metrics: Arc::clone(&metrics),
        progress: Arc::clone(&progress),
        notices: notices.clone(),
        health_checks,
        loopback6,
        on_synced: Box::new(on_synced),
    };
    let (engine, mailbox) =
        Engine::open(config.clone(), mode, listeners).context("cannot program Services")?;
    let patience = 2 * config.sync_period;
    let context = health_checks::Context { progress: Arc::clone(&progress), patience, notices };
    let pages = Arc::new(Pages {
        metrics,
        progress,
        mode: engine.mode(),
        sync_period: config.sync_period,
        config_text: config.as_json(engine.mode()).to_string(),
        counting: engine.counting(),
        service_metrics: config.ebpf.service_metrics,
    });
    // nf_tables calls block, the longest for some tenths of a second.
    let (ended, engine_ended) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::Builder::new().name("proxy-engine".to_owned()).spawn(move || {
        let result = engine.run();
        drop(ended);
        result
    })?;
    let watched = Arc::clone(&pages.progress);
    let (health, counters) = (Arc::clone(&pages), pages);
    tokio::select! {
        // Each arm ends the proxy, so nothing is lost by dropping the others.
        () = shutdown.cancelled() => {}
        _ = engine_ended => {}
        () = follow(client.clone(), &config.node_name, &mailbox) => {}
        () = publish(client, &config.node_name, noticed) => {}
        () = health_checks::serve(wanted, context) => {}
        () = loopback6::serve(relayed) => {}
        () = reassure_systemd(watched) => {}
        () = serve("healthz", config.healthz_address, move |path| health.health(path, Now::read())) => {}
        () = serve("metrics", config.metrics_address, move |path| counters.metrics(path)) => {}
    }
    mailbox.send(Wake::Stop);
    let joined = tokio::task::spawn_blocking(move || thread.join()).await?;
    joined.map_err(|_| anyhow::anyhow!("the proxy's engine panicked"))?
}

/// Tells systemd that the engine lives, where the unit has a watchdog. When the engine hangs systemd hears nothing more and
/// starts the process again, which takes over what is in the kernel.
async fn reassure_systemd(progress: Arc<Progress>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    loop {
        if !progress.get().is_stalled(Now::read())
            && let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Watchdog])
        {
            tracing::warn!(%error, "Cannot tell systemd that the engine lives");
        }
        tokio::time::sleep(limit / 3).await;
    }
}

pub(crate) async fn client(config: &ProxyConfig) -> anyhow::Result<Client> {
    // Somebody else in the process may have chosen a provider already.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::trace!("A TLS provider is installed already");
    }
    let mut kube_config = match &config.kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path)
                .with_context(|| format!("cannot read kubeconfig {}", path.display()))?;
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("cannot use kubeconfig {}", path.display()))?
        }
        None => kube::Config::incluster()
            .context("no --kubeconfig given and not running inside a pod with a service account")?,
    };
    if let Some(url) = &config.api_server {
        kube_config.cluster_url =
            url.parse().with_context(|| format!("{url:?} is not the URL of an API server"))?;
    }
    Ok(Client::try_from(kube_config)?)
}
