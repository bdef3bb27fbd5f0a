//! Connections outlive restarts of the proxy, however many: killed at any moment, and replaced by a process with other
//! BPF programs, while new ones are made all the time.

use std::net::{TcpListener, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use keelson_proxy::ebpf::EbpfConfig;
use serde_json::{Value, json};

use crate::crash::{Api, victim};
use crate::stage::*;
use crate::switching::{Flow, STOP, Step, StopAtEnd};
use crate::world::{endpoint, eventually, node_object, service, spec};

rows![connections_outlive_restarts_under_load,];

/// A few, so that the suite stays short; `KEELSON_RESTARTS=1000` is the long run.
fn restarts() -> u32 {
    std::env::var("KEELSON_RESTARTS").ok().and_then(|text| text.parse().ok()).unwrap_or(16)
}

/// Between two exchanges, so that all get their turn.
const PACE: Duration = Duration::from_millis(1);
/// After that, what was sent is lost.
const PATIENCE: Duration = Duration::from_secs(5);

/// A conversation that is never interrupted.
enum Talk {
    Tcp(Flow),
    /// A connected socket.
    Udp(UdpSocket),
    /// One that is not, and whom it speaks to.
    Datagrams(UdpSocket, String),
}

impl Talk {
    fn go_on(&mut self) -> Result<(), String> {
        match self {
            Talk::Tcp(flow) => flow.exchange().map_err(|error| format!("TCP: {error}")),
            Talk::Udp(socket) => match udp_exchange(socket, PATIENCE) {
                Ok(answer) if answer.server == "one" => Ok(()),
                other => Err(format!("UDP to {:?}: {other:?}", socket.peer_addr())),
            },
            Talk::Datagrams(socket, to) => {
                let mut buffer = [0; 200];
                let from = socket
                    .send_to(b"?", &*to)
                    .and_then(|_| socket.recv_from(&mut buffer))
                    .map_err(|error| format!("datagram to {to}: {error}"))?;
                if from.1.to_string() == *to { Ok(()) } else { Err(format!("{to}: {from:?}")) }
            }
        }
    }

    /// How often it went well, and how it ended if nobody asked for that.
    fn go_on_until(&mut self, step: &Step) -> (u32, Result<(), String>) {
        let mut times = 0;
        while step.load(Ordering::Relaxed) != STOP {
            if let Err(error) = self.go_on() {
                return (times, Err(error));
            }
            times += 1;
            std::thread::sleep(PACE);
        }
        (times, Ok(()))
    }
}

/// New connections.
#[derive(Default)]
struct Asked {
    times: u32,
    /// After a second a packet is sent again.
    late: u32,
    lost: Vec<(String, usize, Outcome)>,
}

fn ask_until(step: &Step, from: &Namespace, to: &str, pace: Duration) -> Asked {
    const LATE: Duration = Duration::from_millis(900);
    let mut asked = Asked::default();
    loop {
        let during = step.load(Ordering::Relaxed);
        if during == STOP {
            return asked;
        }
        let began = Instant::now();
        let outcome = from.ask_for("TCP", to, PATIENCE);
        asked.times += 1;
        asked.late += u32::from(began.elapsed() > LATE);
        if !outcome.as_ref().is_ok_and(|answer| answer.server == "one") {
            asked.lost.push((to.to_owned(), during, outcome));
        }
        std::thread::sleep(pace);
    }
}

fn lists() -> Value {
    let udp = |mut object: Value| {
        for ports in ["/spec/ports/0", "/ports/0"] {
            if let Some(port) = object.pointer_mut(ports) {
                port["protocol"] = json!("UDP");
            }
        }
        object
    };
    json!({
        "services": [
            service("web", spec("10.96.0.1", 30080)),
            udp(service("dns", spec("10.96.0.2", 30053))),
            service("long", spec("10.96.0.3", 30090)),
        ],
        "endpointslices": [
            endpoint("web", "10.66.0.2"), udp(endpoint("dns", "10.66.0.2")), long_endpoint(),
        ],
        "nodes": [node_object()],
    })
}

fn long_endpoint() -> Value {
    let mut slice = endpoint("long", "10.66.0.2");
    slice["ports"][0]["port"] = json!(9090);
    slice
}

fn connections_outlive_restarts_under_load(mode: Mode) {
    let mut node = Node::new(mode);
    node.backend = None;
    let (client, one) = (node.pod("client", 10), node.pod("one", 2));
    let one = one.serving("TCP", 8080).serving("UDP", 8080);
    let listener = one.namespace.run(|| TcpListener::bind("[::]:9090").unwrap());
    let (inside, outside, own) = (&client.namespace, &node.outside, &node.namespace);
    let directory = tempfile::tempdir().unwrap();
    let api = Api::start(&node.namespace, lists(), directory.path());
    let start = || own.run(|| victim(mode, &node.config.ebpf, &api.kubeconfig).spawn().unwrap());
    let in_force = || {
        eventually("all is in force", || {
            let health = own.try_get("127.0.0.1:10256", "/healthz").ok()?;
            health.starts_with("HTTP/1.1 200").then_some(())
        });
    };
    let mut proxy = start();
    in_force();
    let node_ports = [30080, 30053, 30090].map(|port| format!("{NODE4}:{port}"));
    let [web, dns, long] = &node_ports;
    let unconnected = inside.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    unconnected.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut talks = [
        Talk::Tcp(Flow::open(inside, "10.96.0.3:80", &listener)),
        Talk::Tcp(Flow::open(own, "10.96.0.3:80", &listener)),
        Talk::Tcp(Flow::open(outside, long, &listener)),
        Talk::Tcp(Flow::open(inside, long, &listener)),
        Talk::Udp(inside.udp_socket("10.96.0.2:80")),
        Talk::Udp(outside.udp_socket(dns)),
        Talk::Datagrams(unconnected, "10.96.0.2:80".to_owned()),
    ];
    let step = Step::new(0);
    std::thread::scope(|scope| {
        let step = &step;
        let talking: Vec<_> =
            talks.iter_mut().map(|talk| scope.spawn(|| talk.go_on_until(step))).collect();
        // Who is masqueraded shares the ports that an endpoint forgets within a minute.
        let askers = [(inside, "10.96.0.1:80", 1), (own, "10.96.0.1:80", 1), (outside, web, 4)]
            .map(|(from, to, pace)| scope.spawn(move || ask_until(step, from, to, pace * PACE)));
        let stop = StopAtEnd(step);
        let mut random = 0x2545_f491_u32;
        for round in 0..restarts() {
            step.store(round as usize + 1, Ordering::Relaxed);
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if round % 2 == 0 {
                in_force();
                // The lists do not have it: the next process finds something to remove.
                api.tell("services", service("more", json!({
                    "type": "ClusterIP", "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"],
                    "ports": [{"port": 80}],
                })));
            } else {
                // The moment is what is random here; nothing waits for it.
                std::thread::sleep(Duration::from_millis(u64::from(random >> 16) % 250));
            }
            proxy.kill().unwrap();
            proxy.wait().unwrap();
            if mode == Mode::Ebpf && round % 3 != 2 {
                forget_programs(&node.config.ebpf);
            }
            proxy = start();
        }
        in_force();
        drop(stop);
        proxy.kill().unwrap();
        proxy.wait().unwrap();
        let talked: Vec<_> = talking.into_iter().map(|talk| talk.join().unwrap()).collect();
        let asked: Vec<_> = askers.into_iter().map(|asker| asker.join().unwrap()).collect();
        println!(
            "{mode}: {} restarts, exchanges {:?}, connections and those of them that were late {:?}",
            restarts(),
            talked.iter().map(|(times, _)| times).collect::<Vec<_>>(),
            asked.iter().map(|asked| (asked.times, asked.late)).collect::<Vec<_>>(),
        );
        for (times, end) in talked {
            assert_eq!(end, Ok(()), "after {times} exchanges");
            assert!(times > 0);
        }
        for asked in asked {
            assert_eq!(asked.lost, []);
            assert!(asked.times > 0);
        }
    });
}

/// As if the next process came with other programs: it finds none that are its own, and replaces those that work.
fn forget_programs(ebpf: &EbpfConfig) {
    for entry in std::fs::read_dir(&ebpf.pins).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("programs-") {
            std::fs::remove_dir_all(entry.path()).unwrap();
        }
    }
}
