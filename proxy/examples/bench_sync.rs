//! How long Services take to become effective, and what that costs in memory.
//!
//! Makes Services and EndpointSlices in this process, in a network namespace of its own:
//! `cargo run --release -p keelson-proxy --example bench_sync -- --services 10000 --endpoints 10`

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use aya::maps::MapData;
use clap::Parser;
use keelson_proxy::backend::{Backend, BackendConfig, Mode, PodSources};
use keelson_proxy::diff::{Plans, advance};
use keelson_proxy::ebpf::{EbpfConfig, Sockets};
use keelson_proxy::model::objects::{EndpointSlice, Service};
use keelson_proxy::model::{Model, NodeFacts};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

#[derive(Parser)]
struct Flags {
    /// Number of Services
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// Endpoints of each
    #[arg(long, default_value_t = 10)]
    endpoints: u32,
    /// Changes to measure
    #[arg(long, default_value_t = 20)]
    changes: u32,
    /// Backend: nftables, iptables-nft, iptables-legacy, ebpf
    #[arg(long, default_value = "nftables")]
    mode: String,
    /// Endpoint changes a second in the churn phase; 0 leaves it out
    #[arg(long, default_value_t = 0)]
    churn: u32,
    /// How long the churn goes on
    #[arg(long, default_value_t = 60)]
    churn_secs: u32,
    /// One line of JSON instead of a table
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    // What mode ebpf keeps in a BPF file system goes with the process.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), None::<&str>)?;
    let mut results = BTreeMap::new();
    let (mut model, mut plans) = (Model::new(node()), Plans::new());
    let modes = Mode::candidates(&flags.mode)
        .ok_or_else(|| anyhow::anyhow!("--mode: {:?} is not a mode", flags.mode))?;
    let mode = *modes.first().ok_or_else(|| anyhow::anyhow!("--mode: none"))?;
    mode.probe()?;
    let mut backend = mode.open(config()?)?;

    let began = Instant::now();
    for number in 0..flags.services {
        model.apply_service(&service(number)?);
        model.apply_slice(&slice(number, flags.endpoints)?);
    }
    let parsed = began.elapsed();
    results.insert("1a resident with objects (MB)", resident_mb()?);
    put_in_force(&mut model, &mut plans, &mut *backend, true)?;
    results.insert("1 objects parsed (s)", parsed.as_secs_f64());
    results.insert("2 start to effective (s)", began.elapsed().as_secs_f64());
    results.insert("3 resident after start (MB)", resident_mb()?);
    let maps = maps_mb()?;
    if maps > 0.0 {
        results.insert("3a BPF maps (MB)", maps);
        results.insert("3b resident and BPF maps (MB)", resident_mb()? + maps);
    }

    let mut times: Vec<Duration> = Vec::new();
    for change in 0..flags.changes {
        let (service, slice) =
            (service(flags.services + change)?, slice(flags.services + change, flags.endpoints)?);
        let began = Instant::now();
        model.apply_service(&service);
        model.apply_slice(&slice);
        put_in_force(&mut model, &mut plans, &mut *backend, false)?;
        times.push(began.elapsed());
    }
    report("4 new Service effective", &mut times, &mut results);
    for change in 0..flags.changes {
        let slice = slice(change, flags.endpoints - 1)?;
        let began = Instant::now();
        model.apply_slice(&slice);
        put_in_force(&mut model, &mut plans, &mut *backend, false)?;
        times.push(began.elapsed());
    }
    report("5 endpoint removed", &mut times, &mut results);

    if flags.churn > 0 {
        churn(&flags, &mut model, &mut plans, &mut *backend, &mut results)?;
    }

    drop(backend);
    let began = Instant::now();
    let mut backend = mode.open(config()?)?;
    let operations = backend.adopt(&plans)?.operations;
    results.insert("6 restart, nothing changed (s)", began.elapsed().as_secs_f64());
    results.insert("7 objects changed by restart", operations as f64);
    results.insert("8 resident at the end (MB)", resident_mb()?);
    print(&flags, &results)
}

fn print(flags: &Flags, results: &BTreeMap<&str, f64>) -> anyhow::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    if flags.json {
        let line =
            json!({"services": flags.services, "endpoints": flags.endpoints, "results": results});
        writeln!(out, "{line}")?;
        return Ok(());
    }
    writeln!(out, "{} Services x {} endpoints", flags.services, flags.endpoints)?;
    for (name, value) in results {
        let (_, name) = name.split_once(' ').unwrap_or(("", name));
        writeln!(out, "  {name:<36} {value:>10.3}")?;
    }
    Ok(())
}

fn report(name: &'static str, times: &mut Vec<Duration>, results: &mut BTreeMap<&str, f64>) {
    times.sort();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    let worst = times.last().copied().unwrap_or_default();
    let (median_name, worst_name) = match name {
        "4 new Service effective" => ("4a new Service, median (ms)", "4b new Service, worst (ms)"),
        _ => ("5a endpoint removed, median (ms)", "5b endpoint removed, worst (ms)"),
    };
    results.insert(median_name, median.as_secs_f64() * 1000.0);
    results.insert(worst_name, worst.as_secs_f64() * 1000.0);
    times.clear();
}

/// Changes arrive at a steady rate, whether or not the last one is in force: each takes an endpoint away
/// or gives it back. The lag is from arrival until it is in force.
fn churn(
    flags: &Flags,
    model: &mut Model,
    plans: &mut Plans,
    backend: &mut dyn Backend,
    results: &mut BTreeMap<&str, f64>,
) -> anyhow::Result<()> {
    let total = flags.churn * flags.churn_secs;
    let cpu_before = cpu_secs()?;
    let began = Instant::now();
    let due =
        |change: u32| began + Duration::from_secs_f64(f64::from(change) / f64::from(flags.churn));
    let (mut next, mut rounds, mut foreign) = (0, 0u32, 0u32);
    let mut lags: Vec<Duration> = Vec::new();
    while next < total {
        let now = Instant::now();
        if due(next) > now {
            std::thread::sleep(due(next) - now);
        }
        let first = next;
        while next < total && due(next) <= Instant::now() {
            // A multiplier without a common divisor visits Services in a scattered order.
            let number = (next.wrapping_mul(7919)) % flags.services;
            let gone = (next / flags.services) % 2;
            model.apply_slice(&slice(number, flags.endpoints - 1 - gone)?);
            next += 1;
        }
        foreign += u32::from(backend.disturbed()?);
        put_in_force(model, plans, backend, false)?;
        rounds += 1;
        let done = Instant::now();
        lags.extend((first..next).map(|change| done - due(change)));
    }
    lags.sort();
    let at = |share: f64| {
        let index = (lags.len() as f64 * share) as usize;
        lags.get(index.min(lags.len() - 1)).map_or(0.0, |lag| lag.as_secs_f64() * 1000.0)
    };
    let elapsed = began.elapsed().as_secs_f64();
    results.insert("5c churn: changes a second", f64::from(total) / elapsed);
    results.insert("5d churn: lag p50 (ms)", at(0.5));
    results.insert("5e churn: lag p99 (ms)", at(0.99));
    results.insert("5f churn: lag worst (ms)", at(1.0));
    results.insert("5g churn: transactions", f64::from(rounds));
    results.insert("5h churn: CPU share (%)", (cpu_secs()? - cpu_before) / elapsed * 100.0);
    anyhow::ensure!(foreign == 0, "our own changes were taken for foreign ones {foreign} times");
    let differences = backend.verify(plans)?;
    anyhow::ensure!(differences.is_empty(), "wrong at the end: {differences:?}");
    let mut fresh = Plans::new();
    let all: Vec<_> = model.services().cloned().collect();
    advance(&mut fresh, all, |key| model.plan(key));
    anyhow::ensure!(fresh == *plans, "the plans are not those from scratch");
    Ok(())
}

fn cpu_secs() -> anyhow::Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let secs = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(secs(usage.user_time()) + secs(usage.system_time()))
}

fn put_in_force(
    model: &mut Model,
    plans: &mut Plans,
    backend: &mut dyn Backend,
    first: bool,
) -> anyhow::Result<()> {
    let dirty = model.take_dirty();
    let changes = advance(plans, dirty, |key| model.plan(key));
    let applied = match first {
        true => backend.adopt(plans)?,
        false => backend.apply(&changes, plans)?,
    };
    anyhow::ensure!(applied.refused.is_empty(), "refused: {:?}", applied.refused);
    Ok(())
}

fn node() -> NodeFacts {
    NodeFacts { name: "here".to_owned(), knows_pods: true, ..NodeFacts::default() }
}

fn config() -> anyhow::Result<BackendConfig> {
    let pods = PodSources::Ranges(vec!["10.0.0.0/8".parse()?]);
    // The sockets of this machine are not ours.
    let ebpf = EbpfConfig { sockets: Sockets::None, ..EbpfConfig::default() };
    Ok(BackendConfig { pods, ebpf, ..BackendConfig::default() })
}

fn resident_mb() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes: f64 = line.unwrap_or("0").trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes / 1024.0)
}

/// What the kernel says that the pinned BPF maps take.
fn maps_mb() -> anyhow::Result<f64> {
    let pins = EbpfConfig::default().pins;
    let folders = std::fs::read_dir(&pins).into_iter().flatten().flatten();
    let folders =
        folders.filter(|folder| folder.file_name().to_string_lossy().starts_with("maps-"));
    let mut bytes = 0.0;
    for pin in folders.flat_map(|folder| std::fs::read_dir(folder.path())).flatten() {
        let map = MapData::from_pin(pin?.path())?;
        let descriptor = map.fd().as_fd().as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))?;
        let line = info.lines().find_map(|line| line.strip_prefix("memlock:"));
        bytes += line.unwrap_or("0").trim().parse::<f64>()?;
    }
    Ok(bytes / 1024.0 / 1024.0)
}

fn service(number: u32) -> anyhow::Result<Service> {
    let address = format!("172.{}.{}.{}", 16 + (number >> 16), (number >> 8) & 255, number & 255);
    Ok(serde_json::from_value(json!({
        "metadata": {"namespace": "bench", "name": format!("service-{number}")},
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
        },
    }))?)
}

fn slice(number: u32, endpoints: u32) -> anyhow::Result<EndpointSlice> {
    let endpoints: Vec<_> = (0..endpoints)
        .map(|index| {
            let at = number * 16 + index;
            let address = format!("10.{}.{}.{}", (at >> 16) & 255, (at >> 8) & 255, at & 255);
            json!({
                "addresses": [address],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": format!("node-{}", index),
            })
        })
        .collect();
    Ok(serde_json::from_value(json!({
        "metadata": {
            "namespace": "bench", "name": format!("service-{number}-abcde"),
            "labels": {"kubernetes.io/service-name": format!("service-{number}")},
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }))?)
}
