//! Nothing may be left: not after a pod, not after a node.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::node::{Node, read, until};

/// Checks that no trace of the node called `name` is left on the machine.
///
/// # Errors
/// A list of what is left.
pub fn nothing_left_of(name: &str) -> Result<()> {
    let mut left = Vec::new();
    for folder in ["/run", "/var/lib", "/run/netns"] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(name) {
                left.push(format!("file {}", entry.path().display()));
            }
        }
    }
    left.extend(mounts_with(name).iter().map(|m| format!("mount {m}")));
    left.extend(cgroups(name).iter().map(|c| format!("cgroup {}", c.display())));
    left.extend(processes_with(name).iter().map(|p| format!("process {p}")));
    conclude(left)
}

/// Checks that a node without pods comes to have nothing of pods any more: with grace period 0 the object goes first.
///
/// # Panics
/// With a list of what is left.
#[track_caller]
pub fn no_pods_left(node: &Node) {
    until("no leaks", || left_of_pods(node).map_err(|e| format!("{e:#}")));
}

fn left_of_pods(node: &Node) -> Result<()> {
    let mut left = Vec::new();
    for what in [["containers", "list", "-q"], ["leases", "list", "-q"], ["tasks", "list", "-q"]] {
        let mut ctr = Command::new("ctr");
        ctr.arg("--address")
            .arg(node.containerd_socket())
            .args(["--namespace", "keelson"])
            .args(what);
        left.extend(read(&mut ctr)?.lines().map(|l| format!("{} {l}", what[0])));
    }
    let mut snapshots = Command::new("ctr");
    snapshots.arg("--address").arg(node.containerd_socket()).args([
        "--namespace",
        "keelson",
        "snapshots",
        "list",
    ]);
    left.extend(
        read(&mut snapshots)?
            .lines()
            .filter(|l| l.contains("Active"))
            .map(|l| format!("snapshot {l}")),
    );
    left.extend(
        processes_with(node.name())
            .iter()
            .filter(|p| p.contains("containerd-shim"))
            .map(|p| format!("process {p}")),
    );
    for cgroup in cgroups(node.name()) {
        left.extend(pod_folders(&cgroup).iter().map(|c| format!("cgroup {}", c.display())));
    }
    left.extend(
        mounts_with(node.name())
            .iter()
            .filter(|m| m.contains("pods") || m.contains("rootfs"))
            .map(|m| format!("mount {m}")),
    );
    let links = read(node.on_node("ip").args(["-o", "link"]))?;
    let own = ["lo", "eth0"];
    let name_of = |line: &str| {
        line.split(": ").nth(1).and_then(|n| n.split('@').next()).unwrap_or("").to_owned()
    };
    left.extend(
        links
            .lines()
            .map(name_of)
            .filter(|l| !own.contains(&l.as_str()))
            .map(|l| format!("link {l}")),
    );
    conclude(left)
}

fn conclude(left: Vec<String>) -> Result<()> {
    if left.is_empty() { Ok(()) } else { bail!("left behind:\n  {}", left.join("\n  ")) }
}

fn mounts_with(name: &str) -> Vec<String> {
    let mounts = keelson_procfs::own_mounts().unwrap_or_default();
    let points = mounts.iter().map(|mount| mount.point.to_string_lossy().into_owned());
    points.filter(|point| point.contains(name)).collect()
}

fn cgroups(name: &str) -> Vec<PathBuf> {
    let mounts = keelson_procfs::own_mounts().unwrap_or_default();
    let hierarchies = mounts.iter().filter(|mount| mount.kind.starts_with("cgroup"));
    hierarchies.map(|mount| mount.point.join(name)).filter(|p| p.exists()).collect()
}

fn pod_folders(cgroup: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("pod") {
                found.push(entry.path());
            } else {
                found.extend(pod_folders(&entry.path()));
            }
        }
    }
    found
}

/// Command lines of processes that have an argument below one of the node's folders.
fn processes_with(name: &str) -> Vec<String> {
    let needles = [format!("/run/{name}/"), format!("/var/lib/{name}/")];
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if needles.iter().any(|n| line.contains(n)) {
            found.push(format!("{} {line}", entry.file_name().to_string_lossy()));
        }
    }
    found
}
