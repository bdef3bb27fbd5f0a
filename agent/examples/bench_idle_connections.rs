//! What 10,000 idle connections to the node's HTTPS API cost: memory of the server, and time of an exec.
//!
//! `cargo run --release -p keelson-agent --example bench_idle_connections`
//!
//! The server runs in this process; the connections belong to a second one, so that only what the server holds is
//! counted. Quote the ratios: times are of the machine at hand.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    unreachable_pub,
    dead_code,
    reason = "a bench may panic, prints, and its modules are its own"
)]

#[path = "../tests/server/client.rs"]
mod client;
#[path = "../tests/server/crowd.rs"]
mod crowd;
#[path = "../tests/server/fixture.rs"]
mod fixture;
#[path = "../tests/server/proxy.rs"]
mod proxy;

use std::io::Read;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, BufReader};

use client::{open, read_until, spdy};
use fixture::Node;

const CONNECTIONS: u32 = 10_000;
const EXECS: usize = 200;

#[tokio::main]
async fn main() {
    crowd::allow_descriptors(12_000);
    let args: Vec<String> = std::env::args().collect();
    if let [_, kind, address] = args.as_slice() {
        return clients(kind, address.parse().unwrap()).await;
    }
    println!("{:34} {:>10} {:>12} {:>12}", "", "memory", "exec median", "exec longest");
    for kind in ["silent", "tls"] {
        let node = Node::start(|_| ()).await;
        // What the first requests bring into memory is not the connections'.
        execs(&node).await;
        let (before, times) = (crowd::resident(), execs(&node).await);
        line(&format!("{kind}: before"), before, &times);
        let mut child = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args([kind, &node.address.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut ready = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut meanwhile = Vec::new();
        let connected = async { ready.next_line().await.unwrap() };
        tokio::pin!(connected);
        loop {
            tokio::select! {
                biased;
                _ = &mut connected => break,
                time = exec(&node) => meanwhile.push(time),
            }
        }
        line(&format!("{kind}: while they connect"), crowd::resident(), &meanwhile);
        let (after, times) = (crowd::resident(), execs(&node).await);
        line(&format!("{kind}: with {CONNECTIONS} of them"), after, &times);
        println!("{kind}: they cost {} KiB", after.saturating_sub(before) >> 10);
        child.kill().await.unwrap();
    }
}

/// Opens the connections, says so, and holds them until the other process ends.
async fn clients(kind: &str, to: SocketAddr) {
    let (mut silent, mut tls) = (Vec::new(), Vec::new());
    if kind == "silent" {
        silent = crowd::connect(to, CONNECTIONS).await;
    } else {
        for _ in 0..CONNECTIONS {
            tls.push(proxy::connect(to).await.unwrap());
        }
    }
    println!("connected");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop((silent, tls));
}

async fn exec(node: &Node) -> Duration {
    let began = Instant::now();
    let path = "/exec/default/web/main?output=1&command=true";
    let connection = spdy(node, path, "v4.channel.k8s.io").await;
    let (mut error, _stdout) =
        (open(&connection, "error").await, open(&connection, "stdout").await);
    read_until(&mut error, "Success").await;
    began.elapsed()
}

async fn execs(node: &Node) -> Vec<Duration> {
    let mut times = Vec::new();
    for _ in 0..EXECS {
        times.push(exec(node).await);
    }
    times
}

fn line(what: &str, memory: u64, times: &[Duration]) {
    let mut times = times.to_vec();
    times.sort();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    let longest = times.last().copied().unwrap_or_default();
    println!("{what:34} {:>6} KiB {median:>12.1?} {longest:>12.1?}", memory >> 10);
}
