//! Stops a node and removes everything that it made. Works from what the system shows, not from what keelson remembers,
//! so that it also cleans up after a crash at any moment.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use super::layout::Layout;
use super::process;

/// How long containers may take to end when the whole node goes.
const CONTAINER_PATIENCE: Duration = Duration::from_secs(5);

/// Removes the node of `layout`.
///
/// # Errors
/// What could not be removed, after everything else has been.
pub fn run(layout: &Layout) -> Result<()> {
    let mut left: Vec<String> = Vec::new();
    if let Some(pid) = super::lock::holder(&layout.lock_file())? {
        process::end_all(&[pid], Signal::SIGTERM, Duration::from_secs(10));
    }
    let cgroups = cgroup_folders(&layout.cgroup_root());
    let containers: Vec<i32> = cgroups.iter().flat_map(|c| processes_below(c)).collect();
    process::end_all(&containers, Signal::SIGTERM, CONTAINER_PATIENCE);
    // Shims, containerd and the log writer all name our folders in their arguments.
    let folders = [layout.run_dir.as_path(), layout.state_dir.as_path()];
    process::end_all(
        &process::with_argument_below(&folders),
        Signal::SIGTERM,
        Duration::from_secs(5),
    );
    for mount in mounts_below(&folders)? {
        // One that went with the mount below it, or with its last process, is what we want.
        if let Err(error) = umount2(&mount, MntFlags::MNT_DETACH)
            && error != nix::errno::Errno::EINVAL
        {
            left.push(format!("mount {}: {error}", mount.display()));
        }
    }
    for folder in cgroups.iter().rev() {
        remove_cgroup(folder, &mut left);
    }
    if !layout.netns().exists()
        && layout.state_dir.exists()
        && let Err(error) = super::network::remove_tables()
    {
        left.push(format!("nftables: {error:#}"));
    }
    for netns in [layout.netns(), layout.outside_netns()] {
        remove_netns(&netns, &mut left);
    }
    for folder in folders {
        remove_folder(folder, &mut left);
    }
    if !left.is_empty() {
        bail!("could not remove:\n  {}", left.join("\n  "));
    }
    Ok(())
}

/// Every folder that stands for `root` in a cgroup hierarchy of this machine.
fn cgroup_folders(root: &str) -> Vec<PathBuf> {
    let mounts = keelson_procfs::own_mounts().unwrap_or_default();
    let mut folders: Vec<PathBuf> = mounts
        .into_iter()
        .filter(|mount| mount.kind.starts_with("cgroup"))
        .map(|mount| mount.point.join(root.trim_start_matches('/')))
        .filter(|folder| folder.is_dir())
        .collect();
    folders.sort();
    folders.dedup();
    folders
}

fn processes_below(cgroup: &Path) -> Vec<i32> {
    let text = fs::read(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut found: Vec<i32> =
        keelson_procfs::numbers(&text).filter_map(|pid| i32::try_from(pid).ok()).collect();
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.extend(processes_below(&entry.path()));
        }
    }
    found
}

fn remove_cgroup(folder: &Path, left: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroup(&entry.path(), left);
        }
    }
    if let Err(error) = fs::remove_dir(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        left.push(format!("cgroup {}: {error}", folder.display()));
    }
}

/// Mount points at or below `folders`, the deepest and newest first.
fn mounts_below(folders: &[&Path]) -> Result<Vec<PathBuf>> {
    let mounts = keelson_procfs::own_mounts().context("cannot read the list of mounts")?;
    let points = mounts.into_iter().map(|mount| mount.point);
    let mut below: Vec<PathBuf> =
        points.filter(|mount| folders.iter().any(|folder| mount.starts_with(folder))).collect();
    below.reverse();
    Ok(below)
}

fn remove_netns(pin: &Path, left: &mut Vec<String>) {
    if !pin.exists() {
        return;
    }
    // Not a mount any more is as good as unmounted.
    umount2(pin, MntFlags::MNT_DETACH).ok();
    if let Err(error) = fs::remove_file(pin) {
        left.push(format!("network namespace {}: {error}", pin.display()));
    }
}

/// Removes `folder` unless something is still mounted in it: what is behind a mount is not ours.
fn remove_folder(folder: &Path, left: &mut Vec<String>) {
    match mounts_below(&[folder]) {
        Ok(mounts) if mounts.is_empty() => {}
        _ => return left.push(format!("{}: something is still mounted there", folder.display())),
    }
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        left.push(format!("{}: {error}", folder.display()));
    }
}
