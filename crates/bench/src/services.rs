//! `bench services`: how long a service proxy takes until its rules are in force, and what it costs.

mod churn;
mod objects;
mod probe;
mod work;

pub(crate) use objects::{SERVICES, add, node, slice};

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use keelson_tests::node::program;
use kube::Client;

use crate::cluster::{Cluster, Ground, ServerOptions};
use crate::output::OutputOptions;
use crate::report::Report;
use crate::subject::version_label;
use crate::{api, bpf};

/// What to measure.
#[derive(Debug, Clone, Args)]
pub(crate) struct ServicesOptions {
    /// Numbers of Services to measure with, each with --endpoints endpoints
    #[arg(long, value_delimiter = ',', default_value = "2,1000,10000", value_name = "N,N")]
    services: Vec<u32>,
    /// Endpoints of each Service
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    endpoints: u32,
    /// New Services, one at a time, per number of Services
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=200))]
    changes: u32,
    /// How long to look at the idle proxy
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    idle: u64,
    /// Also changes this many EndpointSlices a second, for --churn-secs, with the largest number of Services
    #[arg(long, default_value_t = 0, value_name = "N")]
    churn: u32,
    /// How long the changes of --churn go on
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    churn_secs: u64,
    /// Value of --proxy-mode: nftables, iptables, iptables-nft, iptables-legacy, ipvs, ebpf
    #[arg(long, default_value = "nftables", value_name = "MODE")]
    mode: String,
    /// A kube-proxy to measure in the same run, in the same mode
    #[arg(long, value_name = "PATH")]
    peer_kube_proxy: Option<PathBuf>,
    #[command(flatten)]
    server: ServerOptions,
    #[command(flatten)]
    output: OutputOptions,
}

/// A proxy to measure.
#[derive(Debug)]
struct Subject {
    label: String,
    program: PathBuf,
    /// Value of its --proxy-mode.
    mode: String,
}

/// Measures every proxy with the same objects, then adds more of them.
///
/// # Errors
/// When keelson cannot be measured. A peer that cannot be is a note in the report.
pub(crate) fn run(options: &ServicesOptions) -> Result<()> {
    if options.mode == bpf::MODE {
        bpf::private_mounts()?;
    }
    let subjects = subjects(options)?;
    let mut report = Report::new("services");
    report
        .notes
        .push(format!("mode {}, {} endpoints per Service", options.mode, options.endpoints));
    let cluster = Cluster::start(&options.server)?;
    let outcome = cluster.inside(async |ground, client| {
        report.notes.push(ground.describe());
        probe::prepare(ground)?;
        measure(&mut report, ground, client, &subjects, options).await
    });
    cluster.stop(&mut report)?;
    options.output.write(&report)?;
    outcome
}

fn subjects(options: &ServicesOptions) -> Result<Vec<Subject>> {
    let mut subjects = vec![Subject {
        label: "keelson".into(),
        program: program("keelson-proxy")?,
        mode: options.mode.clone(),
    }];
    if let Some(peer) = &options.peer_kube_proxy {
        if !Path::new(peer).is_file() {
            bail!("--peer-kube-proxy: there is no file {}", peer.display());
        }
        let label = version_label("kube-proxy", peer);
        // kube-proxy takes whichever iptables is installed under that name.
        let mode = if options.mode.starts_with("iptables") { "iptables" } else { &options.mode };
        subjects.push(Subject { label, program: peer.clone(), mode: mode.to_owned() });
    }
    Ok(subjects)
}

async fn measure(
    report: &mut Report,
    ground: &Ground<'_>,
    client: &Client,
    subjects: &[Subject],
    options: &ServicesOptions,
) -> Result<()> {
    let mut sizes = options.services.clone();
    sizes.sort_unstable();
    let backend = probe::Backend::listen(ground)?;
    api::create(client, &objects::node()).await?;
    let mut there = 0;
    for &size in &sizes {
        eprintln!("Writing Services {there} to {size}");
        objects::add(client, there..size, options.endpoints).await?;
        there = size;
        for (index, subject) in subjects.iter().enumerate() {
            eprintln!("Measuring {} with {size} Services", subject.label);
            let endpoints = options.endpoints;
            let churn = churn::Churn {
                per_second: if Some(&size) == sizes.last() { options.churn } else { 0 },
                duration: Duration::from_secs(options.churn_secs),
                services: size,
                endpoints,
            };
            let (changes, idle) = (options.changes, options.idle);
            let work =
                work::Work { ground, client, subject, size, endpoints, changes, idle, churn };
            let outcome = work.measure(report, &backend).await;
            match outcome {
                Err(error) if index > 0 => {
                    report
                        .notes
                        .push(format!("{} could not be measured: {error:#}", subject.label));
                }
                other => other?,
            }
        }
    }
    for subject in subjects {
        work::compare_lookups(report, &subject.label, &sizes, options.endpoints);
    }
    Ok(())
}
