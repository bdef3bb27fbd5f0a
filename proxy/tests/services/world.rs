//! The whole proxy on a node, beside an API server that only knows lists, watches, and posted Events.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use keelson_proxy::ebpf::EbpfConfig;
use keelson_proxy::explain::{Question, explain};
use keelson_proxy::{LocalSources, ProxyConfig, run_with};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::stage::api::{api_server, kubeconfig};
use crate::stage::*;

/// Only kills a row that hangs.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) fn service(name: &str, spec: Value) -> Value {
    json!({"metadata": {"namespace": "default", "name": name, "resourceVersion": "2"}, "spec": spec})
}

pub(crate) fn endpoint(service: &str, address: &str) -> Value {
    json!({
        "metadata": {
            "namespace": "default", "name": format!("{service}-x"), "resourceVersion": "2",
            "labels": {"kubernetes.io/service-name": service},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}, "nodeName": "here"}],
        "ports": [{"name": "", "protocol": "TCP", "port": 8080}],
    })
}

pub(crate) fn spec(address: &str, node_port: u16) -> Value {
    json!({
        "type": "NodePort", "clusterIP": address, "clusterIPs": [address],
        "ports": [{"port": 80, "nodePort": node_port}],
    })
}

pub(crate) fn node_object() -> Value {
    json!({
        "metadata": {"name": "here", "resourceVersion": "1"},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE4}]},
    })
}

/// Asks until it is as wanted; refusals come at once, so the number bounds the time.
#[track_caller]
pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let began = std::time::Instant::now();
    while began.elapsed() < DEADLINE {
        if let Some(found) = ask() {
            return found;
        }
        std::thread::yield_now();
    }
    panic!("never: {what}");
}

/// The running proxy, seen from outside.
pub(crate) struct World {
    pub(crate) api: broadcast::Sender<(String, Value)>,
    pub(crate) posted: broadcast::Receiver<(String, Value)>,
}

impl World {
    pub(crate) fn tell(&self, kind: &str, what: &str, object: Value) {
        self.api.send((kind.to_owned(), json!({"type": what, "object": object}))).unwrap();
    }
}

/// Runs the proxy on the node while `work` runs; `folder` is for its files.
pub(crate) fn with_proxy(node: &Node, lists: Value, folder: &Path, work: impl FnOnce(&mut World)) {
    with_configured_proxy(node, lists, folder, |config| config, work);
}

/// As [`with_proxy`], with another configuration.
pub(crate) fn with_configured_proxy(
    node: &Node,
    lists: Value,
    folder: &Path,
    configure: impl FnOnce(ProxyConfig) -> ProxyConfig + Send,
    work: impl FnOnce(&mut World),
) {
    let (api, posted) = broadcast::channel(64);
    let shutdown = CancellationToken::new();
    let (synced, wait_synced) = mpsc::channel();
    std::thread::scope(|scope| {
        let (stop_inside, api_inside) = (shutdown.clone(), api.clone());
        let (namespace, mode, ebpf) = (&node.namespace, node.mode, node.config.ebpf.clone());
        scope.spawn(move || {
            namespace.run(|| {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                tokio::task::LocalSet::new().block_on(&runtime, async {
                    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                    let path = kubeconfig(folder, listener.local_addr().unwrap().port());
                    tokio::task::spawn_local(api_server(listener, lists, api_inside));
                    let config = configure(config(mode, ebpf, &path, folder));
                    run_with(config, stop_inside, move || synced.send(()).unwrap()).await.unwrap();
                });
            });
        });
        // Dropped also when an assertion fails, so that the proxy ends.
        let stop = shutdown.clone().drop_guard();
        wait_synced.recv_timeout(DEADLINE).unwrap();
        work(&mut World { api, posted });
        drop(stop);
    });
}

pub(crate) fn config(
    mode: Mode,
    ebpf: EbpfConfig,
    kubeconfig: &Path,
    folder: &Path,
) -> ProxyConfig {
    ProxyConfig {
        ebpf,
        kubeconfig: Some(kubeconfig.to_owned()),
        node_name: "here".to_owned(),
        modes: Mode::candidates(mode.name()).unwrap(),
        local_sources: LocalSources::Cidrs(vec!["10.66.0.0/16".parse().unwrap()]),
        state_file: Some(folder.join("last-known.json")),
        ..ProxyConfig::default()
    }
}

/// What `keelson-proxy explain` answers on the node, beside the proxy that [`with_proxy`] runs with that folder.
pub(crate) fn explained(node: &Node, folder: &Path, what: &str) -> String {
    let kubeconfig = folder.join("kubeconfig");
    let config = config(node.mode, node.config.ebpf.clone(), &kubeconfig, folder);
    let question = Question { what: what.to_owned(), from: None, protocol: "tcp".to_owned() };
    node.namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(explain(&config, &question)).unwrap()
    })
}

pub(crate) fn bare(mode: Mode) -> Node {
    let mut node = Node::new(mode);
    node.backend = None;
    node
}
