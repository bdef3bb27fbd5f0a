//! keelson's tasks.

mod bench;
mod build;
mod down;
mod ebpf;
mod fuzz;
mod install;
mod shell;
mod soak;
mod test;
mod up;
mod vm;

use clap::{Parser, Subcommand};

/// Build, try, test and measure keelson.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing, build, start a node on this machine and show a web site running on it
    Up(up::UpArgs),
    /// Stop the node and remove everything that it made
    Down(down::DownArgs),
    /// Install what the tests need and run every lane that this machine can run
    Test(test::TestArgs),
    /// Measure keelson, and its peers beside it in the same run
    Bench(bench::BenchArgs),
    /// Kill a node's processes, fill its disk and step its clock, round after round, and print what was lost
    Soak(soak::SoakArgs),
    /// Feed every parser of foreign bytes with what libFuzzer thinks of
    Fuzz(fuzz::FuzzArgs),
    /// Build the BPF programs again, whose objects are part of the repository
    Ebpf(ebpf::EbpfArgs),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().task {
        Task::Up(args) => up::run(&args),
        Task::Down(args) => down::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Soak(args) => soak::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Ebpf(args) => ebpf::run(&args),
    }
}
