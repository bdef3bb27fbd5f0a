//! The whole proxy against an API server that only knows lists, watches, and posted Events.

use std::io::ErrorKind;

use keelson_proxy::explain::{Question, explain};
use keelson_proxy::{NodePortAddresses, ProxyConfig};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::stage::api::kubeconfig;
use crate::stage::*;
use crate::world::*;

rows![
    services_of_an_api_server_answer_and_follow_its_events,
    load_balancers_learn_whether_endpoints_are_here,
    health_checks_are_answered_where_node_ports_are,
    the_node_object_and_service_ranges_are_followed,
    what_is_wrong_with_an_object_is_told_in_an_event,
    what_happened_in_a_gap_of_the_watch_is_not_lost,
    node_ports_answer_on_both_loopback_addresses,
    explain_tells_what_is_programmed_and_why,
    a_start_ends_the_mode_that_the_node_was_in,
    after_a_reboot_the_last_known_services_answer_without_an_api_server,
];

fn services_of_an_api_server_answer_and_follow_its_events(mode: Mode) {
    let node = bare(mode);
    let client = node.pod("client", 10);
    let _server = node.pod("one", 2).serving("TCP", 8080);
    let folder = tempfile::tempdir().unwrap();
    let lists = json!({
        "services": [service("web", spec("10.96.0.1", 30080))],
        "endpointslices": [endpoint("web", "10.66.0.2")],
        "nodes": [node_object()],
    });
    with_proxy(&node, lists, folder.path(), |world| {
        assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().client, client.v4);
        assert_eq!(node.outside.tcp(&format!("{NODE4}:30080")).unwrap().server, "one");

        // A new Service, then its endpoint.
        world.tell("services", "ADDED", service("two", spec("10.96.0.2", 30081)));
        world.tell("endpointslices", "ADDED", endpoint("two", "10.66.0.2"));
        eventually("a new Service", || client.namespace.tcp("10.96.0.2:80").ok());

        // Somebody flushes everything.
        damages(mode)[0].inflict(&node.namespace);
        if mode == Mode::Ebpf {
            // Programs whose pins are gone work for a moment yet.
            let link = node.config.ebpf.pins.join("links/connect4");
            eventually("the links are there again", || link.exists().then_some(()));
        }
        eventually("mended", || client.namespace.tcp("10.96.0.1:80").ok());

        let health = node.namespace.get("127.0.0.1:10256", "/healthz");
        assert!(health.contains("\"nodeEligible\":true"), "{health}");
        assert!(node.namespace.get("127.0.0.1:10256", "/livez").starts_with("HTTP/1.1 200"));
        let proxy_mode = node.namespace.get("127.0.0.1:10249", "/proxyMode");
        let (_, shown) = proxy_mode.split_once("\r\n\r\n").unwrap();
        assert!(!shown.is_empty() && mode.name().starts_with(shown), "{proxy_mode}");
        let configz = node.namespace.get("127.0.0.1:10249", "/configz");
        assert!(configz.contains("\"clusterCIDR\":\"10.66.0.0/16\""), "{configz}");
        let metrics = node.namespace.get("127.0.0.1:10249", "/metrics");
        for name in [
            "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}",
            "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 1",
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "keelson_proxy_repairs_total",
        ] {
            assert!(metrics.contains(name), "{name} is not in {metrics}");
        }
    });
    // The proxy is gone, the Services are not.
    assert_eq!(client.namespace.tcp("10.96.0.2:80").unwrap().server, "one");
}

/// Rows 18 and 19, cases 14 and 16.
fn load_balancers_learn_whether_endpoints_are_here(mode: Mode) {
    let node = bare(mode);
    let folder = tempfile::tempdir().unwrap();
    let balanced = with(
        spec("10.96.0.1", 30080),
        json!({
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
        }),
    );
    let lists = json!({
        "services": [service("web", balanced)],
        "endpointslices": [endpoint("web", "10.66.0.2")],
        "nodes": [node_object()],
    });
    with_proxy(&node, lists, folder.path(), |world| {
        let ask = || {
            let at = format!("{NODE4}:32000");
            node.outside.try_get(&at, "/").unwrap_or_default()
        };
        let text = eventually("the health check answers", || {
            Some(ask()).filter(|text| text.starts_with("HTTP/1.1 200"))
        });
        let lower = text.to_lowercase();
        assert!(lower.contains("x-load-balancing-endpoint-weight: 1"), "{text}");
        assert!(lower.contains("content-type: application/json"), "{text}");
        let body: Value = serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap();
        let wanted = json!({
            "service": {"namespace": "default", "name": "web"},
            "localEndpoints": 1, "serviceProxyHealthy": true,
        });
        assert_eq!(body, wanted);
        // Traffic is still served, but nothing new shall be sent here.
        let mut going = endpoint("web", "10.66.0.2");
        going["endpoints"][0]["conditions"] =
            json!({"ready": false, "serving": true, "terminating": true});
        world.tell("endpointslices", "MODIFIED", going);
        eventually("no endpoint is ready here", || {
            Some(ask()).filter(|text| {
                text.starts_with("HTTP/1.1 503") && text.contains("\"localEndpoints\": 0")
            })
        });
        world.tell("services", "MODIFIED", service("web", spec("10.96.0.1", 30080)));
        eventually("the port is closed", || ask().is_empty().then_some(()));
    });
}

/// Rows 18 and 31.
fn health_checks_are_answered_where_node_ports_are(mode: Mode) {
    let node = bare(mode);
    let second = "203.0.113.3";
    node.namespace.address("eth0", &format!("{second}/24"));
    let balanced = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
    });
    let lists = json!({
        "services": [service("web", with(spec("10.96.0.1", 30080), balanced))],
        "endpointslices": [endpoint("web", "10.66.0.2")],
        "nodes": [node_object()],
    });
    let answers = |at: &str| {
        node.outside.try_get(&format!("{at}:32000"), "/").is_ok_and(|text| text.contains("200 OK"))
    };
    let folder = tempfile::tempdir().unwrap();
    with_proxy(&node, lists.clone(), folder.path(), |world| {
        eventually("the node's address answers", || answers(NODE4).then_some(()));
        assert!(!answers(second));
        // The Node object tells another address.
        let mut moved = node_object();
        moved["status"]["addresses"][0]["address"] = json!(second);
        world.tell("nodes", "MODIFIED", moved);
        eventually("the new address answers", || answers(second).then_some(()));
        eventually("the old one does not", || (!answers(NODE4)).then_some(()));
    });
    let ranges = NodePortAddresses::Ranges(vec!["203.0.113.0/28".parse().unwrap()]);
    let configure = |config| ProxyConfig { node_port_addresses: ranges, ..config };
    with_configured_proxy(&node, lists, folder.path(), configure, |_| {
        eventually("both answer", || (answers(NODE4) && answers(second)).then_some(()));
        assert!(node.namespace.try_get("127.0.0.1:32000", "/").is_err());
        let late = "203.0.113.4";
        assert!(!answers(late));
        node.namespace.address("eth0", &format!("{late}/24"));
        eventually("an address that comes later answers", || answers(late).then_some(()));
    });
}

/// Rows 38 and 53.
fn the_node_object_and_service_ranges_are_followed(mode: Mode) {
    let node = bare(mode);
    let client = node.pod("client", 10);
    node.let_outside_have("10.96.0.9", "fd96::9");
    let folder = tempfile::tempdir().unwrap();
    let lists = json!({"services": [], "endpointslices": [], "nodes": [node_object()]});
    with_proxy(&node, lists, folder.path(), |world| {
        let health = || node.namespace.get("127.0.0.1:10256", "/healthz");
        assert!(health().starts_with("HTTP/1.1 200"));
        let mut tainted = node_object();
        tainted["spec"] = json!({"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]});
        world.tell("nodes", "MODIFIED", tainted);
        eventually("load balancers shall go", || {
            health().starts_with("HTTP/1.1 503").then_some(())
        });
        // The proxy itself is fine.
        assert!(node.namespace.get("127.0.0.1:10256", "/livez").starts_with("HTTP/1.1 200"));
        world.tell("nodes", "MODIFIED", node_object());
        eventually("all is well again", || health().starts_with("HTTP/1.1 200").then_some(()));

        let ranges = json!({
            "metadata": {"name": "kubernetes", "resourceVersion": "3"},
            "spec": {"cidrs": ["10.96.0.0/16"]},
        });
        assert_eq!(client.namespace.tcp("10.96.0.9:80"), Err(ErrorKind::ConnectionRefused));
        world.tell("servicecidrs", "ADDED", ranges);
        eventually("an unused address is silent", || {
            let silent = client.namespace.tcp("10.96.0.9:80") == Err(ErrorKind::TimedOut);
            silent.then_some(())
        });
    });
}

fn what_is_wrong_with_an_object_is_told_in_an_event(mode: Mode) {
    let node = bare(mode);
    let folder = tempfile::tempdir().unwrap();
    let lists = json!({
        "services": [service("web", spec("10.96.0.1", 30080))],
        "endpointslices": [],
        "nodes": [node_object()],
    });
    with_proxy(&node, lists, folder.path(), |world| {
        let mut late = service("late", spec("10.96.0.2", 30080));
        late["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        world.tell("services", "ADDED", late);
        let event = eventually("an event about the conflict", || {
            let (kind, object) = world.posted.try_recv().ok()?;
            (kind == "posted").then_some(object)
        });
        assert_eq!(event["regarding"]["name"], "late");
        let note = event["note"].as_str().unwrap();
        assert!(note.contains("node port 30080/tcp is also asked for by default/web"), "{note}");
        let metrics = node.namespace.get("127.0.0.1:10249", "/metrics");
        assert!(metrics.contains("keelson_proxy_left_out_total 1"), "{metrics}");
    });
}

fn what_happened_in_a_gap_of_the_watch_is_not_lost(mode: Mode) {
    let node = bare(mode);
    let client = node.pod("client", 10);
    let _server = node.pod("one", 2).serving("TCP", 8080);
    let folder = tempfile::tempdir().unwrap();
    let lists = |name: &str, address: &str| {
        json!({
            "services": [service(name, spec(address, 30080)), service("kept", spec("10.96.0.9", 30081))],
            "endpointslices": [endpoint(name, "10.66.0.2"), endpoint("kept", "10.66.0.2")],
            "nodes": [node_object()],
        })
    };
    with_proxy(&node, lists("old", "10.96.0.1"), folder.path(), |world| {
        assert!(client.namespace.tcp("10.96.0.1:80").is_ok());
        // One Service went and another one came while nobody looked; both want the same node port.
        world.api.send(("gap".to_owned(), lists("new", "10.96.0.2"))).unwrap();
        eventually("the new Service", || {
            // The one that stayed is served all the time.
            assert!(client.namespace.tcp("10.96.0.9:80").is_ok());
            client.namespace.tcp("10.96.0.2:80").ok()
        });
        eventually("the old one is gone", || client.namespace.tcp("10.96.0.1:80").err());
        assert!(node.outside.tcp(&format!("{NODE4}:30080")).is_ok());
    });
}

/// Rows 32 and 33.
fn node_ports_answer_on_both_loopback_addresses(mode: Mode) {
    let node = bare(mode);
    let _server = node.pod("one", 2).serving("TCP", 8080).serving("UDP", 8080);
    let folder = tempfile::tempdir().unwrap();
    let both_families =
        json!({"clusterIPs": ["10.96.0.1", "fd96::1"], "ipFamilies": ["IPv4", "IPv6"]});
    let spec = with(spec("10.96.0.1", 30080), both_families);
    let dns = json!({
        "type": "NodePort", "clusterIP": "fd96::2", "clusterIPs": ["fd96::2"],
        "ports": [{"port": 53, "nodePort": 30053, "protocol": "UDP"}],
    });
    let six = |service: &str, protocol: &str| {
        let mut six = endpoint(service, "fd66::2");
        six["metadata"]["name"] = json!(format!("{service}-6"));
        six["addressType"] = json!("IPv6");
        six["ports"][0]["protocol"] = json!(protocol);
        six
    };
    let mut both = node_object();
    both["status"]["addresses"] = json!([
        {"type": "InternalIP", "address": NODE4}, {"type": "InternalIP", "address": NODE6},
    ]);
    let lists = json!({
        "services": [service("web", spec), service("dns", dns)],
        "endpointslices": [endpoint("web", "10.66.0.2"), six("web", "TCP"), six("dns", "UDP")],
        "nodes": [both],
    });
    with_proxy(&node, lists, folder.path(), |world| {
        assert_eq!(node.namespace.tcp("127.0.0.1:30080").unwrap().server, "one");
        let answer = eventually("::1 answers", || node.namespace.tcp("[::1]:30080").ok());
        assert_eq!(answer.server, "one");
        eventually("::1 answers datagrams", || node.namespace.udp("[::1]:30053").ok());
        // Two clients at a time, each of which keeps its port.
        let sockets = [(); 2].map(|()| node.namespace.udp_socket("[::1]:30053"));
        for socket in sockets.iter().chain(&sockets) {
            assert_eq!(udp_exchange(socket, silence()).unwrap().server, "one");
        }
        world.tell("services", "DELETED", service("web", json!({})));
        eventually("nobody listens on ::1", || {
            let refused = Err(ErrorKind::ConnectionRefused);
            (node.namespace.tcp("[::1]:30080") == refused).then_some(())
        });
    });
}

fn explain_tells_what_is_programmed_and_why(mode: Mode) {
    let node = bare(mode);
    let folder = tempfile::tempdir().unwrap();
    let mut unready = endpoint("web", "10.66.0.3");
    unready["metadata"]["name"] = json!("web-y");
    unready["endpoints"][0]["conditions"] = json!({"ready": false});
    let lists = json!({
        "services": [service("web", spec("10.96.0.1", 30080))],
        "endpointslices": [endpoint("web", "10.66.0.2"), unready],
        "nodes": [node_object()],
    });
    with_proxy(&node, lists, folder.path(), |_| {
        let config = config(
            mode,
            node.config.ebpf.clone(),
            &folder.path().join("kubeconfig"),
            folder.path(),
        );
        let ask = |what: &str, from: Option<&str>| {
            let from = from.map(|from| from.parse().unwrap());
            let (what, protocol) = (what.to_owned(), "tcp".to_owned());
            let question = Question { what, from, protocol };
            let answer = node.namespace.run(|| {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(explain(&config, &question))
            });
            answer.map_err(|error| format!("{error:#}"))
        };
        let text = ask("default/web", None).unwrap();
        for part in [
            "10.66.0.2:8080           here used: ready",
            "10.66.0.3:8080           here left out: not ready",
            "has exactly that",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        let text = ask(&format!("{NODE4}:30080"), Some(OUTSIDE4)).unwrap();
        assert!(text.contains("=> forwarded, source replaced by the node's"), "{text}");
        let error = ask("default/nobody", None).unwrap_err();
        assert!(error.contains("there is no Service default/nobody"), "{error}");
    });
}

/// Row 57.
fn a_start_ends_the_mode_that_the_node_was_in(mode: Mode) {
    let Some(before) = crate::harness::backends().0.into_iter().find(|other| *other != mode) else {
        skip("this is the only mode here")
    };
    let mut node = Node::new(before);
    let client = node.pod("client", 10);
    let _server = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    (node.backend, node.mode) = (None, mode);
    let folder = tempfile::tempdir().unwrap();
    let lists = json!({
        "services": [service("web", spec("10.96.0.1", 30080))],
        "endpointslices": [endpoint("web", "10.66.0.2")],
        "nodes": [node_object()],
    });
    with_proxy(&node, lists, folder.path(), |_| {
        eventually("nothing of the mode before", || {
            assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().server, "one");
            crate::switching::is_clean(before, &node).then_some(())
        });
        let shown = node.namespace.get("127.0.0.1:10249", "/proxyMode");
        assert!(shown.ends_with(mode.kube_name()), "{shown}");
    });
}

fn after_a_reboot_the_last_known_services_answer_without_an_api_server(mode: Mode) {
    let node = bare(mode);
    let client = node.pod("client", 10);
    let _server = node.pod("one", 2).serving("TCP", 8080);
    let folder = tempfile::tempdir().unwrap();
    let lists = json!({
        "services": [service("web", spec("10.96.0.1", 30080))],
        "endpointslices": [endpoint("web", "10.66.0.2")],
        "nodes": [node_object()],
    });
    with_proxy(&node, lists, folder.path(), |_| {});
    // The kernel forgets, and it is another boot.
    let mut backend = node.namespace.run(|| mode.open(node.config.clone()).unwrap());
    backend.cleanup().unwrap();
    drop(backend);
    assert!(client.namespace.tcp("10.96.0.1:80").is_err());
    let path = folder.path().join("last-known.json");
    let state = std::fs::read_to_string(&path).unwrap();
    let (first, rest) = state.split_once('\n').unwrap();
    let mut whose: Value = serde_json::from_str(first).unwrap();
    whose["boot"] = json!("an earlier one");
    std::fs::write(&path, format!("{whose}\n{rest}")).unwrap();

    let shutdown = CancellationToken::new();
    std::thread::scope(|scope| {
        let stop_inside = shutdown.clone();
        // Nobody listens there.
        let config =
            config(mode, node.config.ebpf.clone(), &kubeconfig(folder.path(), 9), folder.path());
        let namespace = &node.namespace;
        scope.spawn(move || {
            namespace.run(|| {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(keelson_proxy::run(config, stop_inside)).unwrap();
            });
        });
        let _stop = shutdown.drop_guard();
        let answer =
            eventually("the last known Service", || client.namespace.tcp("10.96.0.1:80").ok());
        assert_eq!(answer.client, client.v4);
    });
}
