//! `cargo xtask test`: every lane that this machine can run; the others are named with the reason.

use std::process::Command;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::build::{self, Profile};
use crate::{ebpf, fuzz, install, shell, vm};

#[derive(clap::Args)]
pub(crate) struct TestArgs {
    /// Run only this lane (may be given several times)
    #[arg(long, value_enum)]
    lane: Vec<Lane>,
    /// The kernel of the emulated machine, from the Debian release that has it
    #[arg(long, value_enum, default_value = "6.1")]
    kernel: vm::Version,
    /// Arguments of the tests in the lanes vm, vm-programs and vm-node, such as `--backend ipvs corners::` or `pods::`
    #[arg(last = true)]
    suite: Vec<String>,
}

/// A kind of tests by what it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Lane {
    /// Formatting, clippy, and cargo-deny where it is installed
    Lint,
    /// Pure functions, tables and properties: needs nothing
    Unit,
    /// Every parser of foreign bytes under libFuzzer, for a minute: needs a C++ compiler
    Fuzz,
    /// The BPF objects of the repository are what their source gives: needs Debian's compiler for BPF
    Ebpf,
    /// Real containerd, runc, kernel, nftables, registry and kubectl: needs root
    Node,
    /// Hostile pods, registries and callers against a node, alone: they are part of lane node, too
    Hostile,
    /// Agent and proxy against kube-apiserver and etcd: needs root and `KUBEBUILDER_ASSETS`
    Apiserver,
    /// The proxy's behaviour suite under a kernel of Debian's in an emulated machine: needs qemu
    Vm,
    /// The tests of the BPF programs in that machine, and what its kernel's verifier says of them
    VmPrograms,
    /// Pods and Services with containerd and runc in that machine, which has cgroup v2 alone
    VmNode,
}

/// The folder of envtest's programs.
const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// What became of a lane.
enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

pub(crate) fn run(args: &TestArgs) -> Result<()> {
    install::for_test()?;
    let all = Lane::value_variants().iter().copied().filter(|lane| *lane != Lane::Hostile);
    let chosen: Vec<Lane> = if args.lane.is_empty() { all.collect() } else { args.lane.clone() };
    let mut outcomes = Vec::new();
    for lane in chosen {
        println!("\n==> lane {lane:?}");
        let outcome = match lane {
            Lane::Lint => lint(),
            Lane::Unit => unit(),
            Lane::Fuzz => fuzz(),
            Lane::Ebpf => objects(),
            Lane::Node => node(),
            Lane::Hostile => hostile(),
            Lane::Apiserver => apiserver(),
            Lane::Vm => in_machine(args.kernel, |kernel| vm::run(kernel, &args.suite)),
            Lane::VmPrograms => {
                in_machine(args.kernel, |kernel| vm::programs::run(kernel, &args.suite))
            }
            Lane::VmNode => in_machine(args.kernel, |kernel| vm::node::run(kernel, &args.suite)),
        };
        outcomes.push((lane, outcome));
    }
    println!("\n==> result");
    let mut failed = false;
    for (lane, outcome) in &outcomes {
        match outcome {
            Outcome::Passed => println!("{lane:?}: passed"),
            Outcome::Skipped(why) => println!("{lane:?}: SKIPPED, {why}"),
            Outcome::Failed(why) => {
                failed = true;
                println!("{lane:?}: FAILED, {why}");
            }
        }
    }
    for (lane, why) in NOT_YET {
        println!("{lane}: SKIPPED, {why}");
    }
    if failed {
        bail!("at least one lane failed");
    }
    Ok(())
}

/// Lanes that do not run by themselves yet: named, so that nobody takes their absence for a pass.
const NOT_YET: &[(&str, &str)] =
    &[("conformance", "needs a cluster and e2e.test, and there is no runner for them yet")];

fn lint() -> Outcome {
    let mut fmt = build::cargo("fmt", Profile::Dev);
    fmt.args(["--all", "--check"]);
    let mut clippy = build::cargo("clippy", Profile::Dev);
    clippy.args(["--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]);
    let outcome = all_of(&mut [fmt, clippy]);
    if !matches!(outcome, Outcome::Passed) {
        return outcome;
    }
    if !shell::has("cargo-deny") {
        println!(
            "cargo-deny is not installed: licences, bans and sources were not checked (cargo install cargo-deny)"
        );
        return Outcome::Passed;
    }
    let mut deny = build::cargo("deny", Profile::Dev);
    deny.args(["check", "licenses", "bans", "sources"]);
    all_of(&mut [deny])
}

fn unit() -> Outcome {
    let mut tests = build::cargo("test", Profile::Dev);
    tests.args(["--workspace", "--lib", "--bins", "--no-fail-fast"]);
    all_of(&mut [tests])
}

fn fuzz() -> Outcome {
    if let Err(error) = install::for_fuzz() {
        return Outcome::Skipped(format!("{error:#}"));
    }
    match fuzz::run(&fuzz::FuzzArgs::default()) {
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

/// Without the compiler nobody can say whether they are right.
fn objects() -> Outcome {
    if let Err(error) = install::for_ebpf() {
        return Outcome::Skipped(format!("{error:#}"));
    }
    match ebpf::check() {
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

fn node() -> Outcome {
    let mut tests = match tests_of_nodes() {
        Ok(tests) => tests,
        Err(outcome) => return outcome,
    };
    match install::debian_kubectl() {
        Ok(kubectl) => {
            tests.env("KEELSON_KUBECTL_120", &kubectl).env("KEELSON_TEST_KUBECTL", &kubectl);
        }
        Err(error) => println!("SKIPPED with Debian's kubectl: {error:#}"),
    }
    // Its own lane has the tests that need these.
    tests.env_remove(ASSETS);
    tests.args(["--workspace", "--test", "*"]).args(TWO_AT_A_TIME);
    all_of(&mut [tests])
}

fn hostile() -> Outcome {
    match tests_of_nodes() {
        Ok(mut tests) => {
            tests.args(["-p", "keelson-tests", "--test", "hostile", "--", "--nocapture"]);
            all_of(&mut [tests])
        }
        Err(outcome) => outcome,
    }
}

fn apiserver() -> Outcome {
    if std::env::var_os(ASSETS).is_none() {
        return Outcome::Skipped(format!("{ASSETS} names no folder with kube-apiserver and etcd"));
    }
    match tests_of_nodes() {
        Ok(mut tests) => {
            tests.args(["-p", "keelson-tests", "--test", "apiserver"]).args(TWO_AT_A_TIME);
            all_of(&mut [tests])
        }
        Err(outcome) => outcome,
    }
}

/// Each of these tests runs a whole node.
const TWO_AT_A_TIME: [&str; 3] = ["--no-fail-fast", "--", "--test-threads=2"];

/// `cargo test` with the programs that nodes run, which are built; or why there can be none.
fn tests_of_nodes() -> Result<Command, Outcome> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Outcome::Skipped("it needs root: namespaces, cgroups, containerd".into()));
    }
    let bin = build::node_programs(Profile::Dev)
        .map_err(|error| Outcome::Failed(format!("{error:#}")))?;
    let mut tests = build::cargo("test", Profile::Dev);
    tests.env("KEELSON_BIN_DIR", bin);
    Ok(tests)
}

fn in_machine(version: vm::Version, tests: impl FnOnce(&vm::Kernel) -> Result<()>) -> Outcome {
    match vm::Kernel::of(version).map(|kernel| tests(&kernel)) {
        Ok(Ok(())) => Outcome::Passed,
        Ok(Err(error)) => Outcome::Failed(format!("{error:#}")),
        Err(error) => Outcome::Skipped(format!("{error:#}")),
    }
}

fn all_of(commands: &mut [Command]) -> Outcome {
    for command in commands {
        if let Err(error) = shell::run(command) {
            return Outcome::Failed(format!("{error:#}"));
        }
    }
    Outcome::Passed
}
