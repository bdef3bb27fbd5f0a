//! Mode ebpf: direct server return. The host outside asks one node, the endpoints are on another one.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use keelson_proxy::ebpf::{EbpfConfig, Forwarding, XdpChoice};
use serde_json::json;

use crate::stage::*;
use crate::transfer::both_ways;
use crate::world::eventually;

rows![
    endpoints_on_other_nodes_see_the_client_and_answer_by_themselves,
    bulk_data_comes_back_past_the_node_that_was_asked,
    datagrams_are_masqueraded_in_mode_hybrid,
    who_is_not_from_outside_is_masqueraded,
    long_datagrams_become_shorter,
    restarts_of_both_proxies_end_no_connection,
    connections_stay_where_they_were_when_the_setting_changes,
    an_endpoint_that_goes_keeps_its_connections_and_datagrams_move,
];

/// Only a failure takes so long.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the second node's pods see of masqueraded clients.
const FIRST_NODE: [&str; 2] = ["10.99.0.1", "fd99::1"];

/// The node that is asked, and the one with the endpoints.
struct Nodes {
    asked: Node,
    other: Node,
}

impl Nodes {
    fn new(mode: Mode, ebpf: EbpfConfig) -> Self {
        if mode != Mode::Ebpf {
            skip("this is about eBPF");
        }
        let ranges = ["10.66.0.0/16", "fd66::/48"].map(|range| range.parse().unwrap());
        let pods = PodSources::Ranges(ranges.to_vec());
        let asked = Node::with(mode, BackendConfig { ebpf, pods, ..BackendConfig::default() });
        let other = Node::second(&asked, &[7, 8]);
        let mut nodes = Nodes { asked, other };
        for (protocol, last) in [("TCP", 1), ("UDP", 2)] {
            let service = node_port(cluster_ip(last, protocol, 80), 30080);
            let external = json!({"externalIPs": [format!("198.51.100.{last}")]});
            for node in nodes.both() {
                node.service(name(protocol), with(service.clone(), external.clone()));
            }
            nodes.endpoints(protocol, &[7]);
        }
        nodes
    }

    fn with(mode: Mode, forwarding: Forwarding) -> Self {
        Nodes::new(mode, EbpfConfig { forwarding, ..EbpfConfig::default() })
    }

    fn both(&mut self) -> [&mut Node; 2] {
        [&mut self.asked, &mut self.other]
    }

    /// The second node's pods with these numbers.
    fn endpoints(&mut self, protocol: &str, pods: &[u8]) {
        for (node, place) in self.both().into_iter().zip(["there", "here"]) {
            let of: Vec<_> = pods.iter().map(|pod| (*pod, place, json!({"ready": true}))).collect();
            node.endpoints(name(protocol), protocol, 8080, &of);
            node.apply();
        }
    }

    /// Follows what is new, pods too.
    fn apply(&mut self) {
        for node in self.both() {
            node.apply();
        }
    }

    fn restart(&mut self, forwarding: Forwarding) {
        for node in self.both() {
            node.config.ebpf.forwarding = forwarding;
            node.restart();
            node.assert_as_planned();
        }
    }

    /// Who asks the first node from outside, and whom the endpoint sees.
    #[track_caller]
    fn asks(&self, protocol: &str, to: &str) -> (String, IpAddr) {
        let answer = self.asked.outside.ask(protocol, to).unwrap();
        (answer.server, answer.client)
    }

    /// A connection of the host outside to a node port, both ends.
    fn connect(&self, listener: &TcpListener, to: &str) -> (TcpStream, TcpStream) {
        let to: SocketAddr = to.parse().unwrap();
        let near = self.asked.outside.run(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
        let (far, _) = listener.accept().unwrap();
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
        }
        (near, far)
    }
}

fn name(protocol: &str) -> &'static str {
    if protocol == "TCP" { "web-tcp" } else { "web-udp" }
}

fn node_ports() -> [(String, IpAddr); 2] {
    let [outside4, outside6] = [OUTSIDE4, OUTSIDE6].map(|address| address.parse().unwrap());
    [(format!("{NODE4}:30080"), outside4), (format!("[{NODE6}]:30080"), outside6)]
}

fn listening(pod: &Pod) -> TcpListener {
    pod.namespace.run(|| TcpListener::bind("[::]:8080").unwrap())
}

/// Something said both ways.
#[track_caller]
fn talk((near, far): &mut (TcpStream, TcpStream)) {
    let (mut from, mut to) = (near, far);
    for _ in 0..2 {
        let mut buffer = [0; 4];
        from.write_all(b"ping").unwrap();
        to.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"ping");
        (from, to) = (to, from);
    }
}

fn endpoints_on_other_nodes_see_the_client_and_answer_by_themselves(mode: Mode) {
    let mut nodes = Nodes::with(mode, Forwarding::Dsr);
    let _pod = nodes.other.pod("one", 7).serving("TCP", 8080).serving("UDP", 8080);
    for (protocol, last) in [("TCP", 1), ("UDP", 2)] {
        let [v4, v6] = node_ports();
        let external = (format!("198.51.100.{last}:80"), v4.1);
        for (to, client) in [v4, v6, external] {
            // Again and again: each time a new connection, or what goes on with the last one.
            for _ in 0..3 {
                assert_eq!(
                    nodes.asks(protocol, &to),
                    ("one".to_owned(), client),
                    "{protocol} {to}"
                );
            }
        }
    }
    // Endpoints of the asked node itself see the client as well.
    let _here = nodes.asked.pod("here", 2).serving("TCP", 8080);
    nodes.asked.ready("web-tcp", "TCP", 8080, &[2]);
    nodes.asked.apply();
    for (to, client) in node_ports() {
        assert_eq!(nodes.asks("TCP", &to), ("here".to_owned(), client));
    }
}

/// Also where frames are forwarded at XDP: these are none of those.
fn bulk_data_comes_back_past_the_node_that_was_asked(mode: Mode) {
    const BULK: usize = 1 << 20;
    for xdp in [XdpChoice::Off, XdpChoice::Generic] {
        let forwarding = Forwarding::Dsr;
        let nodes = Nodes::new(mode, EbpfConfig { forwarding, xdp, ..EbpfConfig::default() });
        let pod = nodes.other.pod("one", 7);
        let listener = listening(&pod);
        for (to, client) in node_ports() {
            let before = nodes.asked.namespace.sent("eth0");
            let (near, far) = nodes.connect(&listener, &to);
            assert_eq!(far.peer_addr().unwrap().ip().to_canonical(), client);
            both_ways(near, far, BULK);
            // Neighbours are asked for, nothing else.
            let sent = nodes.asked.namespace.sent("eth0") - before;
            assert!(sent < 20, "{sent} packets left to the client by way of the node");
        }
    }
}

fn datagrams_are_masqueraded_in_mode_hybrid(mode: Mode) {
    let nodes = Nodes::with(mode, Forwarding::Hybrid);
    let _pod = nodes.other.pod("one", 7).serving("TCP", 8080).serving("UDP", 8080);
    for ((to, client), hidden) in node_ports().into_iter().zip(FIRST_NODE) {
        assert_eq!(nodes.asks("TCP", &to), ("one".to_owned(), client));
        assert_eq!(nodes.asks("UDP", &to), ("one".to_owned(), hidden.parse().unwrap()));
    }
}

fn who_is_not_from_outside_is_masqueraded(mode: Mode) {
    let mut nodes = Nodes::with(mode, Forwarding::Dsr);
    let _pod = nodes.other.pod("one", 7).serving("TCP", 8080).serving("UDP", 8080);
    let client = nodes.asked.pod("client", 10);
    nodes.apply();
    for protocol in ["TCP", "UDP"] {
        for ((to, _), hidden) in node_ports().into_iter().zip(FIRST_NODE) {
            for from in [&client.namespace, &nodes.asked.namespace] {
                let answer = from.ask(protocol, &to).unwrap();
                assert_eq!(answer.client.to_string(), hidden, "{protocol} {to}");
            }
        }
    }
    // Who asks for a ClusterIP from outside.
    let answer = nodes.asked.outside.ask("TCP", "10.96.0.1:80").unwrap();
    assert_eq!(answer.client.to_string(), FIRST_NODE[0]);
    // Nobody answers for Services where no node is.
    let slice = slice("web-tcp", "IPv4", &[], "", 8080);
    let stranger = json!([{"addresses": ["10.66.0.7"], "conditions": {"ready": true}}]);
    nodes.asked.endpoints("web-tcp", "TCP", 8080, &[]);
    nodes.asked.slice(with(slice, json!({"endpoints": stranger})));
    nodes.asked.apply();
    let answer = nodes.asked.outside.ask("TCP", &format!("{NODE4}:30080")).unwrap();
    assert_eq!(answer.client.to_string(), FIRST_NODE[0]);
}

/// What tells of the Service makes them longer than the way allows: the client hears of it.
fn long_datagrams_become_shorter(mode: Mode) {
    const MTU: usize = 1500;
    const UDP_HEADER: usize = 8;
    let nodes = Nodes::with(mode, Forwarding::Dsr);
    let pod = nodes.other.pod("one", 7).serving("UDP", 8080);
    for ((to, _), header) in node_ports().into_iter().zip([20, 40]) {
        let socket = nodes.asked.outside.udp_socket(&to);
        socket.set_read_timeout(Some(silence())).unwrap();
        let whole = vec![b'?'; MTU - header - UDP_HEADER];
        eventually("a long question is answered", || {
            // The kernel tells what it heard by refusing to send once.
            socket.send(&whole).ok()?;
            socket.recv(&mut [0; 200]).ok()
        });
    }
    drop(pod);
}

fn restarts_of_both_proxies_end_no_connection(mode: Mode) {
    let mut nodes = Nodes::with(mode, Forwarding::Dsr);
    let pod = nodes.other.pod("one", 7);
    let listener = listening(&pod);
    let mut open: Vec<_> =
        node_ports().iter().map(|(to, _)| nodes.connect(&listener, to)).collect();
    nodes.apply();
    for _ in 0..2 {
        open.iter_mut().for_each(talk);
        for node in nodes.both() {
            assert_eq!(node.restart(), 0);
            node.assert_as_planned();
        }
    }
    open.iter_mut().for_each(talk);
}

fn connections_stay_where_they_were_when_the_setting_changes(mode: Mode) {
    let mut nodes = Nodes::with(mode, Forwarding::Snat);
    let pod = nodes.other.pod("one", 7);
    let listener = listening(&pod);
    let mut open = Vec::new();
    for forwarding in [Forwarding::Snat, Forwarding::Dsr, Forwarding::Snat] {
        nodes.restart(forwarding);
        for ((to, client), hidden) in node_ports().into_iter().zip(FIRST_NODE) {
            let pair = nodes.connect(&listener, &to);
            let seen = pair.1.peer_addr().unwrap().ip().to_canonical();
            let hidden = hidden.parse().unwrap();
            assert_eq!(seen, if forwarding == Forwarding::Dsr { client } else { hidden });
            open.push(pair);
        }
        open.iter_mut().for_each(talk);
    }
}

fn an_endpoint_that_goes_keeps_its_connections_and_datagrams_move(mode: Mode) {
    let mut nodes = Nodes::with(mode, Forwarding::Dsr);
    let one = nodes.other.pod("one", 7).serving("UDP", 8080);
    let _two = nodes.other.pod("two", 8).serving("TCP", 8080).serving("UDP", 8080);
    let listener = listening(&one);
    for (to, client) in node_ports() {
        for protocol in ["TCP", "UDP"] {
            nodes.endpoints(protocol, &[7]);
        }
        let mut open = nodes.connect(&listener, &to);
        let socket = nodes.asked.outside.udp_socket(&to);
        assert_eq!(udp_exchange(&socket, silence()).unwrap().server, "one");
        for protocol in ["TCP", "UDP"] {
            nodes.endpoints(protocol, &[8]);
        }
        talk(&mut open);
        let answer = udp_exchange(&socket, silence()).unwrap();
        assert_eq!((answer.server, answer.client), ("two".to_owned(), client));
        assert_eq!(nodes.asks("TCP", &to), ("two".to_owned(), client));
        talk(&mut open);
    }
}
