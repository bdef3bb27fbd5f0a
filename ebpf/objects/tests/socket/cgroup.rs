//! Cgroups for single threads, so that one process can be many nodes.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

const PREFIX: &str = "keelson-ebpf-";
/// Where cgroup v2 is, alone or beside v1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];

/// A threaded cgroup below this process' own. Gone when dropped, or with the next run.
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub(crate) fn make() -> io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let parent = own()?;
        remove_leftovers(&parent);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&path)?;
        let cgroup = Cgroup { path };
        fs::write(cgroup.path.join("cgroup.type"), "threaded")?;
        Ok(cgroup)
    }

    /// For attaching programs.
    pub(crate) fn open(&self) -> io::Result<File> {
        File::open(&self.path)
    }

    /// Runs `work` on the calling thread, inside.
    pub(crate) fn run<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        struct Back(PathBuf);
        impl Drop for Back {
            fn drop(&mut self) {
                // A thread that ends inside would keep the cgroup busy for a moment.
                move_here(&self.0).ok();
            }
        }
        move_here(&self.path)?;
        let _back = Back(own_of(&self.path));
        Ok(work())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        fs::remove_dir(&self.path).ok();
    }
}

fn move_here(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.threads"), nix::unistd::gettid().to_string())
}

fn own_of(child: &Path) -> PathBuf {
    child.parent().map(Path::to_path_buf).unwrap_or_default()
}

/// This process' cgroup.
fn own() -> io::Result<PathBuf> {
    let all = fs::read_to_string("/proc/self/cgroup")?;
    let own = all.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    Ok(mount()?.join(own))
}

/// The cgroup that has all others.
pub(crate) fn mount() -> io::Result<PathBuf> {
    let mounted = |path: &&&str| Path::new(path).join("cgroup.procs").exists();
    let mount = MOUNTS.iter().find(mounted).ok_or(io::ErrorKind::NotFound)?;
    Ok(PathBuf::from(mount))
}

/// Those of processes that were killed.
fn remove_leftovers(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            fs::remove_dir(entry.path()).ok();
        }
    }
}

#[test]
fn what_killed_runs_left_is_removed() {
    // No process has such a number.
    let left = own().unwrap().join(format!("{PREFIX}4194305-0"));
    fs::create_dir(&left).unwrap();
    let mine = Cgroup::make().unwrap();
    assert!(!left.exists());
    let path = mine.path.clone();
    drop(mine);
    assert!(!path.exists());
}
