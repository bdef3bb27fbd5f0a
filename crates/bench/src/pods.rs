//! `bench pods`: how fast pods start and end, and what the node spends on it.

pub(crate) mod manifest;
pub(crate) mod watch;
mod work;

use anyhow::{Context, Result};
use clap::Args;
use kube::Client;

use crate::cluster::{Cluster, ServerOptions};
use crate::output::OutputOptions;
use crate::report::{Report, Row, Unit};
use crate::subject::kubelet::PeerKubelet;
use crate::subject::node::NodeUnderTest;

/// What to measure.
#[derive(Debug, Clone, Args)]
pub(crate) struct PodsOptions {
    /// Pods that are started and deleted one at a time
    #[arg(long, default_value_t = 30, value_name = "N")]
    serial: u32,
    /// Pods that are started at once
    #[arg(long, default_value_t = 40, value_name = "N")]
    burst: u32,
    /// How often that is done; the median counts
    #[arg(long, default_value_t = 3, value_name = "N")]
    bursts: u32,
    /// How long to look at the idle agent
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    idle: u64,
    /// Also measure with pods that the embedded scheduler has to place
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    scheduler: bool,
    /// A kubelet to measure in the same run (with Debian's containerd and CNI plugins)
    #[arg(long, value_name = "PATH")]
    peer_kubelet: Option<std::path::PathBuf>,
    #[command(flatten)]
    server: ServerOptions,
    #[command(flatten)]
    output: OutputOptions,
}

/// Measures keelson, then each peer, on nodes of their own.
///
/// # Errors
/// When keelson cannot be measured. A peer that cannot be is a note in the report.
pub(crate) fn run(options: &PodsOptions) -> Result<()> {
    let mut report = Report::new("pods");
    let cluster = Cluster::start(&options.server)?;
    let outcome = cluster.inside(async |ground, client| {
        report.notes.push(ground.describe());
        let node = NodeUnderTest::keelson(ground, client).await?;
        finish(&mut report, node, client, options, ground.has_scheduler()).await
    });
    cluster.stop(&mut report)?;
    if options.peer_kubelet.is_some()
        && let Err(error) = peer(&mut report, options)
    {
        report.notes.push(format!("the kubelet could not be measured: {error:#}"));
    }
    options.output.write(&report)?;
    outcome
}

fn peer(report: &mut Report, options: &PodsOptions) -> Result<()> {
    let Some(path) = &options.peer_kubelet else { return Ok(()) };
    let cluster = Cluster::start(&options.server)?;
    let outcome = cluster.inside(async |ground, client| {
        let kubelet = PeerKubelet::prepare(ground, path)?;
        let node = NodeUnderTest::kubelet(ground, client, &kubelet).await?;
        finish(report, node, client, options, ground.has_scheduler()).await
    });
    cluster.stop(report)?;
    outcome
}

/// Measures a node and stops it.
async fn finish(
    report: &mut Report,
    node: NodeUnderTest,
    client: &Client,
    options: &PodsOptions,
    has_scheduler: bool,
) -> Result<()> {
    let result = measure(report, &node, client, options, has_scheduler).await;
    let result = result.with_context(|| node.log_tail());
    let stopped = node.stop().await;
    result.and(stopped)
}

async fn measure(
    report: &mut Report,
    node: &NodeUnderTest,
    client: &Client,
    options: &PodsOptions,
    has_scheduler: bool,
) -> Result<()> {
    let mut bench = work::Bench::new(report, node, client).await?;
    bench.idle(options.idle, "idle, before the first pod", Some(0.1)).await?;
    bench.memory("idle", Some(20.0));
    bench.serial(options.serial, true).await?;
    if has_scheduler && options.scheduler {
        bench.serial(options.serial, false).await?;
    }
    bench.bursts(options.bursts, options.burst).await?;
    let gone = format!("idle, {} pods gone", options.burst);
    bench.idle(options.idle, &gone, Some(0.1)).await?;
    bench.memory(&format!("after {} pods", options.burst), Some(30.0));
    Ok(())
}

/// The rows, with the goals where there is one.
mod rows {
    use super::{Row, Unit};

    pub(super) fn start(with_node_name: bool) -> Row {
        if with_node_name {
            Row::new("pod start", Unit::Seconds).goal(0.12)
        } else {
            Row::new("pod start with the scheduler", Unit::Seconds)
        }
    }

    pub(super) fn end(with_node_name: bool) -> Row {
        let scheduled = if with_node_name { "" } else { " (scheduled)" };
        Row::new(format!("pod deletion{scheduled}"), Unit::Seconds)
    }

    pub(super) fn burst(pods: u32) -> Row {
        let mut row = Row::new(format!("{pods} pods at once, all Ready"), Unit::Seconds);
        row.goal = (pods == 40).then_some(2.5);
        row
    }

    pub(super) fn burst_gone(pods: u32) -> Row {
        Row::new(format!("{pods} pods deleted at once, all gone"), Unit::Seconds)
    }

    pub(super) fn cpu(pods: u32, part: &str) -> Row {
        Row::new(format!("CPU for {pods} pods: {part}"), Unit::CpuSeconds)
    }

    pub(super) fn memory(who: &str, when: &str) -> Row {
        Row::new(format!("memory of {who}, {when}"), Unit::Mebibytes)
    }

    pub(super) fn idle(when: &str) -> Row {
        Row::new(format!("agent CPU, {when}"), Unit::PercentOfCore)
    }
}
