//! What only the eBPF mode has.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;
use keelson_proxy::ebpf::{EbpfConfig, MonitorArgs, monitor};
use serde_json::json;

use crate::stage::*;
use crate::world::eventually;

rows![
    a_connection_of_a_pod_carries_the_endpoints_address,
    packets_alone_do_the_same,
    a_monitor_tells_what_becomes_of_packets,
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

/// Without the socket layer: what virtual machines, raw sockets and old kernels get.
fn packets_alone_do_the_same(mode: Mode) {
    only_ebpf(mode);
    let ebpf = EbpfConfig { sockets: false, ..EbpfConfig::default() };
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

/// Arguments as a user gives them.
#[derive(Parser)]
struct Line {
    #[command(flatten)]
    monitor: MonitorArgs,
}

fn a_monitor_tells_what_becomes_of_packets(mode: Mode) {
    only_ebpf(mode);
    let mut node = Node::new(mode);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.service("empty", node_port(cluster_ip(2, "TCP", 80), 30081));
    let closed = with(
        cluster_ip(3, "TCP", 80),
        json!({
            "type": "LoadBalancer", "loadBalancerSourceRanges": ["192.0.2.0/24"],
        }),
    );
    node.service_object(json!({
        "metadata": {"namespace": "default", "name": "closed"},
        "spec": closed,
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.2"}]}},
    }));
    node.ready("closed", "TCP", 8080, &[2]);
    node.apply();
    let (stop, written) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        let config = &node.config.ebpf;
        let watching = scope.spawn(|| {
            let line = Line::parse_from(["monitor", "--rate", "100"]);
            let mut out = Shared(&written);
            monitor(config, &line.monitor, &mut out, || stop.load(Ordering::Relaxed)).unwrap();
        });
        let said =
            |part: &str| String::from_utf8(written.lock().unwrap().clone()).unwrap().contains(part);
        for (to, wanted) in [
            (format!("{NODE4}:30080"), "203.0.113.2:30080 goes to 10.66.0.2:8080 (arriving"),
            (format!("{NODE4}:30081"), "203.0.113.2:30081 refused: nobody is there"),
            ("198.51.100.2:80".to_owned(), "dropped: loadBalancerSourceRanges keep the client out"),
        ] {
            eventually(wanted, || {
                drop(node.outside.tcp(&to));
                said(wanted).then_some(())
            });
        }
        assert!(said("speaks from 10.66.0.1:"));
        stop.store(true, Ordering::Relaxed);
        watching.join().unwrap();
    });
    // Nobody listens any more, and nothing differs from a node where nobody did.
    node.assert_as_planned();
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
