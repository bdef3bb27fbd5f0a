//! ADD and DEL as whole processes, beside the reference plugins `bridge` and `host-local` where they are installed.
//!
//!     cargo xtask bench cni [--pods N] [--rounds N] [--peer-dir /usr/lib/cni]
//!
//! Each round adds and then deletes N pods one after the other with each plugin in turn (A B A B), in a network namespace
//! that goes with the run. What is measured is what a runtime waits for: from starting the process to its end.
#![allow(clippy::print_stdout, reason = "a bench prints its table")]

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use keelson_netlink::netns::Netns;
use keelson_netlink::route::Rtnl;
use serde_json::{Value, json};

type Failed = Box<dyn std::error::Error>;

struct Options {
    plugin: PathBuf,
    peers: PathBuf,
    pods: usize,
    rounds: usize,
}

impl Options {
    fn read() -> Result<Self, Failed> {
        let mut args = std::env::args().skip(1);
        let plugin = args.next().ok_or("usage: bench_add PLUGIN [--pods N] [--rounds N]")?;
        let mut options =
            Options { plugin: plugin.into(), peers: "/usr/lib/cni".into(), pods: 40, rounds: 5 };
        while let Some(flag) = args.next() {
            let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
            match flag.as_str() {
                "--pods" => options.pods = value.parse()?,
                "--rounds" => options.rounds = value.parse()?,
                "--peer-dir" => options.peers = value.into(),
                other => return Err(format!("unknown flag {other}").into()),
            }
        }
        Ok(options)
    }
}

/// A namespace that nothing but this process holds: it goes with the value, also when the bench is killed.
struct Namespace {
    netns: Netns,
    /// By which others can open it meanwhile.
    path: PathBuf,
}

impl Namespace {
    fn new() -> Result<Self, Failed> {
        let netns = Netns::anonymous()?;
        netns.run(|| Rtnl::open().and_then(|mut rtnl| rtnl.set_up("lo")))??;
        let descriptor = netns.as_fd().as_raw_fd();
        let path = PathBuf::from(format!("/proc/{}/fd/{descriptor}", std::process::id()));
        Ok(Self { netns, path })
    }
}

/// A plugin, its configuration, and how long its calls took.
struct Subject {
    name: &'static str,
    plugin: PathBuf,
    config: Value,
    add: Vec<Duration>,
    del: Vec<Duration>,
}

fn subjects(options: &Options, data: &Path) -> Vec<Subject> {
    let subject = |name, plugin: &Path, config| Subject {
        name,
        plugin: plugin.to_owned(),
        config,
        add: Vec::new(),
        del: Vec::new(),
    };
    let own = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "keelson-cni",
        "podCIDRs": ["10.88.0.0/16"], "dataDir": data,
    });
    let bridge = json!({
        "cniVersion": "1.0.0", "name": "bench-bridge", "type": "bridge", "bridge": "kbench0",
        "isGateway": true, "ipMasq": true, "hairpinMode": true,
        "ipam": { "type": "host-local", "dataDir": data.join("host-local"),
            "ranges": [[{ "subnet": "10.89.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }] },
    });
    let mut subjects = vec![subject("keelson-cni", &options.plugin, own)];
    let peer = options.peers.join("bridge");
    if peer.is_file() {
        subjects.push(subject("bridge + host-local", &peer, bridge));
    } else {
        println!("note: no {}: no peer (Debian: containernetworking-plugins)", peer.display());
    }
    subjects
}

fn call(
    subject: &Subject,
    options: &Options,
    node: &Namespace,
    pod: &Namespace,
    (verb, id): (&str, &str),
) -> Result<Duration, Failed> {
    // Entered by the thread and inherited: nsenter's own start is not the plugin's.
    let mut command = Command::new(&subject.plugin);
    command
        .envs([("CNI_COMMAND", verb), ("CNI_CONTAINERID", id), ("CNI_IFNAME", "eth0")])
        .env("CNI_NETNS", &pod.path)
        .env("CNI_PATH", &options.peers)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let config = subject.config.to_string();
    let run = || -> io::Result<_> {
        let start = Instant::now();
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(config.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        Ok((start.elapsed(), output))
    };
    let (took, output) = node.netns.run(run)??;
    if output.status.success() {
        return Ok(took);
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Err(format!("{} {verb}: {text}{}", subject.name, String::from_utf8_lossy(&output.stderr))
        .into())
}

fn round(subject: &mut Subject, options: &Options, node: &Namespace) -> Result<(), Failed> {
    let pods: Vec<_> = (0..options.pods)
        .map(|number| Ok((format!("pod{number}"), Namespace::new()?)))
        .collect::<Result<_, Failed>>()?;
    for (id, pod) in &pods {
        let took = call(subject, options, node, pod, ("ADD", id))?;
        subject.add.push(took);
    }
    for (id, pod) in &pods {
        let took = call(subject, options, node, pod, ("DEL", id))?;
        subject.del.push(took);
    }
    Ok(())
}

fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let position = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(position).map_or(f64::NAN, |duration| duration.as_secs_f64() * 1000.0)
}

fn report(subjects: &mut [Subject]) {
    println!(
        "{:<24}{:<6}{:>10}{:>10}{:>10}{:>10}",
        "plugin", "verb", "p50 ms", "p90", "p99", "max"
    );
    let mut medians = Vec::new();
    for subject in subjects {
        for (verb, times) in [("ADD", &mut subject.add), ("DEL", &mut subject.del)] {
            times.sort_unstable();
            let [p50, p90, p99, max] = [50, 90, 99, 100].map(|percent| percentile(times, percent));
            println!("{:<24}{verb:<6}{p50:>10.2}{p90:>10.2}{p99:>10.2}{max:>10.2}", subject.name);
            medians.push(p50);
        }
    }
    if let [add, del, peer_add, peer_del] = medians[..] {
        println!("ratio of the medians: ADD {:.2}, DEL {:.2}", add / peer_add, del / peer_del);
    }
    println!("goal: ADD and DEL within 5 ms");
}

fn run() -> Result<(), Failed> {
    let options = Options::read()?;
    let data = tempfile::tempdir()?;
    let node = Namespace::new()?;
    let mut subjects = subjects(&options, data.path());
    for _ in 0..options.rounds {
        for subject in &mut subjects {
            round(subject, &options, &node)?;
        }
    }
    report(&mut subjects);
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench_add: {error}");
            ExitCode::FAILURE
        }
    }
}
