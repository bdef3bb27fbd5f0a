//! The Node object: registration, status and Lease.
//!
//! ```text
//! register ──> watch own Node ──┐
//!     │        CNI folder ──────┼─ wake ─> observe ─> status() ─> differs? ─> PATCH
//!     │        every 10 s ──────┘
//!     └──────> renew the Lease every 10 s
//! ```
//! Nothing here stops pods: while the API server is away everything is retried and what runs keeps
//! running. The status is a pure function ([`status::status`]); what others wrote into it stays.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Node;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::config::AgentConfig;

pub mod addresses;
pub mod cni_conf;
pub mod facts;
mod lease;
mod reconcile;
mod register;
pub mod status;

pub use status::NodeImage;

/// What the node needs to know of the container runtime.
pub trait RuntimeProbe: Send + Sync + 'static {
    /// `containerd://<version>`, or why the runtime does not answer.
    fn version(&self) -> BoxFuture<'_, Result<String, String>>;
    /// The images that are present.
    fn images(&self) -> BoxFuture<'_, Result<Vec<NodeImage>, String>>;
}

/// What the other parts of the agent share with the node part.
#[derive(Clone)]
pub struct NodeShared {
    /// The Node as the API server last showed it; `None` until it did.
    pub node: watch::Sender<Option<Arc<Node>>>,
    /// Notified by whoever knows that the runtime's state may have changed.
    pub wake: Arc<Notify>,
}

impl Default for NodeShared {
    fn default() -> Self {
        Self { node: watch::Sender::new(None), wake: Arc::new(Notify::new()) }
    }
}

/// Registers the node and keeps its object true until `cancel`; errors are retried, for ever.
pub async fn run(
    config: Arc<AgentConfig>,
    client: Client,
    probe: Arc<dyn RuntimeProbe>,
    shared: NodeShared,
    cancel: CancellationToken,
) {
    let work = async {
        let mut reconciler = reconcile::Reconciler::new(config.clone(), client.clone(), probe);
        reconciler.register().await;
        tokio::join!(
            lease::renew_for_ever(&config, &client, &shared),
            watch_own(&config, &client, &shared),
            watch_cni_conf(&config.runtime.cni_conf_dir, &shared.wake),
            reconcile_for_ever(reconciler, &shared),
        );
    };
    cancel.run_until_cancelled(work).await;
}

async fn reconcile_for_ever(mut reconciler: reconcile::Reconciler, shared: &NodeShared) {
    let mut node = shared.node.subscribe();
    let mut ticks = tokio::time::interval(reconciler.config().node.status_update_frequency);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        // Every arm only waits; whichever is lost is looked at in the round that follows.
        tokio::select! {
            _ = ticks.tick() => {}
            _ = node.changed() => {}
            () = shared.wake.notified() => {}
        }
        let known = node.borrow_and_update().clone();
        reconciler.reconcile(known).await;
    }
}

/// Follows the Node object, so that what others change in it is seen at once.
async fn watch_own(config: &AgentConfig, client: &Client, shared: &NodeShared) {
    let api: Api<Node> = Api::all(client.clone());
    let backoff = watcher::DefaultBackoff::default();
    let mut objects = watcher::watch_object(api, &config.node_name).backoff(backoff).boxed();
    while let Some(object) = objects.next().await {
        match object {
            Ok(Some(node)) => {
                shared.node.send_replace(Some(Arc::new(node)));
            }
            Ok(None) => {
                debug!(node = config.node_name, "Node object is not there");
                shared.node.send_replace(None);
                shared.wake.notify_one();
            }
            Err(error) => debug!(%error, "Watch of the Node object interrupted"),
        }
    }
}

/// Wakes the status whenever the network configuration changes.
async fn watch_cni_conf(dir: &Path, wake: &Notify) {
    loop {
        if let Err(error) = follow_folder(dir, wake).await {
            warn!(dir = %dir.display(), %error, "Cannot watch the CNI configuration folder");
        }
        // The folder may come back; until then the periodic status sees changes, only later.
        tokio::time::sleep(Duration::from_secs(30)).await;
    }
}

async fn follow_folder(dir: &Path, wake: &Notify) -> std::io::Result<()> {
    use inotify::WatchMask;
    std::fs::create_dir_all(dir)?;
    let inotify = inotify::Inotify::init()?;
    let changes = WatchMask::CLOSE_WRITE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::DELETE
        | WatchMask::DELETE_SELF;
    inotify.watches().add(dir, changes)?;
    wake.notify_one();
    let mut events = inotify.into_event_stream([0_u8; 1024])?;
    while let Some(event) = events.try_next().await? {
        wake.notify_one();
        if event.mask.contains(inotify::EventMask::IGNORED) {
            info!(dir = %dir.display(), "CNI configuration folder was removed");
            return Ok(());
        }
    }
    Ok(())
}

/// How long to wait before try number `attempt` (from 0): 0.1 s doubled up to 7 s, as the kubelet.
fn backoff(attempt: u32) -> Duration {
    Duration::from_millis(100).saturating_mul(1 << attempt.min(10)).min(Duration::from_secs(7))
}
