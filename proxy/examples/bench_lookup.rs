//! What more Services cost a connection: two network namespaces, one with few Services and one with many, in
//! turns, so that whatever else the machine does concerns both alike.
//!
//! `cargo run --release -p keelson-proxy --example bench_lookup -- --services 10000 --endpoints 10`

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use keelson_netlink::netns::Netns;
use keelson_netlink::route::{Route, Rtnl, Scope};
use keelson_proxy::backend::{Backend, BackendConfig, Mode, PodSources};
use keelson_proxy::diff::{Plans, advance};
use keelson_proxy::model::{Model, NodeFacts};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;

#[derive(Parser)]
struct Flags {
    /// Services in the second namespace; the first has one
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// Endpoints of each, except the one that is asked
    #[arg(long, default_value_t = 10)]
    endpoints: u32,
    /// Backend
    #[arg(long, default_value = "nftables")]
    mode: String,
    /// How often the two take turns
    #[arg(long, default_value_t = 200)]
    rounds: u32,
    /// Connections in a turn
    #[arg(long, default_value_t = 100)]
    connections: u32,
}

/// The node's only address, with a server.
const NODE: &str = "198.18.0.2";
const ASKED: &str = "10.96.0.1:80";

fn main() -> Result<()> {
    use std::io::Write;
    let flags = Flags::parse();
    let modes = Mode::candidates(&flags.mode).context("--mode: not a mode")?;
    let mode = *modes.first().context("--mode: none")?;
    let few = Side::new(mode, 1, flags.endpoints)?;
    let many = Side::new(mode, flags.services, flags.endpoints)?;
    let mut ratios = Vec::new();
    let (mut all_few, mut all_many, mut all_direct) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..flags.rounds {
        let direct = few.connect(few.direct, flags.connections)?;
        let one = few.connect(ASKED.parse()?, flags.connections)?;
        let other = many.connect(ASKED.parse()?, flags.connections)?;
        ratios.push(median(&other) / median(&one));
        all_direct.extend(direct);
        all_few.extend(one);
        all_many.extend(other);
    }
    ratios.sort_by(f64::total_cmp);
    let at = |share: f64| ratios[(ratios.len() as f64 * share) as usize];
    let mut out = std::io::stdout().lock();
    writeln!(out, "{mode}: 1 Service against {} x {}", flags.services, flags.endpoints)?;
    for (name, times) in [
        ("direct, median (µs)", &all_direct),
        ("through 1 Service, median (µs)", &all_few),
        ("through one of many, median (µs)", &all_many),
    ] {
        writeln!(out, "  {name:<36} {:>8.2}", median(times) * 1e6)?;
    }
    let ratio = median(&all_many) / median(&all_few);
    writeln!(out, "  {:<36} {ratio:>8.3}", "many over one, of these medians")?;
    let text = format!("{:.3} ({:.3} to {:.3})", at(0.5), at(0.25), at(0.75));
    writeln!(out, "  {:<36} {text}", "many over one, by turns (quartiles)")?;
    Ok(())
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// A namespace with a server and Services.
struct Side {
    netns: Netns,
    direct: SocketAddr,
    _backend: Box<dyn Backend>,
}

impl Side {
    fn new(mode: Mode, services: u32, endpoints: u32) -> Result<Side> {
        let netns = Netns::anonymous()?;
        let listener = netns.run(|| -> Result<TcpListener> {
            let mut rtnl = Rtnl::open()?;
            rtnl.set_up("lo")?;
            rtnl.ensure_address(1, format!("{NODE}/32").parse()?)?;
            rtnl.ensure_route(&Route {
                link: Some(1),
                scope: Scope::Link,
                ..Route::to("0.0.0.0/0".parse()?)
            })?;
            Ok(TcpListener::bind((NODE, 0))?)
        })??;
        let direct = listener.local_addr()?;
        std::thread::spawn(move || listener.incoming().flatten().for_each(drop));
        let mut backend = netns.run(|| mode.open(config()))??;
        backend.adopt(&plans(services, endpoints, direct)?)?;
        Ok(Side { netns, direct, _backend: backend })
    }

    fn connect(&self, to: SocketAddr, count: u32) -> Result<Vec<f64>> {
        self.netns.run(|| {
            let mut times = Vec::new();
            // The first ones warm up what the other side has cooled down.
            for number in 0..count + 10 {
                let began = Instant::now();
                let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
                if number >= 10 {
                    times.push(began.elapsed().as_secs_f64());
                }
                let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
                setsockopt(&stream, sockopt::Linger, &at_once)?;
            }
            Ok(times)
        })?
    }
}

fn config() -> BackendConfig {
    let pods = PodSources::Ranges("10.244.0.0/16".parse().into_iter().collect());
    BackendConfig { pods, ..BackendConfig::default() }
}

fn plans(services: u32, endpoints: u32, server: SocketAddr) -> Result<Plans> {
    let facts = NodeFacts { name: "here".to_owned(), knows_pods: true, ..NodeFacts::default() };
    let mut model = Model::new(facts);
    for number in 0..services {
        let [_, _, high, low] = (number + 1).to_be_bytes();
        let address = format!("10.96.{high}.{low}");
        let name = format!("s{number}");
        model.apply_service(&serde_json::from_value(json!({
            "metadata": {"namespace": "bench", "name": name},
            "spec": {
                "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
                "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
            },
        }))?);
        let asked = number == 0;
        let count = if asked { 1 } else { endpoints };
        let at = |index: u32| {
            let [_, a, b, c] = (number * endpoints + index).to_be_bytes();
            if asked { server.ip() } else { IpAddr::from([11, a, b, c]) }
        };
        model.apply_slice(&serde_json::from_value(json!({
            "metadata": {
                "namespace": "bench", "name": format!("{name}-x"),
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "endpoints": (0..count).map(|i| json!({"addresses": [at(i)]})).collect::<Vec<_>>(),
            "ports": [{"name": "http", "protocol": "TCP",
                "port": if asked { server.port() } else { 8080 }}],
        }))?);
    }
    let mut plans = Plans::new();
    let dirty = model.take_dirty();
    advance(&mut plans, dirty, |key| model.plan(key));
    Ok(plans)
}
