//! A node and its pods, each a network namespace, and the plugin between them.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use keelson_netlink::netns::{self, Netns};
use keelson_netlink::route::Rtnl;
use keelson_netlink::sysctl;
use serde_json::{Value, json};

/// Only ends a test that hangs.
pub const DEADLINE: Duration = Duration::from_secs(5);

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Whether this process may make namespaces; says so if not.
pub fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("passed over: needs root");
    }
    root
}

/// A pinned namespace that goes with the value.
pub struct Namespace {
    pub path: PathBuf,
    pub netns: Netns,
}

impl Namespace {
    fn new(role: &str) -> Self {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("/run/netns/kc{}-{number}-{role}", std::process::id()));
        fs::create_dir_all("/run/netns").unwrap();
        let netns = Netns::create(&path).unwrap();
        netns.run(|| Rtnl::open().unwrap().set_up("lo").unwrap()).unwrap();
        Namespace { path, netns }
    }

    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns.run(work).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        netns::delete(&self.path).unwrap();
    }
}

/// A node with a network called `test`.
pub struct Node {
    pub namespace: Namespace,
    pub data: tempfile::TempDir,
    pub config: Value,
}

impl Node {
    pub fn new(cidrs: &[&str]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let config = json!({
            "cniVersion": "1.1.0", "name": "test", "type": "keelson-cni",
            "podCIDRs": cidrs, "dataDir": data.path(),
        });
        let namespace = Namespace::new("node");
        namespace.run(|| {
            let mut rtnl = Rtnl::open().unwrap();
            let lo = rtnl.link("lo").unwrap().unwrap();
            for address in ["192.0.2.1/32", "2001:db8::1/128"] {
                rtnl.ensure_address(lo.index, address.parse().unwrap()).unwrap();
            }
        });
        Node { namespace, data, config }
    }

    pub fn dual() -> Self {
        Node::new(&["10.99.0.0/24", "fd00:99::/64"])
    }

    /// The same configuration with other fields.
    pub fn with(&self, fields: Value) -> Value {
        let mut config = self.config.clone();
        for (key, value) in fields.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    /// Starts the plugin in the node's namespace.
    pub fn spawn(&self, verb: &str, id: &str, pod: Option<&Namespace>, config: &Value) -> Child {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.namespace.path.display()))
            .arg(env!("CARGO_BIN_EXE_keelson-cni"))
            .env_clear()
            .envs([("CNI_COMMAND", verb), ("CNI_CONTAINERID", id), ("CNI_IFNAME", "eth0")])
            .env("CNI_PATH", "/nowhere")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(pod) = pod {
            command.env("CNI_NETNS", &pod.path);
        }
        let mut child = command.spawn().unwrap();
        // A plugin that was killed does not read.
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).ok();
        child
    }

    /// Runs the plugin; the error is CNI's.
    pub fn call(
        &self,
        verb: &str,
        id: &str,
        pod: Option<&Namespace>,
        config: &Value,
    ) -> Result<Value, Value> {
        answer(&self.spawn(verb, id, pod, config).wait_with_output().unwrap())
    }

    pub fn add(&self, id: &str, pod: &Namespace) -> Result<Value, Value> {
        self.call("ADD", id, Some(pod), &self.config)
    }

    pub fn del(&self, id: &str, pod: Option<&Namespace>) -> Result<Value, Value> {
        self.call("DEL", id, pod, &self.config)
    }

    /// A connected pod.
    pub fn pod(&self, id: &str) -> Pod {
        self.pod_with(id, &self.config)
    }

    pub fn pod_with(&self, id: &str, config: &Value) -> Pod {
        let namespace = pod_namespace();
        let result = self.call("ADD", id, Some(&namespace), config).unwrap();
        Pod { namespace, ips: ips(&result), result }
    }

    /// Names of all links of the node but the loopback.
    pub fn links(&self) -> Vec<String> {
        let links = self.namespace.run(|| Rtnl::open().unwrap().links().unwrap());
        links.into_iter().filter(|link| !link.loopback).map(|link| link.name).collect()
    }

    /// Nothing of any pod is left.
    pub fn is_clean(&self) {
        assert_eq!((self.links(), self.taken()), (vec![], 0));
    }

    /// The journal's lines about taken addresses that stand.
    pub fn taken(&self) -> usize {
        let text = fs::read_to_string(self.data.path().join("test/journal")).unwrap_or_default();
        let count = |what: &str| text.matches(what).count();
        count(r#""op":"take""#) - count(r#""op":"free""#)
    }
}

/// A pod that has been added.
pub struct Pod {
    pub namespace: Namespace,
    pub ips: Vec<IpAddr>,
    pub result: Value,
}

/// A namespace for a pod, with nothing in it.
pub fn pod_namespace() -> Namespace {
    let namespace = Namespace::new("pod");
    // Addresses are usable at once, as the plugin sees to for its own.
    namespace.run(|| sysctl::write("net/ipv6/conf/default/accept_dad", "0").unwrap());
    namespace
}

fn answer(output: &Output) -> Result<Value, Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    let value = serde_json::from_str(&text).unwrap_or(Value::Null);
    if output.status.success() {
        return Ok(value);
    }
    assert!(
        value["code"].is_u64(),
        "no CNI error: {text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Err(value)
}

/// The addresses of a result, without their prefixes.
pub fn ips(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().unwrap().iter();
    ips.map(|ip| ip["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap())
        .collect()
}

/// Answers every connection to `port` of the namespace with the address that it came from.
pub fn echo_source(namespace: &Namespace, at: IpAddr, port: u16) {
    let listener = namespace.run(|| TcpListener::bind((at, port)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let source = stream.peer_addr().unwrap().ip().to_canonical().to_string();
            stream.write_all(source.as_bytes()).ok();
        }
    });
}

/// Who the server at `to` says we are; `None` when it does not answer.
pub fn source_seen(from: &Namespace, to: SocketAddr) -> Option<String> {
    from.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).ok()?;
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    })
}
