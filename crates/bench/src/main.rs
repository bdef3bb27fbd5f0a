//! keelson's benchmarks: called by `cargo xtask bench`, which builds everything in release mode first.

mod api;
mod bpf;
mod cluster;
mod cpu;
mod datapath;
mod machine;
mod output;
mod pods;
mod process;
mod report;
mod services;
mod stats;
mod subject;

use clap::{Parser, Subcommand};

/// Measure keelson, and its peers beside it in the same run.
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Pod start, deletion, a burst of pods; CPU time and memory of agent and containerd
    Pods(pods::PodsOptions),
    /// Connections and packets through Services over direct ones, under each proxy
    Datapath(datapath::DatapathOptions),
    /// The service proxy with few and with many Services
    Services(services::ServicesOptions),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().bench {
        Bench::Pods(options) => pods::run(&options),
        Bench::Datapath(options) => datapath::run(&options),
        Bench::Services(options) => services::run(&options),
    }
}
