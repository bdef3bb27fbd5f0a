//! `cargo xtask bench`: builds everything in release mode and hands over to the programs that measure.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::build::{self, Profile};
use crate::{install, shell};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct BenchArgs {
    /// `pods`, `services`, `datapath` or `cni`, and their flags; --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let asks_for_help =
        args.args.is_empty() || args.args.iter().any(|a| a == "--help" || a == "-h");
    if asks_for_help {
        return shell::run(
            build::cargo("run", Profile::Dev)
                .args(["--quiet", "-p", "keelson-bench", "--"])
                .args(help_of(&args.args)),
        );
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("the benches need root: namespaces, cgroups, containerd");
    }
    install::for_up()?;
    let bin = build::node_programs(Profile::Release)?;
    if args.args.first().is_some_and(|a| a == "cni") {
        return cni(&bin, &args.args[1..]);
    }
    shell::run(build::cargo("build", Profile::Release).args(["-p", "keelson-bench"]))?;
    let mut bench = Command::new(bin.join("keelson-bench"));
    shell::run(bench.env("KEELSON_BIN_DIR", &bin).args(&args.args))?;
    if args.args.first().is_some_and(|a| a == "datapath") {
        return programs();
    }
    Ok(())
}

/// What no proxy has to run for: the BPF programs alone, with more Services, and forwarding without connections.
fn programs() -> Result<()> {
    for example in ["bench_connect", "bench_xdp"] {
        let mut command = build::cargo("run", Profile::Release);
        shell::run(command.args(["-p", "keelson-ebpf-objects", "--example", example]))?;
    }
    Ok(())
}

fn help_of(args: &[OsString]) -> Vec<OsString> {
    if args.is_empty() { vec!["--help".into()] } else { args.to_vec() }
}

/// The plugin's own bench is an example of its crate: it needs no node.
fn cni(bin: &Path, args: &[OsString]) -> Result<()> {
    if !shell::root().join("cni/examples/bench_add.rs").is_file() {
        bail!("there is no cni/examples/bench_add.rs: the plugin has no bench yet");
    }
    let mut example = build::cargo("run", Profile::Release);
    example
        .args(["-p", "keelson-cni", "--example", "bench_add", "--"])
        .arg(bin.join("keelson-cni"));
    shell::run(example.env("KEELSON_BIN_DIR", bin).args(args))
}
