//! What keelson-proxy needs for mode ebpf, so that nothing of it concerns the machine or stays on it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;

/// The mode of which that is so.
pub(crate) const MODE: &str = "ebpf";

/// Where cgroup v2 is, alone or beside version 1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];

/// From now on mounts are this process' and its children's own, with a BPF file system: nothing stays of either.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn private_mounts() -> Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("cannot make mounts private")?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none)
        .context("cannot mount a BPF file system")
}

/// A threaded cgroup below this process' own: sockets that threads make in there are those of a node, while the bench
/// is many nodes. Gone when dropped.
#[derive(Debug)]
pub(crate) struct ThreadGroup {
    parent: PathBuf,
    path: PathBuf,
}

impl ThreadGroup {
    /// # Errors
    /// When there is no cgroup v2, or it takes no group.
    pub(crate) fn make(name: &str) -> Result<ThreadGroup> {
        let parent = own()?;
        let path = parent.join(format!("keelson-bench-{}-{name}", std::process::id()));
        let fail = || format!("cannot make the cgroup {}", path.display());
        fs::create_dir(&path).with_context(fail)?;
        let group = ThreadGroup { parent, path };
        fs::write(group.path.join("cgroup.type"), "threaded").context("cgroup.type")?;
        Ok(group)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` on the calling thread, inside.
    ///
    /// # Errors
    /// When the thread may not be moved.
    pub(crate) fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        move_here(&self.path)?;
        let result = work();
        // A thread that ends inside would keep the group busy for a moment.
        move_here(&self.parent)?;
        Ok(result)
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("cannot remove the cgroup {}: {error}", self.path.display());
        }
    }
}

fn move_here(group: &Path) -> Result<()> {
    fs::write(group.join("cgroup.threads"), gettid().to_string())
        .with_context(|| format!("cannot move a thread into {}", group.display()))
}

/// This process' cgroup.
fn own() -> Result<PathBuf> {
    let mounted = |path: &&&str| Path::new(path).join("cgroup.procs").exists();
    let mount = MOUNTS.iter().find(mounted).context("no cgroup v2 is mounted")?;
    let all = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    let own = all.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    Ok(Path::new(mount).join(own))
}
