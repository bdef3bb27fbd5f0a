//! Builds what a node runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::shell;

/// How much time to spend on building for how fast a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Release,
    Dev,
}

/// Builds `keelson`, `keelson-proxy` and the static `keelson-cni`, and returns the folder that holds all three.
///
/// # Errors
/// When cargo fails.
pub(crate) fn node_programs(profile: Profile) -> Result<PathBuf> {
    let mut agent = cargo("build", profile);
    agent.args(["-p", "keelson-agent", "-p", "keelson-proxy", "--bins"]);
    shell::run(&mut agent)?;
    // The plugin runs on whatever C library the node has: static, which cargo does only for an explicit target.
    let target = host_target()?;
    let mut cni = cargo("build", profile);
    cni.env("RUSTFLAGS", "-C target-feature=+crt-static").args([
        "-p",
        "keelson-cni",
        "--bins",
        "--target",
        &target,
    ]);
    shell::run(&mut cni)?;
    let folder = match profile {
        Profile::Release => "release",
        Profile::Dev => "debug",
    };
    let bin = target_dir().join(folder);
    let plugin = target_dir().join(&target).join(folder).join("keelson-cni");
    install_program(&plugin, &bin.join("keelson-cni"))?;
    Ok(bin)
}

/// cargo's output folder.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| shell::root().join("target"), PathBuf::from)
}

/// `cargo <verb>` in the workspace, in `profile`.
pub(crate) fn cargo(verb: &str, profile: Profile) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(shell::root()).arg(verb);
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    cargo
}

fn host_target() -> Result<String> {
    let version = shell::read(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|l| l.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

/// Replaces a program that may be running: beside it, then renamed over it.
fn install_program(from: &Path, to: &Path) -> Result<()> {
    let beside = to.with_extension("new");
    std::fs::copy(from, &beside).with_context(|| format!("cannot copy {}", from.display()))?;
    std::fs::rename(&beside, to).with_context(|| format!("cannot replace {}", to.display()))
}
