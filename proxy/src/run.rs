//! The running proxy: watches on the async side, the engine on a thread of its own.

use std::sync::Arc;

use anyhow::Context;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio_util::sync::CancellationToken;

use crate::config::ProxyConfig;
use crate::engine::{Engine, Progress};
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
    let (metrics, progress) = (Arc::new(Metrics::new()), Arc::new(Progress::default()));
    let pages = Arc::new(Pages {
        metrics: Arc::clone(&metrics),
        progress: Arc::clone(&progress),
        sync_period: config.sync_period,
        config_text: format!("{config:#?}\n"),
    });
    let (engine, mailbox) = Engine::open(config.clone(), metrics, progress, Box::new(on_synced))
        .context("cannot program Services")?;
    // nf_tables calls block, the longest for some tenths of a second.
    let (ended, engine_ended) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::Builder::new().name("proxy-engine".to_owned()).spawn(move || {
        let result = engine.run();
        drop(ended);
        result
    })?;
    let (health, counters) = (Arc::clone(&pages), pages);
    tokio::select! {
        // Each arm ends the proxy, so nothing is lost by dropping the others.
        () = shutdown.cancelled() => {}
        _ = engine_ended => {}
        () = follow(client, &config.node_name, &mailbox) => {}
        () = serve("healthz", config.healthz_address, move |path| health.health(path)) => {}
        () = serve("metrics", config.metrics_address, move |path| counters.metrics(path)) => {}
    }
    mailbox.send(Wake::Stop);
    let joined = tokio::task::spawn_blocking(move || thread.join()).await?;
    joined.map_err(|_| anyhow::anyhow!("the proxy's engine panicked"))?
}

async fn client(config: &ProxyConfig) -> anyhow::Result<Client> {
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
