//! A node with pods and an outside host, each in a network namespace of the test's own.
#![allow(dead_code, unreachable_pub, reason = "every test file uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

pub mod api;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use keelson_proxy::backend::Backend;
use keelson_proxy::conntrack::{Checks, clean};
use keelson_proxy::diff::{Plans, advance};
use keelson_proxy::model::objects::{EndpointSlice, Service};
use keelson_proxy::model::{Model, NodeFacts, ServiceKey};
use keelson_proxy::nftables::{Nftables, NftablesConfig};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

pub const NODE4: &str = "203.0.113.2";
pub const OUTSIDE4: &str = "203.0.113.1";
pub const NODE6: &str = "2001:db8::2";
pub const OUTSIDE6: &str = "2001:db8::1";
/// Only kills a test that hangs.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long silence must last to count as silence.
pub const SILENCE: Duration = Duration::from_millis(400);

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A named network namespace, deleted when dropped.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new(role: &str) -> Self {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("kp{}-{number}-{role}", std::process::id());
        ip(&format!("netns add {name}"));
        let namespace = Namespace { name };
        namespace.ip("link set lo up");
        // Addresses are usable at once.
        namespace.set("ipv6/conf/all/accept_dad", "0");
        namespace.set("ipv6/conf/default/accept_dad", "0");
        namespace.set("ipv6/conf/default/dad_transmits", "0");
        namespace
    }

    pub fn ip(&self, arguments: &str) {
        ip(&format!("-n {} {arguments}", self.name));
    }

    /// Runs `work` on a thread inside the namespace. Sockets that it opens stay there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
                setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            match inside.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    pub fn output(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name)).arg(program).args(arguments);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn set(&self, sysctl: &str, value: &str) {
        let path = format!("/proc/sys/net/{sysctl}");
        // /proc/sys/net shows the namespace of the thread that opens it.
        self.run(|| std::fs::write(&path, value).unwrap_or_else(|e| panic!("{path}: {e}")));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(Command::new("ip").args(["netns", "del", &self.name]).stderr(Stdio::null()).status());
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {complaint}");
}

/// A pod with servers on it that tell their name and who asked.
pub struct Pod {
    pub namespace: Namespace,
    pub name: String,
    pub v4: IpAddr,
    pub v6: IpAddr,
    servers: Vec<Server>,
}

struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// What a server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub server: String,
    /// The client's address as the server saw it.
    pub client: IpAddr,
}

pub type Outcome = Result<Answer, ErrorKind>;

fn parse(text: &str) -> Answer {
    let (server, client) = text.trim().split_once(' ').unwrap();
    Answer { server: server.to_owned(), client: client.parse().unwrap() }
}

impl Namespace {
    /// Connects, reads the answer.
    pub fn tcp(&self, to: &str) -> Outcome {
        let to: SocketAddr = to.parse().unwrap();
        self.run(|| {
            let mut stream = TcpStream::connect_timeout(&to, SILENCE).map_err(|e| e.kind())?;
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).map_err(|e| e.kind())?;
            Ok(parse(&text))
        })
    }

    pub fn udp(&self, to: &str) -> Outcome {
        self.run(|| udp_exchange(&self.udp_socket(to), SILENCE))
    }

    /// A connected UDP socket that keeps its source port.
    pub fn udp_socket(&self, to: &str) -> UdpSocket {
        let to: SocketAddr = to.parse().unwrap();
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        self.run(|| {
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(to).unwrap();
            socket
        })
    }

    pub fn ask(&self, protocol: &str, to: &str) -> Outcome {
        if protocol == "UDP" { self.udp(to) } else { self.tcp(to) }
    }

    /// Serves until dropped.
    fn serve(&self, name: &str, protocol: &str, port: u16) -> Server {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, name) = (Arc::clone(&stop), name.to_owned());
        let address: SocketAddr = SocketAddr::new("::".parse().unwrap(), port);
        let thread = if protocol == "UDP" {
            let socket = self.run(|| UdpSocket::bind(address).unwrap());
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            std::thread::spawn(move || serve_udp(&socket, &name, &stopped))
        } else {
            let listener = self.run(|| TcpListener::bind(address).unwrap());
            std::thread::spawn(move || serve_tcp(&listener, &name, &stopped))
        };
        Server { stop, thread: Some(thread) }
    }
}

pub fn udp_exchange(socket: &UdpSocket, patience: Duration) -> Outcome {
    socket.set_read_timeout(Some(patience)).unwrap();
    match socket.send(b"?") {
        // Refused on its way out of this very host: the reason comes with the receive.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
        sent => {
            sent.map_err(|e| e.kind())?;
        }
    }
    let mut buffer = [0; 200];
    let length = socket.recv(&mut buffer).map_err(|e| e.kind())?;
    Ok(parse(std::str::from_utf8(&buffer[..length]).unwrap()))
}

fn serve_udp(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = [0; 200];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let answer = format!("{name} {}", from.ip().to_canonical());
            drop(socket.send_to(answer.as_bytes(), from));
        }
    }
}

fn serve_tcp(listener: &TcpListener, name: &str, stop: &AtomicBool) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    while !stop.load(Ordering::Relaxed) {
        let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut waiting, PollTimeout::from(50u8)).unwrap_or(0) == 0 {
            continue;
        }
        if let Ok((mut stream, from)) = listener.accept() {
            drop(write!(stream, "{name} {}", from.ip().to_canonical()));
        }
    }
}

impl Pod {
    pub fn serving(mut self, protocol: &str, port: u16) -> Self {
        let server = self.namespace.serve(&self.name, protocol, port);
        self.servers.push(server);
        self
    }
}

/// The node under test with the proxy's model and backend.
pub struct Node {
    pub namespace: Namespace,
    pub outside: Namespace,
    pub model: Model,
    pub plans: Plans,
    pub backend: Option<Nftables>,
    pub config: NftablesConfig,
    pub flows_removed: u64,
}

impl Node {
    pub fn new() -> Self {
        Node::with(NftablesConfig {
            cluster_cidrs: vec!["10.66.0.0/16".parse().unwrap(), "fd66::/48".parse().unwrap()],
            ..NftablesConfig::default()
        })
    }

    pub fn with(config: NftablesConfig) -> Self {
        let (namespace, outside) = (Namespace::new("node"), Namespace::new("out"));
        namespace.ip(&format!("link add eth0 type veth peer name eth0 netns {}", outside.name));
        for (side, v4, v6) in [(&namespace, NODE4, NODE6), (&outside, OUTSIDE4, OUTSIDE6)] {
            side.ip(&format!("addr add {v4}/24 dev eth0"));
            side.ip(&format!("addr add {v6}/64 dev eth0 nodad"));
            side.ip("link set eth0 up");
            side.set("ipv4/icmp_ratelimit", "0");
            side.set("ipv6/icmp/ratelimit", "0");
        }
        namespace.set("ipv4/ip_forward", "1");
        namespace.set("ipv6/conf/all/forwarding", "1");
        namespace.ip(&format!("route add default via {OUTSIDE4}"));
        namespace.ip(&format!("-6 route add default via {OUTSIDE6}"));
        // Service addresses from outside go to the node, and come to an end there when unprogrammed.
        for range in ["10.96.0.0/16", "198.51.100.0/24"] {
            outside.ip(&format!("route add {range} via {NODE4}"));
        }
        outside.ip(&format!("-6 route add fd96::/64 via {NODE6}"));
        let facts = NodeFacts {
            name: "here".to_owned(),
            addresses: vec![NODE4.parse().unwrap(), NODE6.parse().unwrap()],
            knows_pods: !config.cluster_cidrs.is_empty(),
            masquerade_all: false,
        };
        let backend = namespace.run(|| Nftables::open(config.clone()).unwrap());
        let mut node = Node {
            namespace,
            outside,
            model: Model::new(facts),
            plans: Plans::new(),
            backend: Some(backend),
            config,
            flows_removed: 0,
        };
        node.adopt();
        node
    }

    /// A pod 10.66.0.`number` / fd66::`number`.
    pub fn pod(&self, name: &str, number: u8) -> Pod {
        let namespace = Namespace::new(name);
        let (link, node) = (format!("pod{number}"), &self.namespace);
        node.ip(&format!("link add {link} type veth peer name eth0 netns {}", namespace.name));
        node.ip(&format!("addr add 10.66.0.1/32 dev {link}"));
        node.ip(&format!("addr add fd66::1/128 dev {link} nodad"));
        node.ip(&format!("link set {link} up"));
        let (v4, v6) = (format!("10.66.0.{number}"), format!("fd66::{number}"));
        namespace.ip(&format!("addr add {v4}/32 dev eth0"));
        namespace.ip(&format!("addr add {v6}/128 dev eth0 nodad"));
        namespace.ip("link set eth0 up");
        namespace.ip("route add 10.66.0.1 dev eth0");
        namespace.ip("route add default via 10.66.0.1");
        namespace.ip("-6 route add fd66::1 dev eth0");
        namespace.ip("-6 route add default via fd66::1");
        node.ip(&format!("route add {v4} dev {link}"));
        node.ip(&format!("-6 route add {v6} dev {link}"));
        namespace.set("ipv4/icmp_ratelimit", "0");
        let (v4, v6) = (v4.parse().unwrap(), v6.parse().unwrap());
        Pod { namespace, name: name.to_owned(), v4, v6, servers: Vec::new() }
    }

    pub fn service(&mut self, name: &str, spec: Value) {
        let object = json!({"metadata": {"namespace": "default", "name": name}, "spec": spec});
        self.service_object(object);
    }

    pub fn service_object(&mut self, object: Value) {
        let service: Service = serde_json::from_value(object).unwrap();
        self.model.apply_service(&service);
        assert_eq!(self.model.take_problems(), []);
    }

    pub fn delete_service(&mut self, name: &str) {
        self.model.delete_service(&ServiceKey::new("default", name));
    }

    /// Slices (one per family) for the endpoints `(pod number, node, conditions)`.
    pub fn endpoints(
        &mut self,
        service: &str,
        protocol: &str,
        port: u16,
        of: &[(u8, &str, Value)],
    ) {
        for (family, prefix) in [("IPv4", "10.66.0."), ("IPv6", "fd66::")] {
            let endpoints: Vec<Value> = of
                .iter()
                .map(|(number, node, conditions)| {
                    let address = format!("{prefix}{number}");
                    json!({"addresses": [address], "nodeName": node, "conditions": conditions})
                })
                .collect();
            self.slice(json!({
                "metadata": {
                    "namespace": "default",
                    "name": format!("{service}-{protocol}-{family}").to_lowercase(),
                    "labels": {"kubernetes.io/service-name": service},
                },
                "addressType": family,
                "endpoints": endpoints,
                "ports": [{"name": "", "protocol": protocol, "port": port}],
            }));
        }
    }

    /// Ready endpoints on this node.
    pub fn ready(&mut self, service: &str, protocol: &str, port: u16, pods: &[u8]) {
        let of: Vec<_> = pods.iter().map(|pod| (*pod, "here", json!({"ready": true}))).collect();
        self.endpoints(service, protocol, port, &of);
    }

    pub fn slice(&mut self, object: Value) {
        let slice: EndpointSlice = serde_json::from_value(object).unwrap();
        self.model.apply_slice(&slice);
        assert_eq!(self.model.take_problems(), []);
    }

    /// Puts in force what changed, and says how many kernel objects that took.
    pub fn apply(&mut self) -> usize {
        let dirty = self.model.take_dirty();
        let changes = advance(&mut self.plans, dirty, |key| self.model.plan(key));
        let applied = self.backend.as_mut().unwrap().apply(&changes, &self.plans).unwrap();
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        let checks = Checks::after(&changes);
        self.flows_removed += self.namespace.run(|| clean(&checks).unwrap());
        applied.operations
    }

    pub fn adopt(&mut self) -> usize {
        let dirty = self.model.take_dirty();
        advance(&mut self.plans, dirty, |key| self.model.plan(key));
        let applied = self.backend.as_mut().unwrap().adopt(&self.plans).unwrap();
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        applied.operations
    }

    /// A new backend, as after a restart of the process.
    pub fn restart(&mut self) -> usize {
        self.backend = None;
        let config = self.config.clone();
        self.backend = Some(self.namespace.run(|| Nftables::open(config).unwrap()));
        self.adopt()
    }

    pub fn ruleset(&self) -> String {
        self.namespace.output("nft", &["list", "table", "inet", "keelson-proxy"])
    }
}

/// A ClusterIP Service in both families with one TCP or UDP port.
pub fn cluster_ip(last: u8, protocol: &str, port: u16) -> Value {
    json!({
        "type": "ClusterIP",
        "clusterIP": format!("10.96.0.{last}"),
        "clusterIPs": [format!("10.96.0.{last}"), format!("fd96::{last}")],
        "ports": [{"port": port, "protocol": protocol}],
    })
}

/// `base` with some fields replaced.
pub fn with(mut base: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

/// `base` with a node port on its only port.
pub fn node_port(mut base: Value, number: u16) -> Value {
    base["type"] = json!("NodePort");
    base["ports"][0]["nodePort"] = json!(number);
    base
}

/// A slice with one port and endpoints `(address, node)`.
pub fn slice(service: &str, family: &str, of: &[(&str, &str)], port: &str, number: u16) -> Value {
    let endpoints: Vec<Value> = of
        .iter()
        .map(|(address, node)| json!({"addresses": [address], "nodeName": node, "conditions": {}}))
        .collect();
    json!({
        "metadata": {
            "namespace": "default",
            "name": format!("{service}-{family}").to_lowercase(),
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": [{"name": port, "port": number}],
    })
}

/// Who answers `count` connections, each server once, in order of name.
#[track_caller]
pub fn servers(from: &Namespace, to: &str, count: usize) -> Vec<String> {
    let names: std::collections::BTreeSet<String> =
        (0..count).map(|_| from.tcp(to).unwrap().server).collect();
    names.into_iter().collect()
}
