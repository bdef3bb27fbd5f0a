//! What the eBPF mode needs beside a network namespace: a BPF file system, and for each node a cgroup that its
//! sockets and those of its pods belong to.
//!
//! One process plays all nodes, so the cgroups are threaded: whoever opens a socket enters first.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use keelson_proxy::backend::Mode;
use keelson_proxy::ebpf::EbpfConfig;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const BPFFS: &str = "/sys/fs/bpf";
const PREFIX: &str = "keelson-suite-";

/// Where cgroup v2 is mounted, if anywhere.
fn cgroup2() -> Option<&'static Path> {
    let mounted = |path: &&&str| Path::new(path).join("cgroup.subtree_control").exists();
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].iter().find(mounted).map(Path::new)
}

/// Gives the whole process its own view of BPF file systems, and a cgroup. Before any thread is started.
/// What is impossible here is told by the mode's probe.
pub(crate) fn prepare() {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    let none = None::<&str>;
    let mounted = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(none, "/", none, private, none))
        .and_then(|()| mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), none));
    if let Err(error) = mounted {
        println!("no BPF file system: {error}");
    }
    let Some(root) = cgroup2() else { return };
    remove_dead(root);
    let own = own(root);
    let entered = fs::create_dir(&own).and_then(|()| fs::write(own.join("cgroup.procs"), "0"));
    if let Err(error) = entered {
        println!("no cgroup: {error}");
    }
}

/// Leaves and removes the cgroup. After all rows.
pub(crate) fn tidy() {
    let Some(root) = cgroup2() else { return };
    let left = fs::write(root.join("cgroup.procs"), "0");
    if left.is_ok() {
        remove(&own(root));
    }
}

fn own(root: &Path) -> PathBuf {
    root.join(format!("{PREFIX}{}", std::process::id()))
}

/// Cgroups of processes that were killed.
fn remove_dead(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            remove(&entry.path());
        }
    }
}

fn remove(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            drop(fs::remove_dir(entry.path()));
        }
    }
    drop(fs::remove_dir(cgroup));
}

/// A node's cgroup and its folder of pins; removed when dropped.
pub(crate) struct Premises {
    pub(crate) cgroup: PathBuf,
    pins: PathBuf,
}

impl Premises {
    /// Nothing where the kernel cannot do it.
    pub(crate) fn new() -> Option<Self> {
        static ABLE: OnceLock<bool> = OnceLock::new();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if !ABLE.get_or_init(|| Mode::Ebpf.probe().is_ok()) {
            return None;
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup = own(cgroup2().unwrap()).join(format!("node{number}"));
        fs::create_dir(&cgroup).unwrap();
        fs::write(cgroup.join("cgroup.type"), "threaded").unwrap();
        Some(Premises { cgroup, pins: Path::new(BPFFS).join(format!("node{number}")) })
    }

    pub(crate) fn config(&self) -> EbpfConfig {
        let cgroup = Some(self.cgroup.clone());
        // Nobody but this process holds the namespaces.
        let namespaces = vec!["/proc/self/fd".into()];
        EbpfConfig { pins: self.pins.clone(), cgroup, namespaces, ..EbpfConfig::default() }
    }
}

impl Drop for Premises {
    fn drop(&mut self) {
        for folder in ["links", ""] {
            drop(fs::remove_dir_all(self.pins.join(folder)));
        }
        drop(fs::remove_dir(&self.cgroup));
    }
}

/// The calling thread belongs to that cgroup from now on.
pub(crate) fn enter(cgroup: &Path) {
    let path = cgroup.join("cgroup.threads");
    fs::write(&path, "0").unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
