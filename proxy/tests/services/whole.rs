//! The whole proxy against an API server that only knows lists and watches.

use std::sync::mpsc;

use crate::stage::api::{api_server, kubeconfig};
use crate::stage::*;
use keelson_proxy::{LocalSources, ProxyConfig, run_with};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

rows![services_of_an_api_server_answer_and_follow_its_events,];

fn service(name: &str, spec: Value) -> Value {
    json!({"metadata": {"namespace": "default", "name": name, "resourceVersion": "2"}, "spec": spec})
}

fn slice(service: &str, address: &str) -> Value {
    json!({
        "metadata": {
            "namespace": "default", "name": format!("{service}-x"), "resourceVersion": "2",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}, "nodeName": "here"}],
        "ports": [{"name": "", "protocol": "TCP", "port": 8080}],
    })
}

fn spec(address: &str, node_port: u16) -> Value {
    json!({
        "type": "NodePort", "clusterIP": address, "clusterIPs": [address],
        "ports": [{"port": 80, "nodePort": node_port}],
    })
}

/// Asks until the answer comes. The time only ends a test that hangs: not every kernel interface tells
/// of changes, some are looked at twice a second.
fn eventually(from: &Namespace, to: &str) -> Answer {
    let began = std::time::Instant::now();
    while began.elapsed() < std::time::Duration::from_secs(10) {
        if let Ok(answer) = from.tcp(to) {
            return answer;
        }
    }
    panic!("{to} never answered");
}

fn services_of_an_api_server_answer_and_follow_its_events(mode: Mode) {
    let mut node = Node::new(mode);
    node.backend = None;
    let client = node.pod("client", 10);
    let _server = node.pod("one", 2).serving("TCP", 8080);
    let directory = tempfile::tempdir().unwrap();
    let lists = json!({
        "services": [service("web", spec("10.96.0.1", 30080))],
        "endpointslices": [slice("web", "10.66.0.2")],
        "nodes": [{
            "metadata": {"name": "here", "resourceVersion": "1"},
            "status": {"addresses": [{"type": "InternalIP", "address": NODE4}]},
        }],
    });
    let (events, _) = broadcast::channel(16);
    let shutdown = CancellationToken::new();
    let (synced, wait_synced) = mpsc::channel();
    std::thread::scope(|scope| {
        let (shutdown_inside, events_inside) = (shutdown.clone(), events.clone());
        let (node_namespace, directory) = (&node.namespace, directory.path());
        scope.spawn(move || {
            node_namespace.run(|| {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                tokio::task::LocalSet::new().block_on(&runtime, async {
                    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                    let port = listener.local_addr().unwrap().port();
                    let path = kubeconfig(directory, port);
                    tokio::task::spawn_local(api_server(listener, lists, events_inside));
                    let config = ProxyConfig {
                        kubeconfig: Some(path),
                        node_name: "here".to_owned(),
                        modes: Mode::candidates(mode.name()).unwrap(),
                        local_sources: LocalSources::Cidrs(vec!["10.66.0.0/16".parse().unwrap()]),
                        ..ProxyConfig::default()
                    };
                    run_with(config, shutdown_inside, move || synced.send(()).unwrap())
                        .await
                        .unwrap();
                });
            });
        });
        let stop = shutdown.clone().drop_guard();
        wait_synced.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().client, client.v4);
        assert_eq!(node.outside.tcp(&format!("{NODE4}:30080")).unwrap().server, "one");

        // A new Service, then its endpoint.
        let added = |object| json!({"type": "ADDED", "object": object});
        events
            .send(("services".to_owned(), added(service("two", spec("10.96.0.2", 30081)))))
            .unwrap();
        events.send(("endpointslices".to_owned(), added(slice("two", "10.66.0.2")))).unwrap();
        assert_eq!(eventually(&client.namespace, "10.96.0.2:80").server, "one");

        // Somebody flushes everything.
        damages(mode)[0].inflict(&node.namespace);
        assert_eq!(eventually(&client.namespace, "10.96.0.1:80").server, "one");

        let health = node.namespace.get("127.0.0.1:10256", "/healthz");
        assert!(health.contains("\"nodeEligible\":true"), "{health}");
        let metrics = node.namespace.get("127.0.0.1:10249", "/metrics");
        for name in
            ["kubeproxy_sync_proxy_rules_duration_seconds_count", "keelson_proxy_repairs_total 1"]
        {
            assert!(metrics.contains(name), "{name} is not in {metrics}");
        }
        drop(stop);
    });
    // The proxy is gone, the Services are not.
    assert_eq!(client.namespace.tcp("10.96.0.2:80").unwrap().server, "one");
}
