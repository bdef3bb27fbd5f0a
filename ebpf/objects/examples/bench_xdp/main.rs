//! What it costs to forward small UDP packets of a node port to an endpoint on another node: by kube-proxy's iptables
//! rules, by the programs for packets, and by the one at XDP of the driver.
//!
//! ```text
//! world: frames made at XDP ──► veth ──► node: one known flow to its port 30080 ──► the same veth ──► world: counted, dropped
//! ```
//!
//! The ways take turns in short slices on one CPU; the time is that of the thread that makes the frames (softirqs run in
//! it) and of that CPU's ksoftirqd. A ratio is the median of the ratios of neighbouring slices. Needs root and
//! iptables-restore: `cargo run --release -p keelson-ebpf-objects --example bench_xdp [ROUNDS]`.
#![allow(clippy::unwrap_used, clippy::print_stdout, dead_code, reason = "a benchmark")]

#[path = "../../tests/packet/bytes.rs"]
mod bytes;
#[path = "../../tests/packet/kernel.rs"]
mod kernel;
#[path = "../../tests/xdp/line.rs"]
mod line;
#[path = "../../tests/xdp/objects.rs"]
mod objects;
mod raw;

use std::any::Any;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use aya::programs::XdpMode;
use keelson_netlink::route::{Mac, Rtnl};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use bytes::udp;
use kernel::ip;
use line::{CLIENT, Line, NODE, attach_frames, attach_packets};

const CPU: usize = 1;
const FRAMES: u32 = 100_000;
/// Nobody's: the kernel drops what is sent there as soon as it sees it.
const ELSEWHERE: Mac = Mac([2, 0, 0, 0, 0, 0x99]);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Iptables,
    Packets,
    Frames,
}

const WAYS: [Way; 3] = [Way::Iptables, Way::Packets, Way::Frames];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Iptables => "iptables DNAT",
            Way::Packets => "ebpf, tc",
            Way::Frames => "ebpf, XDP native",
        }
    }
}

struct World {
    line: Line,
    sender: OwnedFd,
    frame: Vec<u8>,
    _held: Vec<Box<dyn Any>>,
}

/// What a slice took.
#[derive(Clone, Copy)]
struct Slice {
    nanos: f64,
    arrived: f64,
}

impl World {
    fn new(way: Way) -> Self {
        let line = Line::new();
        let mut held: Vec<Box<dyn Any>> = Vec::new();
        // Frames that the kernel sends go to nobody, so that the least is done with them.
        let next = if way == Way::Frames { line.far.mac.unwrap() } else { ELSEWHERE };
        let mut rtnl = Rtnl::open_in(&line.node).unwrap();
        rtnl.ensure_neighbour(line.near.index, ip(CLIENT[0]), next).unwrap();
        let at_node = || match way {
            Way::Iptables => restore(),
            Way::Packets | Way::Frames => {}
        };
        line.node.run(at_node).unwrap();
        if way != Way::Iptables {
            let (mut kernel, mut xdp) = line.programs();
            line.node.run(|| attach_packets(&mut kernel)).unwrap();
            if way == Way::Frames {
                line.node.run(|| attach_frames(&mut xdp, XdpMode::Driver)).unwrap();
                let sink = raw::always(raw::DROP);
                held.push(Box::new(line.world.run(|| raw::attach(&sink, line.far.index)).unwrap()));
            }
            held.push(Box::new((kernel, xdp)));
        }
        if way != Way::Frames {
            // Only with a program does a veth take frames that a driver sends.
            let pass = raw::always(raw::PASS);
            held.push(Box::new(line.node.run(|| raw::attach(&pass, line.near.index)).unwrap()));
        }
        let packet = udp(&format!("{}:40001", CLIENT[0]), &format!("{}:30080", NODE[0]));
        let mut frame = packet.bytes();
        frame.resize(64, 0);
        frame[..6].copy_from_slice(&line.near.mac.unwrap().0);
        let sender = raw::sender(&frame);
        World { line, sender, frame, _held: held }
    }

    fn slice(&self, frames: u32) -> Slice {
        let Self { line, sender, frame, .. } = self;
        let work = || {
            pin();
            let (before, began) = (received(), processor_time());
            raw::run(sender, frame, line.far.index, frames);
            let nanos = processor_time() - began;
            Slice { nanos, arrived: received() - before }
        };
        line.world.run(work).unwrap()
    }
}

/// What kube-proxy writes for one Service with one endpoint.
fn restore() {
    let [node_port, pod] = ["30080", "10.2.0.5:8080"];
    let rules = format!(
        "*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-EXT-A - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SEP-A - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-EXT-A -j KUBE-MARK-MASQ
-A KUBE-EXT-A -j KUBE-SVC-A
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-NODEPORTS -p udp -m udp --dport {node_port} -j KUBE-EXT-A
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SEP-A -p udp -m udp -j DNAT --to-destination {pod}
-A KUBE-SERVICES -d 10.96.0.1/32 -p udp -m udp --dport 80 -j KUBE-SVC-A
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-A -j KUBE-SEP-A
COMMIT
"
    );
    let mut child = Command::new("iptables-restore").stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

fn pin() {
    let mut cpus = CpuSet::new();
    cpus.set(CPU).unwrap();
    sched_setaffinity(Pid::from_raw(0), &cpus).unwrap();
}

/// Nanoseconds of the calling thread and of the CPU's ksoftirqd.
fn processor_time() -> f64 {
    let of = |path: String| -> f64 {
        let stat = fs::read_to_string(path).unwrap();
        stat.split_whitespace().next().unwrap().parse().unwrap()
    };
    of("/proc/thread-self/schedstat".to_owned()) + of(format!("/proc/{}/schedstat", ksoftirqd()))
}

fn ksoftirqd() -> u32 {
    let wanted = format!("ksoftirqd/{CPU}\n");
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap());
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is = |number: &u32| {
        fs::read_to_string(format!("/proc/{number}/comm")).is_ok_and(|name| name == wanted)
    };
    numbers.find(is).unwrap()
}

/// How many packets the world's end got.
fn received() -> f64 {
    let all = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = all.lines().find(|line| line.trim_start().starts_with("eth0:")).unwrap();
    line.split_whitespace().nth(2).unwrap().parse().unwrap()
}

fn main() {
    let rounds: usize = std::env::args().nth(1).map_or(20, |rounds| rounds.parse().unwrap());
    let worlds = WAYS.map(World::new);
    let mut slices = [const { Vec::new() }; 3];
    for round in 0..=rounds {
        for (world, slices) in worlds.iter().zip(&mut slices) {
            let slice = world.slice(FRAMES);
            // The first round makes the flow known, and fills caches.
            if round > 0 {
                slices.push(slice);
            }
        }
    }
    println!("| forwarded by | packets per core second | over iptables | arrived |");
    println!("|---|---|---|---|");
    let rate = |slice: &Slice| slice.arrived / slice.nanos * 1e9;
    for (way, own) in WAYS.iter().zip(&slices) {
        let over = own.iter().zip(&slices[0]).map(|(one, base)| rate(one) / rate(base));
        println!(
            "| {} | {:.0} | {:.2} | {:.1} % |",
            way.name(),
            median(own.iter().map(rate)),
            median(over),
            median(own.iter().map(|slice| slice.arrived / f64::from(FRAMES) * 100.0)),
        );
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
