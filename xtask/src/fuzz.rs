//! `cargo xtask fuzz`: libFuzzer on every parser of foreign bytes, with a stable compiler.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::build::{self, Profile};
use crate::{install, shell};

#[derive(clap::Args)]
pub(crate) struct FuzzArgs {
    /// How many seconds to fuzz, all targets together
    #[arg(long, default_value_t = SHORT)]
    time: u64,
    /// Run one target once, with the bytes of this file, such as one that a crash left
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// The targets (see the folders in fuzz/seeds); without any, all of them
    targets: Vec<String>,
}

/// Seconds in all, in CI.
const SHORT: u64 = 60;

impl Default for FuzzArgs {
    fn default() -> Self {
        Self { time: SHORT, input: None, targets: Vec::new() }
    }
}

/// What one target has to get by with: an input that needs more is a finding.
const LIMITS: [&str; 4] =
    ["-timeout=10", "-rss_limit_mb=1024", "-malloc_limit_mb=512", "-max_len=8192"];

/// Fuzzes, and names each input that broke something.
///
/// # Errors
/// When a target breaks, there is no such target, or nothing can be built.
pub(crate) fn run(args: &FuzzArgs) -> Result<()> {
    install::for_fuzz()?;
    let all = targets()?;
    if let Some(unknown) = args.targets.iter().find(|target| !all.contains(target)) {
        bail!("there is no target {unknown}, only {}", all.join(", "));
    }
    let chosen = if args.targets.is_empty() { all } else { args.targets.clone() };
    let program = build()?;
    if let Some(input) = &args.input {
        let [target] = chosen.as_slice() else { bail!("--input needs one target") };
        return shell::run(fuzzer(&program, target).arg(input));
    }
    let broken = fuzz_all(&program, &chosen, args.time)?;
    if broken.is_empty() {
        return Ok(());
    }
    bail!(
        "broken: {}. The inputs are in {}; to see one again: cargo xtask fuzz TARGET --input FILE. \
         Correct the bug, and make the input a seed and a test of the parser",
        broken.join(", "),
        folder("crashes").display(),
    )
}

/// Every target has seeds.
fn targets() -> Result<Vec<String>> {
    let folder = seeds();
    let entries = std::fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

fn seeds() -> PathBuf {
    shell::root().join("fuzz/seeds")
}

/// Where a target's inputs are kept from run to run.
fn folder(kind: &str) -> PathBuf {
    build::target_dir().join("fuzz").join(kind)
}

/// libFuzzer with all targets. Only keelson's own crates are compiled for it; all others are those of the tests.
fn build() -> Result<PathBuf> {
    let mut cargo = build::cargo("test", Profile::Dev);
    cargo
        .env("RUSTC_WORKSPACE_WRAPPER", shell::root().join("fuzz/rustc-with-coverage"))
        .args(["--workspace", "--bin", "keelson-fuzz", "--features", "keelson-fuzz/libfuzzer"])
        .args(["--no-run", "--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit());
    let messages = shell::read(&mut cargo)?;
    let program = messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let ours = message.pointer("/target/name")? == "keelson-fuzz";
        let program = message.get("executable")?.as_str()?;
        ours.then(|| PathBuf::from(program))
    });
    program.context("cargo built no fuzzer")
}

fn fuzzer(program: &Path, target: &str) -> Command {
    let mut command = Command::new(program);
    command.env("KEELSON_FUZZ_TARGET", target).env("RUST_BACKTRACE", "1").args(LIMITS);
    command
}

/// Each target for its share of the time, as many at once as there are processors; returns those that broke.
fn fuzz_all(program: &Path, targets: &[String], seconds: u64) -> Result<Vec<String>> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(targets.len());
    let share = (seconds * u64::try_from(workers)? / u64::try_from(targets.len())?).max(1);
    let next = AtomicUsize::new(0);
    let broken = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(target) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = fuzz(program, target, share) {
                        println!("{target}: BROKEN\n{error:#}");
                        broken.lock().unwrap_or_else(PoisonError::into_inner).push(target.clone());
                    }
                }
            });
        }
    });
    Ok(broken.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// What libFuzzer printed from the first complaint on, without the standard library's part of the backtrace.
fn essence(log: &str) -> String {
    let complaint = |line: &&str| line.contains("panicked at") || line.contains("ERROR: libFuzzer");
    let from_there = log.lines().skip_while(|line| !complaint(line));
    let ours = from_there.filter(|line| !line.contains("at /rustc/"));
    ours.take(40).collect::<Vec<_>>().join("\n")
}

/// One target: first what is known, then what libFuzzer makes of it.
fn fuzz(program: &Path, target: &str, seconds: u64) -> Result<()> {
    let corpus = folder("corpus").join(target);
    let crashes = folder("crashes").join(target);
    for folder in [&corpus, &crashes] {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let output = fuzzer(program, target)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", crashes.display()))
        .arg("-print_final_stats=1")
        .args([&corpus, &seeds().join(target)])
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let log = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{}", essence(&log));
    }
    let stat = |name: &str| {
        let value = log.lines().find_map(|line| line.strip_prefix(&format!("stat::{name}:")));
        value.unwrap_or_default().trim().to_owned()
    };
    println!(
        "{target}: {} inputs, {} a second",
        stat("number_of_executed_units"),
        stat("average_exec_per_sec")
    );
    Ok(())
}
