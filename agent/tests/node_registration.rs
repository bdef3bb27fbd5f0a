//! A node against a real API server: it registers, becomes Ready once it has a network, keeps its
//! Lease, and leaves alone what others wrote.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a failure in a test may panic, and its modules are its own"
)]

#[path = "server/fixture.rs"]
mod fixture;

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use keelson_agent::agent::{self, NodeParts};
use keelson_agent::config::AgentConfig;
use keelson_agent::node::{NodeImage, NodeShared, RuntimeProbe};
use keelson_standalone::{ControlPlane, StandaloneConfig};
use keelson_supervise::Heartbeats;
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher;
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(30);

struct Probe(watch::Receiver<bool>);

impl RuntimeProbe for Probe {
    fn version(&self) -> BoxFuture<'_, Result<String, String>> {
        let up = *self.0.borrow();
        async move { up.then(|| "containerd://1.6.20".to_owned()).ok_or("no socket".to_owned()) }
            .boxed()
    }

    fn images(&self) -> BoxFuture<'_, Result<Vec<NodeImage>, String>> {
        async { Ok(vec![NodeImage { names: vec!["a:1".to_owned()], size_bytes: 7 }]) }.boxed()
    }
}

struct Cluster {
    plane: ControlPlane,
    client: Client,
    dir: tempfile::TempDir,
}

impl Cluster {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut config = StandaloneConfig::new(dir.path().join("plane"), vec![listener]);
        config.port = port;
        config.pod_cidrs = vec!["10.244.0.0/16".parse().unwrap()];
        let plane = keelson_standalone::start(config).await.unwrap();
        let node =
            AgentConfig { kubeconfig: Some(plane.admin_kubeconfig()), ..AgentConfig::default() };
        let client = agent::api_client(&node).await.unwrap().unwrap();
        Self { plane, client, dir }
    }

    fn config(&self) -> AgentConfig {
        let dir = self.dir.path();
        let mut config = AgentConfig {
            node_name: "n1".to_owned(),
            node_ips: vec!["127.0.0.1".parse().unwrap()],
            root_dir: dir.join("root"),
            run_dir: dir.join("run"),
            pod_logs_dir: dir.join("logs"),
            healthz: None,
            ..AgentConfig::default()
        };
        config.server.port = 0;
        config.runtime.cni_conf_dir = dir.join("net.d");
        config.runtime.cni_bin_dirs = vec![dir.join("bin")];
        config.node.status_update_frequency = Duration::from_secs(1);
        config
    }

    async fn node(&self, what: &str, is_so: impl Fn(&Node) -> bool) -> Node {
        let api: Api<Node> = Api::all(self.client.clone());
        let mut states = watcher::watch_object(api, "n1").boxed();
        let wait = async {
            loop {
                match states.next().await.unwrap() {
                    Ok(Some(node)) if is_so(&node) => return node,
                    _ => {}
                }
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("never: {what}"))
    }
}

fn ready(node: &Node) -> Option<(String, String)> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready")?;
    Some((ready.status.clone(), ready.message.clone().unwrap_or_default()))
}

fn is_ready(node: &Node) -> bool {
    ready(node).is_some_and(|(status, _)| status == "True")
}

fn start(config: AgentConfig, client: &Client, probe: watch::Receiver<bool>) -> CancellationToken {
    agent::ensure_folders(&config).unwrap();
    let shutdown = CancellationToken::new();
    let parts = NodeParts {
        heartbeats: Heartbeats::default(),
        probe: Arc::new(Probe(probe)),
        containers: fixture::containers(Path::new("/nonexistent")),
        shared: NodeShared::default(),
    };
    let (client, stop) = (client.clone(), shutdown.clone());
    tokio::spawn(async move {
        agent::serve_node(Arc::new(config), Some(client), parts, stop).await.unwrap();
    });
    shutdown
}

#[tokio::test]
async fn a_node_registers_and_is_ready_as_soon_as_it_has_a_network() {
    let cluster = Cluster::start().await;
    let config = cluster.config();
    std::fs::create_dir_all(&config.runtime.cni_bin_dirs[0]).unwrap();
    let up = watch::Sender::new(true);
    let shutdown = start(config.clone(), &cluster.client, up.subscribe());

    let node = cluster.node("registered", |node| ready(node).is_some()).await;
    assert_eq!(node.metadata.labels.as_ref().unwrap()["kubernetes.io/hostname"], "n1");
    let status = node.status.as_ref().unwrap();
    let info = status.node_info.as_ref().unwrap();
    assert!(info.kubelet_version.starts_with("v1.36."), "{info:?}");
    assert_eq!(info.container_runtime_version, "containerd://1.6.20");
    assert_eq!(status.declared_features.as_ref().unwrap(), &["ExtendWebSocketsToKubelet"]);

    // The control plane hands out a range, the agent writes the list; only the plugin is missing.
    let no_plugin =
        |node: &Node| ready(node).is_some_and(|(_, message)| message.contains("names the plugin"));
    let node = cluster.node("default network configuration", no_plugin).await;
    assert!(node.spec.unwrap().pod_cidrs.is_some());
    std::fs::write(config.runtime.cni_bin_dirs[0].join("keelson-cni"), "").unwrap();
    cluster.node("ready", is_ready).await;

    up.send_replace(false);
    let down = |node: &Node| {
        ready(node).is_some_and(|(_, message)| message == "container runtime is down: no socket")
    };
    cluster.node("not ready without a runtime", down).await;
    up.send_replace(true);
    cluster.node("ready again", is_ready).await;

    let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), "kube-node-lease");
    let spec = leases.get("n1").await.unwrap().spec.unwrap();
    assert_eq!(spec.holder_identity.as_deref(), Some("n1"));
    assert_eq!(spec.lease_duration_seconds, Some(40));
    shutdown.cancel();
    cluster.plane.shutdown().await;
}

#[tokio::test]
async fn what_others_wrote_survives_a_restart_and_a_deleted_node_comes_back() {
    let cluster = Cluster::start().await;
    let config = cluster.config();
    let up = watch::Sender::new(true);
    let shutdown = start(config.clone(), &cluster.client, up.subscribe());
    cluster.node("registered", |node| ready(node).is_some()).await;
    let api: Api<Node> = Api::all(cluster.client.clone());
    let params = PatchParams::default();
    let label = Patch::Merge(json!({"metadata": {"labels": {"team": "a"}}}));
    api.patch("n1", &params, &label).await.unwrap();
    let gpu = Patch::Merge(json!({"status": {"capacity": {"example.com/gpu": "2"}}}));
    api.patch_status("n1", &params, &gpu).await.unwrap();
    let allocatable = |node: &Node| {
        let status = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        status.is_some_and(|map| map.contains_key("example.com/gpu"))
    };
    cluster.node("extended resource is allocatable", allocatable).await;
    shutdown.cancel();

    let shutdown = start(config, &cluster.client, up.subscribe());
    let node = cluster.node("still there", allocatable).await;
    assert_eq!(node.metadata.labels.unwrap()["team"], "a");

    let uid = node.metadata.uid.clone();
    api.delete("n1", &kube::api::DeleteParams::default()).await.unwrap();
    cluster.node("back again", |node| node.metadata.uid != uid && ready(node).is_some()).await;
    shutdown.cancel();
    cluster.plane.shutdown().await;
}
