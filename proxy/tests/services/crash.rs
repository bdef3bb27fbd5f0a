//! The real binary, killed with SIGKILL at random moments while it programs.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::growth::{Pair, packets_only};
use crate::stage::api::{api_server, kubeconfig};
use crate::stage::*;
use keelson_proxy::ebpf::EbpfConfig;
use keelson_proxy::{LocalSources, ProxyConfig};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

rows![
    killed_at_any_moment_it_goes_on_where_it_was,
    killed_while_it_moves_connections_it_loses_none,
];

const SERVICES: u16 = 1500;

/// The addresses of Service `number`: all lead to the pod 10.66.0.2.
fn objects(number: u16) -> (Value, Value) {
    let address = format!("10.96.{}.{}", 1 + number / 250, 1 + number % 250);
    let (name, affinity) =
        (format!("s{number}"), if number.is_multiple_of(5) { "ClientIP" } else { "None" });
    let service = json!({
        "metadata": {"namespace": "default", "name": name, "resourceVersion": "1"},
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
            "sessionAffinity": affinity, "ports": [{"port": 80}],
        },
    });
    let mut slice = slice(&name, "IPv4", &[("10.66.0.2", "here")], "", 8080);
    slice["metadata"]["resourceVersion"] = json!("1");
    (service, slice)
}

/// The argument that makes this program a proxy to be killed.
const VICTIM: &str = "--be-the-proxy";

pub(crate) fn is_victim() -> bool {
    std::env::args().nth(1).as_deref() == Some(VICTIM)
}

pub(crate) fn victim(mode: Mode, ebpf: &EbpfConfig, kubeconfig: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(VICTIM).arg(mode.name()).arg(kubeconfig).stderr(Stdio::null());
    command.arg(serde_json::to_string(ebpf).unwrap());
    command
}

/// An API server on a node, which ends when it is dropped.
pub(crate) struct Api {
    pub(crate) kubeconfig: PathBuf,
    events: broadcast::Sender<(String, Value)>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Api {
    /// With these objects; `folder` is for its files.
    pub(crate) fn start(node: &Namespace, lists: Value, folder: &Path) -> Api {
        let listener = node.run(|| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        listener.set_nonblocking(true).unwrap();
        let kubeconfig = kubeconfig(folder, listener.local_addr().unwrap().port());
        let (events, _) = broadcast::channel(64);
        let stop = CancellationToken::new();
        let (stopped, told) = (stop.clone(), events.clone());
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tokio::task::LocalSet::new().block_on(&runtime, async {
                let listener = TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    () = api_server(listener, lists, told) => {}
                    () = stopped.cancelled() => {}
                }
            });
        });
        Api { kubeconfig, events, stop, thread: Some(thread) }
    }

    /// Says to those who watch that an object is there.
    pub(crate) fn tell(&self, kind: &str, object: Value) {
        let event = json!({"type": "ADDED", "object": object});
        drop(self.events.send((kind.to_owned(), event)));
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// The whole proxy, until somebody kills it.
pub(crate) fn be_victim() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(2).collect();
    let config = ProxyConfig {
        kubeconfig: Some(arguments[1].clone().into()),
        node_name: "here".to_owned(),
        modes: Mode::candidates(&arguments[0]).unwrap(),
        ebpf: serde_json::from_str(&arguments[2]).unwrap(),
        local_sources: LocalSources::Cidrs(vec!["10.66.0.0/16".parse().unwrap()]),
        ..ProxyConfig::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(keelson_proxy::run(config, CancellationToken::new())).unwrap();
    ExitCode::SUCCESS
}

/// When to kill. The moment is what is random here; nothing waits for it.
struct Moments(u32);

impl Moments {
    fn new() -> Self {
        Moments(0x2545_f491)
    }

    fn next(&mut self, within_millis: u64) -> Duration {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Duration::from_millis(u64::from(self.0 >> 16) % within_millis)
    }
}

fn killed_at_any_moment_it_goes_on_where_it_was(mode: Mode) {
    let mut node = Node::new(mode);
    node.backend = None;
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let directory = tempfile::tempdir().unwrap();
    let (services, slices): (Vec<_>, Vec<_>) = (0..SERVICES).map(objects).unzip();
    let nodes = json!([{"metadata": {"name": "here", "resourceVersion": "1"}}]);
    let lists = json!({"services": services, "endpointslices": slices, "nodes": nodes});
    let (namespace, ebpf) = (&node.namespace, &node.config.ebpf);
    let api = Api::start(namespace, lists, directory.path());
    let mut moments = Moments::new();
    for round in 0..25 {
        let mut proxy = namespace.run(|| victim(mode, ebpf, &api.kubeconfig).spawn().unwrap());
        std::thread::sleep(moments.next(350));
        proxy.kill().unwrap();
        proxy.wait().unwrap();
        if round % 4 == 3 {
            damages(mode)[0].inflict(namespace);
        }
    }
    drop(api);
    for number in 0..SERVICES {
        let (service, slice) = objects(number);
        node.service_object(service);
        node.slice(slice);
    }
    // What the kills left is mended, and then there is nothing more to do.
    node.restart();
    assert_eq!(node.restart(), 0);
    for number in (0..SERVICES).step_by(97) {
        let address = format!("10.96.{}.{}:80", 1 + number / 250, 1 + number % 250);
        assert_eq!(client.namespace.tcp(&address).unwrap().server, "one");
    }
}

/// Each start has other limits than the one before, so that it moves connections to other maps.
fn killed_while_it_moves_connections_it_loses_none(mode: Mode) {
    if mode != Mode::Ebpf {
        skip("only eBPF has maps of a limited size");
    }
    let mut node = Node::with(mode, packets_only(1 << 14));
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let listener = server.namespace.run(|| std::net::TcpListener::bind("[::]:8080").unwrap());
    let directory = tempfile::tempdir().unwrap();
    let (service, slice) = objects(0);
    let nodes = json!([{"metadata": {"name": "here", "resourceVersion": "1"}}]);
    let lists = json!({"services": [&service], "endpointslices": [&slice], "nodes": nodes});
    node.service_object(service);
    node.slice(slice);
    node.apply();
    let mut pairs: Vec<Pair> =
        (0..10).map(|_| Pair::new(&client.namespace, "10.96.1.1:80", &listener)).collect();
    node.backend = None;
    let (namespace, ebpf) = (&node.namespace, &node.config.ebpf);
    let api = Api::start(namespace, lists, directory.path());
    let mut moments = Moments::new();
    for round in 0..30 {
        let ebpf = EbpfConfig { max_flows: 1 << (12 + round % 3), ..ebpf.clone() };
        let mut proxy = namespace.run(|| victim(mode, &ebpf, &api.kubeconfig).spawn().unwrap());
        // The programs are loaded meanwhile, which takes most of the time.
        std::thread::sleep(moments.next(1500));
        proxy.kill().unwrap();
        proxy.wait().unwrap();
        pairs.iter_mut().for_each(Pair::go_on);
    }
    drop(api);
    // One that lives: from here on new ones come as well.
    node.restart();
    assert_eq!(node.restart(), 0);
    pairs.push(Pair::new(&client.namespace, "10.96.1.1:80", &listener));
    pairs.iter_mut().for_each(Pair::go_on);
    node.assert_as_planned();
}
