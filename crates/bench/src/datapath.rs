//! `bench datapath`: what connections and packets cost through a Service, over direct ones, under each proxy.
//!
//! ```text
//!   client pod ──┐                                        a world for each proxy, all at once:
//!                node: the proxy under measurement ── eth0 ══ outside: clients of node ports, the way to the API server
//!   server pod ──┘
//! ```
//!
//! The worlds take turns in slices of some milliseconds, all on one CPU, and a ratio is the median of the ratios of
//! neighbouring slices: whatever else the machine does hits all alike.

mod load;
mod objects;
mod proxy;
mod tally;
mod world;

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use kube::Client;

use crate::cluster::{Cluster, Ground, ServerOptions};
use crate::output::OutputOptions;
use crate::report::Report;
use crate::services;
use crate::{api, bpf};
use proxy::Contender;
use tally::Tally;
use world::World;

/// What to measure.
#[derive(Debug, Clone, Args)]
pub(crate) struct DatapathOptions {
    /// Services that are there beside the measured one
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=50_000))]
    services: u32,
    /// Endpoints of each of them
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    endpoints: u32,
    /// Slices of each kind
    #[arg(long, default_value_t = 40, value_name = "N", value_parser = clap::value_parser!(u32).range(3..))]
    rounds: u32,
    /// Modes of keelson-proxy, the one to compare first
    #[arg(long, value_delimiter = ',', default_value = "ebpf,nftables", value_name = "MODE,MODE")]
    modes: Vec<String>,
    /// A kube-proxy to measure in the same run
    #[arg(long, value_name = "PATH")]
    peer_kube_proxy: Option<PathBuf>,
    /// Modes of --peer-kube-proxy
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "nftables,iptables",
        value_name = "MODE,MODE"
    )]
    peer_modes: Vec<String>,
    #[command(flatten)]
    server: ServerOptions,
    #[command(flatten)]
    output: OutputOptions,
}

/// Measures all worlds together.
///
/// # Errors
/// When a world cannot be made or a proxy does not put its Services in force.
pub(crate) fn run(options: &DatapathOptions) -> Result<()> {
    bpf::private_mounts()?;
    let contenders =
        proxy::contenders(&options.modes, options.peer_kube_proxy.as_deref(), &options.peer_modes)?;
    let mut report = Report::new("datapath");
    report.notes.push(format!(
        "{} other Services with {} endpoints each; client and server on one CPU; direct is to the pod in the same world",
        options.services, options.endpoints
    ));
    let cluster = Cluster::start(&options.server)?;
    let outcome = cluster.inside(async |ground, client| {
        report.notes.push(ground.describe());
        measure(&mut report, ground, client, contenders, options).await
    });
    cluster.stop(&mut report)?;
    options.output.write(&report)?;
    outcome
}

async fn measure(
    report: &mut Report,
    ground: &Ground<'_>,
    client: &Client,
    contenders: Vec<Contender>,
    options: &DatapathOptions,
) -> Result<()> {
    world::route_between(ground)?;
    api::create(client, &services::node()).await?;
    eprintln!("Writing {} Services", options.services);
    services::add(client, 0..options.services, options.endpoints).await?;
    for object in objects::measured() {
        api::create(client, &object).await?;
    }
    let mut worlds = Vec::new();
    let contenders = contenders.into_iter().map(Some).chain([None]);
    for (contender, number) in contenders.zip(1..) {
        worlds.push(World::make(ground, contender, number)?);
        if let Some(world) = worlds.last() {
            eprintln!("Ready: {}", world.label);
        }
    }
    let mut tally = Tally::default();
    let outcome = load::run(&worlds, options.rounds, &mut tally).await;
    tally.enter(report, &worlds);
    for world in worlds {
        world.stop().await?;
    }
    outcome
}
