//! What only the eBPF mode has.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use aya::maps::{Array, Map, MapData};
use clap::Parser;
use keelson_ebpf_abi::{WATCH_ALL, WATCH_NOTHING};
use keelson_proxy::backend::Traffic;
use keelson_proxy::ebpf::{Algorithm, EbpfConfig, MonitorArgs, Sockets, monitor};
use keelson_proxy::model::ServiceKey;
use serde_json::json;

use crate::stage::*;
use crate::world::{bare, endpoint, eventually, explained, node_object, service, spec, with_proxy};

rows![
    a_connection_of_a_pod_carries_the_endpoints_address,
    packets_alone_do_the_same,
    every_node_chooses_the_same_endpoint_for_a_client,
    a_monitor_tells_what_becomes_of_connections,
    traffic_of_a_service_is_counted_and_never_less_while_it_is_there,
    metrics_and_explanations_show_the_traffic_of_services,
    an_exempt_namespace_is_served_by_packets,
    sockets_of_pods_can_be_left_to_packets,
];

fn only_ebpf(mode: Mode) {
    if mode != Mode::Ebpf {
        skip("this is about eBPF");
    }
}

fn a_connection_of_a_pod_carries_the_endpoints_address(mode: Mode) {
    only_ebpf(mode);
    let mut node = Node::new(mode);
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let listener = server.namespace.run(|| TcpListener::bind("[::]:8080").unwrap());
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    for to in ["10.96.0.1:80", "[fd96::1]:80"] {
        let to: SocketAddr = to.parse().unwrap();
        let wire = client.namespace.tcp_wire();
        let stream = client.namespace.run(|| TcpStream::connect(to).unwrap());
        let (_accepted, _) = listener.accept().unwrap();
        // The program sees the Service, the wire does not.
        assert_eq!(stream.peer_addr().unwrap(), to);
        if to.is_ipv4() {
            assert!(wire.next_from([10, 66, 0, 2]).is_some());
        }
    }
}

/// Case 59. Without the socket layer: what virtual machines, raw sockets and old kernels get.
fn packets_alone_do_the_same(mode: Mode) {
    only_ebpf(mode);
    let ebpf = EbpfConfig { sockets: Sockets::None, ..EbpfConfig::default() };
    let pods =
        PodSources::Ranges(vec!["10.66.0.0/16".parse().unwrap(), "fd66::/48".parse().unwrap()]);
    let mut node = Node::with(mode, BackendConfig { ebpf, pods, ..BackendConfig::default() });
    // A client outside that keeps its address must get its answers.
    node.outside.route("10.66.0.0/24", NODE4);
    node.outside.route("fd66::/64", NODE6);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080).serving("UDP", 8080);
    for (protocol, last) in [("TCP", 1), ("UDP", 2)] {
        let name = format!("web-{}", protocol.to_lowercase());
        node.service(&name, node_port(cluster_ip(last, protocol, 80), 30080));
        node.ready(&name, protocol, 8080, &[2]);
        node.apply();
        let targets = [
            format!("10.96.0.{last}:80"),
            format!("[fd96::{last}]:80"),
            format!("{NODE4}:30080"),
            format!("[{NODE6}]:30080"),
        ];
        for (index, to) in targets.iter().enumerate() {
            let answer = client.namespace.ask(protocol, to).unwrap();
            let kept = [client.v4, client.v6].contains(&answer.client);
            assert_eq!(kept, index < 2, "{protocol} {to}: {answer:?}");
            assert_eq!(node.outside.ask(protocol, to).unwrap().server, "one", "{protocol} {to}");
            // An address of its own leads to itself and to nobody else.
            if index < 2 {
                let answer = node.namespace.ask(protocol, to);
                assert_eq!(answer.map(|a| a.server), Ok("one".to_owned()), "{protocol} {to}");
            }
        }
        node.ready(&name, protocol, 8080, &[]);
        node.apply();
        for to in &targets {
            let answer = client.namespace.ask(protocol, to);
            assert_eq!(answer, Err(ErrorKind::ConnectionRefused), "{protocol} {to}");
        }
    }
}

/// With `--ebpf-algorithm maglev`. Who was there before does not matter.
fn every_node_chooses_the_same_endpoint_for_a_client(mode: Mode) {
    only_ebpf(mode);
    let chosen = [&[][..], &[9], &[1]].map(|before| {
        let ebpf = EbpfConfig { algorithm: Algorithm::Maglev, ..EbpfConfig::default() };
        let pods = PodSources::Ranges(vec!["10.66.0.0/16".parse().unwrap()]);
        let mut node = Node::with(mode, BackendConfig { ebpf, pods, ..BackendConfig::default() });
        let pods = [("one", 2), ("two", 3), ("three", 4)];
        let _pods = pods.map(|(name, number)| node.pod(name, number).serving("UDP", 8080));
        node.service("web", node_port(cluster_ip(1, "UDP", 80), 30080));
        for ready in [before, &[2, 3, 4]] {
            node.ready("web", "UDP", 8080, ready);
            node.apply();
        }
        node.assert_as_planned();
        assert_eq!(node.restart(), 0);
        let servers: Vec<String> = (0..20)
            .map(|number| {
                let at = (OUTSIDE4, 40_000 + number);
                let client = node.outside.run(|| std::net::UdpSocket::bind(at).unwrap());
                client.connect((NODE4, 30080)).unwrap();
                udp_exchange(&client, silence()).unwrap().server
            })
            .collect();
        servers
    });
    assert_eq!(chosen[0], chosen[1]);
    assert_eq!(chosen[0], chosen[2]);
    for name in ["one", "two", "three"] {
        assert!(chosen[0].iter().any(|server| server == name), "{:?}", chosen[0]);
    }
}

/// Arguments as a user gives them.
#[derive(Parser)]
struct Line {
    #[command(flatten)]
    monitor: MonitorArgs,
}

/// A monitor on the node, and what it has written.
fn watching(node: &Node, line: &str, work: impl FnOnce(&dyn Fn(&str) -> bool)) -> String {
    let (stop, written) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let text = || String::from_utf8(written.lock().unwrap().clone()).unwrap();
    std::thread::scope(|scope| {
        let (config, namespace) = (&node.config.ebpf, &node.namespace);
        let watching = scope.spawn(|| {
            let line = Line::parse_from(["monitor"].into_iter().chain(line.split_whitespace()));
            let mut out = Shared(&written);
            let proxy = Some("127.0.0.1:10249".parse().unwrap());
            let stop = || stop.load(Ordering::Relaxed);
            namespace.run(|| monitor(config, proxy, &line.monitor, &mut out, stop)).unwrap();
        });
        // Also when an assertion fails.
        let ended = scopeguard(|| stop.store(true, Ordering::Relaxed));
        work(&|part| text().contains(part));
        drop(ended);
        watching.join().unwrap();
    });
    text()
}

/// Runs something when it is dropped.
fn scopeguard(work: impl FnMut()) -> impl Drop {
    struct Guard<F: FnMut()>(F);
    impl<F: FnMut()> Drop for Guard<F> {
        fn drop(&mut self) {
            self.0();
        }
    }
    Guard(work)
}

fn a_monitor_tells_what_becomes_of_connections(mode: Mode) {
    only_ebpf(mode);
    let node = bare(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let closed = json!({
        "metadata": {"namespace": "default", "name": "closed", "resourceVersion": "2"},
        "spec": with(spec("10.96.0.3", 30082), json!({
            "type": "LoadBalancer", "loadBalancerSourceRanges": ["192.0.2.0/24"],
        })),
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.2"}]}},
    });
    let lists = json!({
        "services": [
            service("web", spec("10.96.0.1", 30080)), service("empty", spec("10.96.0.2", 30081)), closed,
        ],
        "endpointslices": [endpoint("web", "10.66.0.2"), endpoint("closed", "10.66.0.2")],
        "nodes": [node_object()],
    });
    let folder = tempfile::tempdir().unwrap();
    with_proxy(&node, lists, folder.path(), |_| {
        let outside = |to: &str| drop(node.outside.tcp(to));
        let inside = |to: &str| drop(client.namespace.tcp(to));
        let all = watching(&node, "--rate 100", |said| {
            let expect = |wanted: &str, ask: &dyn Fn()| {
                eventually(wanted, || {
                    ask();
                    said(wanted).then_some(())
                });
            };
            let node_port = |port: u16| move || outside(&format!("{NODE4}:{port}"));
            expect(
                "203.0.113.2:30080 [default/web] goes to 10.66.0.2:8080 (arriving at eth0)",
                &node_port(30080),
            );
            expect("203.0.113.2:30081 [default/empty] refused: nobody is there", &node_port(30081));
            expect(
                "[default/closed] dropped: loadBalancerSourceRanges keep the client out",
                &|| outside("198.51.100.2:80"),
            );
            let connects =
                "tcp 10.66.0.10 -> 10.96.0.1:80 [default/web] goes to 10.66.0.2:8080 (connect)";
            expect(connects, &|| inside("10.96.0.1:80"));
            // The Service is told also where it has no such port: by the socket, or before Linux 6.1 by the packet.
            let refused = "-> 10.96.0.1:81 [default/web] refused: nobody is there";
            eventually(refused, || {
                inside("10.96.0.1:81");
                let told = |how: &str| said(&format!("{refused} ({how}"));
                (told("connect)") || told("arriving at pod10)")).then_some(())
            });
            expect("tcp node -> 10.96.0.1:80 [default/web] goes to", &|| {
                drop(node.namespace.tcp("10.96.0.1:80"));
            });
        });
        assert!(all.contains("[default/web] speaks from 10.66.0.1:"), "{all}");

        let drops = watching(&node, "--drops --service default/closed -o json", |said| {
            eventually("a drop", || {
                outside(&format!("{NODE4}:30080"));
                outside(&format!("{NODE4}:30081"));
                outside("198.51.100.2:80");
                said("closed").then_some(())
            });
        });
        for line in drops.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["event"], "dropped", "{line}");
            assert_eq!(line["reason"], "source_ranges", "{line}");
            assert_eq!(line["service"], "default/closed", "{line}");
            assert_eq!(line["destination"], "198.51.100.2:80", "{line}");
        }

        // More than one would take each other's events away; and who is killed cannot say so.
        watching(&node, "", |_| {
            let busy = eventually("another one", || {
                let never = || true;
                let line = Line::parse_from(["monitor"]);
                monitor(&node.config.ebpf, None, &line.monitor, &mut std::io::sink(), never).err()
            });
            assert!(format!("{busy:#}").contains("another monitor is running"), "{busy:#}");
        });
        let folders = std::fs::read_dir(&node.config.ebpf.pins).unwrap().flatten();
        let maps = folders.map(|folder| folder.path()).find(|path| path.join("watched").exists());
        let watched = MapData::from_pin(maps.unwrap().join("watched")).unwrap();
        let mut watched: Array<_, u32> = Array::try_from(Map::Array(watched)).unwrap();
        assert_eq!(watched.get(&0, 0).unwrap(), WATCH_NOTHING);
        watched.set(0, WATCH_ALL, 0).unwrap();
        eventually("the proxy sees that nobody watches", || {
            (watched.get(&0, 0).unwrap() == WATCH_NOTHING).then_some(())
        });
    });
}

fn traffic_of_a_service_is_counted_and_never_less_while_it_is_there(mode: Mode) {
    only_ebpf(mode);
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let web = node_port(cluster_ip(1, "TCP", 80), 30080);
    node.service("web", web.clone());
    node.ready("web", "TCP", 8080, &[2]);
    node.service("empty", cluster_ip(2, "TCP", 80));
    node.apply();
    let traffic = |node: &Node, name: &str| {
        let counted = node.backend.as_ref().unwrap().counting().unwrap().read().unwrap();
        let key = ServiceKey::new("default", name);
        let mine: Vec<_> = counted.ports.into_iter().filter(|port| port.service == key).collect();
        assert!(mine.len() < 2, "{mine:?}");
        mine.first().map(|port| port.traffic)
    };
    assert_eq!(traffic(&node, "web"), None);

    // A connection of a socket is seen, its packets are not.
    client.namespace.tcp("10.96.0.1:80").unwrap();
    client.namespace.tcp("[fd96::1]:80").unwrap();
    let sockets = Traffic { connections: 2, ..Traffic::default() };
    assert_eq!(traffic(&node, "web"), Some(sockets));
    assert!(client.namespace.tcp("10.96.0.2:80").is_err());
    assert_eq!(traffic(&node, "empty"), Some(Traffic { refused: 1, ..Traffic::default() }));

    // From outside everything is.
    node.outside.tcp(&format!("{NODE4}:30080")).unwrap();
    let both = traffic(&node, "web").unwrap();
    assert_eq!(both.connections, 3);
    assert!(both.packets >= 8 && both.bytes >= 40 * both.packets, "{both:?}");

    // It goes on with other addresses, another process, and after damage.
    node.service("web", with(web, json!({"externalIPs": ["198.51.100.1"]})));
    node.apply();
    node.outside.tcp("198.51.100.1:80").unwrap();
    let external = traffic(&node, "web").unwrap();
    assert_eq!(external.connections, 4);
    assert!(external.packets > both.packets);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.apply();
    assert_eq!(traffic(&node, "web").unwrap(), external);
    assert_eq!(node.restart(), 0);
    assert_eq!(traffic(&node, "web").unwrap(), external);
    node.adopt();
    assert_eq!(traffic(&node, "web").unwrap(), external);

    // And ends with the Service, whoever removes it.
    node.delete_service("web");
    node.apply();
    assert_eq!(traffic(&node, "web"), None);
    node.backend = None;
    node.delete_service("empty");
    node.restart();
    assert_eq!(traffic(&node, "empty"), None);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.apply();
    assert_eq!(traffic(&node, "web"), None);
}

fn metrics_and_explanations_show_the_traffic_of_services(mode: Mode) {
    only_ebpf(mode);
    let node = bare(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let lists = json!({
        "services": [
            service("web", spec("10.96.0.1", 30080)), service("idle", spec("10.96.0.2", 30081)),
        ],
        "endpointslices": [endpoint("web", "10.66.0.2")],
        "nodes": [node_object()],
    });
    let folder = tempfile::tempdir().unwrap();
    with_proxy(&node, lists, folder.path(), |_| {
        client.namespace.tcp("10.96.0.1:80").unwrap();
        node.outside.tcp(&format!("{NODE4}:30080")).unwrap();
        let text = node.namespace.get("127.0.0.1:10249", "/metrics");
        let label = r#"{namespace="default",service="web",port="",protocol="TCP"}"#;
        for wanted in [
            format!("keelson_proxy_service_connections_total{label} 2\n"),
            format!("keelson_proxy_service_refused_total{label} 0\n"),
            format!("keelson_proxy_service_packets_total{label} "),
            format!("keelson_proxy_service_bytes_total{label} "),
            "keelson_proxy_dropped_packets_total{reason=\"source_ranges\"} 0\n".to_owned(),
            "keelson_proxy_service_ports_omitted 0\n".to_owned(),
        ] {
            assert!(text.contains(&wanted), "{wanted} is not in {text}");
        }
        assert!(!text.contains("idle"), "{text}");
        assert_eq!(text.matches("# EOF").count(), 1);

        let explained = explained(&node, folder.path(), "default/web");
        for wanted in ["2 connections and 0 refused", "all endpoints: pool ", "0: 10.66.0.2:8080"] {
            assert!(explained.contains(wanted), "{wanted} is not in {explained}");
        }
    });
}

/// A server, and how a client's connection to a Service looks on the client's wire: whether it carries the address of
/// the Service.
struct OnTheWire {
    node: Node,
    client: Pod,
    listener: TcpListener,
    _server: Pod,
}

impl OnTheWire {
    fn with(mode: Mode, ebpf: EbpfConfig) -> Self {
        let pods = PodSources::Ranges(vec!["10.66.0.0/16".parse().unwrap()]);
        let mut node = Node::with(mode, BackendConfig { ebpf, pods, ..BackendConfig::default() });
        let (client, server) = (node.pod("client", 10), node.pod("server", 2));
        let listener = server.namespace.run(|| TcpListener::bind("[::]:8080").unwrap());
        node.service("web", cluster_ip(1, "TCP", 80));
        node.ready("web", "TCP", 8080, &[2]);
        node.apply();
        OnTheWire { node, client, listener, _server: server }
    }

    fn carries_the_service(&self) -> bool {
        let to: SocketAddr = "10.96.0.1:80".parse().unwrap();
        let wire = self.client.namespace.tcp_wire();
        let stream = self.client.namespace.run(|| TcpStream::connect(to).unwrap());
        let (_accepted, _) = self.listener.accept().unwrap();
        assert_eq!(stream.peer_addr().unwrap(), to);
        match wire.sender_to(stream.local_addr().unwrap().port()) {
            [10, 96, 0, 1] => true,
            [10, 66, 0, 2] => false,
            other => panic!("an answer from {other:?}"),
        }
    }

    fn follow(&mut self) {
        self.node.backend.as_mut().unwrap().disturbed().unwrap();
        self.node.assert_as_planned();
    }
}

fn an_exempt_namespace_is_served_by_packets(mode: Mode) {
    only_ebpf(mode);
    let base = tempfile::tempdir().unwrap();
    let exempt = base.path().join("exempt");
    let mut on =
        OnTheWire::with(mode, EbpfConfig { exempt: exempt.clone(), ..EbpfConfig::default() });
    assert!(!on.carries_the_service());
    std::fs::create_dir(&exempt).unwrap();
    let link = exempt.join("client");
    std::os::unix::fs::symlink(on.client.namespace.link(), &link).unwrap();
    on.follow();
    assert!(on.carries_the_service());
    // Also by the next process, which finds it so.
    assert_eq!(on.node.restart(), 0);
    assert!(on.carries_the_service());
    // Which finds as well what went while there was none.
    on.node.backend = None;
    std::fs::remove_file(&link).unwrap();
    assert!(on.carries_the_service());
    assert!(on.node.restart() > 0);
    assert!(!on.carries_the_service());
}

fn sockets_of_pods_can_be_left_to_packets(mode: Mode) {
    only_ebpf(mode);
    let on = OnTheWire::with(mode, EbpfConfig { sockets: Sockets::Node, ..EbpfConfig::default() });
    assert!(on.carries_the_service());
    // The node's own sockets are served: such a connection was never one of packets.
    let traffic = || {
        let counted = on.node.backend.as_ref().unwrap().counting().unwrap().read().unwrap();
        counted.ports[0].traffic
    };
    let before = traffic();
    drop(on.node.namespace.run(|| TcpStream::connect("10.96.0.1:80").unwrap()));
    let after = traffic();
    assert_eq!(after.connections, before.connections + 1);
    assert_eq!(after.packets, before.packets);
}

struct Shared<'w>(&'w Mutex<Vec<u8>>);

impl std::io::Write for Shared<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
