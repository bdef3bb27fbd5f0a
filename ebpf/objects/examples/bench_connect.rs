//! What a TCP connection through a ClusterIP costs over a direct one, with the socket programs alone.
//!
//! A connection is connect, one byte there, one byte back, close. The ways take turns in small slices, and a
//! ratio is the median of the ratios of neighbouring slices, so that what else the machine does hits all
//! alike. Needs root: `cargo run --release -p keelson-ebpf-objects --example bench_connect [ROUNDS]`.
#![allow(clippy::unwrap_used, clippy::print_stdout, dead_code, reason = "a benchmark")]

#[path = "../tests/socket/cgroup.rs"]
mod cgroup;
#[path = "../../../proxy/src/ebpf/cookie.rs"]
mod cookie;
#[path = "../tests/socket/world.rs"]
mod world;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use keelson_netlink::netns::Netns;
use keelson_netlink::route::{Rtnl, VethEnd, VethPair};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Pid;
use world::{TCP, World};

const SLICE: u32 = 250;
const MANY: u32 = 50_000;
const ENDPOINTS: usize = 20;
const SERVER: &str = "10.67.0.2:8080";
const STOP: u8 = 0;

/// How a connection is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// To the server, by a thread that the programs do not see.
    Bare,
    /// To the server, with the programs.
    Direct,
    /// Through one ClusterIP.
    Service,
    /// Through so many in turn, none of which is in a cache.
    Services(u32),
}

/// What a slice took, for one connection.
#[derive(Clone, Copy)]
struct Cost {
    wall: f64,
    /// Of this process, client and server, with what the kernel did in its name.
    process: f64,
}

fn main() {
    let rounds = std::env::args().nth(1).map_or(200, |rounds| rounds.parse().unwrap());
    let mut world = World::new();
    let server = connect_server(&world.pod);
    println!(
        "| Services | CPUs | way | connections/s | CPU us | rate over direct | CPU over direct |"
    );
    println!("|---|---|---|---|---|---|---|");
    for (count, before) in [(1, 0), (MANY, 1)] {
        fill(&mut world, before, count);
        for cpus in [&[1][..], &[0, 1]] {
            let ways = [Way::Direct, Way::Service, Way::Services(count), Way::Direct, Way::Bare];
            let costs = run(&world, &server, cpus, &ways, rounds);
            print(count, cpus.len(), &ways, &costs);
        }
    }
}

/// A namespace beside the pod's, with an Ethernet between the two.
fn connect_server(pod: &Netns) -> Netns {
    let server = Netns::anonymous().unwrap();
    let mut here = Rtnl::open_in(pod).unwrap();
    here.create_veth(&VethPair {
        near: VethEnd { name: "eth0", mac: None, netns: None },
        far: VethEnd { name: "eth0", mac: None, netns: Some(server.as_fd()) },
        mtu: None,
    })
    .unwrap();
    for (netns, network) in [(pod, "10.67.0.1/24"), (&server, "10.67.0.2/24")] {
        let mut rtnl = Rtnl::open_in(netns).unwrap();
        rtnl.set_up("eth0").unwrap();
        let eth0 = rtnl.link("eth0").unwrap().unwrap().index;
        rtnl.ensure_address(eth0, network.parse().unwrap()).unwrap();
    }
    server
}

fn vip(number: u32) -> SocketAddr {
    (Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 0)) + number), 80).into()
}

fn fill(world: &mut World, from: u32, to: u32) {
    let endpoints = vec![SERVER.parse().unwrap(); ENDPOINTS];
    for number in from..to {
        world.service(vip(number), TCP, &endpoints);
    }
}

/// All slices, one list for each way.
fn run(
    world: &World,
    server: &Netns,
    cpus: &[usize],
    ways: &[Way],
    rounds: usize,
) -> Vec<Vec<Cost>> {
    let listener = server.run(|| TcpListener::bind(SERVER).unwrap()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin(cpus[0]);
            serve(&listener);
        });
        let mut costs = vec![Vec::new(); ways.len()];
        world
            .pod
            .run(|| {
                pin(cpus[cpus.len() - 1]);
                for round in 0..rounds + 1 {
                    for (way, costs) in ways.iter().zip(&mut costs) {
                        let cost = slice(world, *way);
                        // The first round is for caches.
                        if round > 0 {
                            costs.push(cost);
                        }
                    }
                }
                TcpStream::connect(SERVER).unwrap().write_all(&[STOP]).unwrap();
            })
            .unwrap();
        costs
    })
}

fn slice(world: &World, way: Way) -> Cost {
    let all = || {
        let (start, process) = (Instant::now(), process_time());
        for number in 0..SLICE {
            let to = match way {
                Way::Service => vip(0),
                // In no order.
                Way::Services(count) => vip(number.wrapping_mul(7919) % count),
                Way::Bare | Way::Direct => SERVER.parse().unwrap(),
            };
            exchange(to);
        }
        let each = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(SLICE);
        Cost { wall: each(start.elapsed()), process: each(process_time() - process) }
    };
    match way {
        Way::Bare => all(),
        _ => world.cgroup.run(all).unwrap(),
    }
}

fn exchange(to: SocketAddr) {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.write_all(&[1]).unwrap();
    stream.read_exact(&mut [0]).unwrap();
    // Without this the client's ports would all wait.
    let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&stream, sockopt::Linger, &at_once).unwrap();
}

fn serve(listener: &TcpListener) {
    loop {
        let (mut stream, _) = listener.accept().unwrap();
        let mut byte = [STOP];
        stream.read_exact(&mut byte).unwrap();
        if byte == [STOP] {
            return;
        }
        stream.write_all(&byte).unwrap();
        // The client closes first.
        stream.read_exact(&mut byte).ok();
    }
}

fn pin(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &cpus).unwrap();
}

fn process_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let micros = |time: TimeVal| Duration::from_micros(time.num_microseconds().cast_unsigned());
    micros(usage.user_time()) + micros(usage.system_time())
}

fn print(count: u32, cpus: usize, ways: &[Way], costs: &[Vec<Cost>]) {
    let direct = ways.iter().position(|way| *way == Way::Direct).unwrap();
    for (position, (way, slices)) in ways.iter().zip(costs).enumerate() {
        let name = match way {
            Way::Bare => "direct, no programs",
            Way::Direct if position == direct => "direct",
            Way::Direct => "direct again",
            Way::Service => "one ClusterIP",
            Way::Services(_) => "all in turn",
        };
        let over = |of: fn(&Cost) -> f64| {
            median(slices.iter().zip(&costs[direct]).map(|(one, base)| of(one) / of(base)))
        };
        println!(
            "| {count} | {cpus} | {name} | {:.0} | {:.2} | {:.3} | {:.3} |",
            1e6 / median(slices.iter().map(|slice| slice.wall)),
            median(slices.iter().map(|slice| slice.process)),
            1.0 / over(|cost| cost.wall),
            over(|cost| cost.process),
        );
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
