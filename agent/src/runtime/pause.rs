//! The sandbox's own process: a program of a kilobyte that the agent carries inside itself and starts itself.
//!
//! Neither image nor snapshot, OCI runtime nor shim: pause needs nothing of what they do, and they would cost a pod more
//! than half of its start. What belongs to a container all the same is here: the pod's namespaces, a PID namespace, a root
//! file system with nothing else in it, a cgroup, no privileges. containerd keeps the sandbox's record, but has no task of
//! it.
//!
//! Which process it is, is never written down: it is the one in the sandbox's cgroup, before and after a restart of the
//! agent.

mod process;
mod root;
pub(crate) mod sysctl;

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub use process::PauseError;

use super::RuntimeError;
use super::record::SandboxRecord;
use super::sandbox::SandboxDir;
use crate::cgroup::{CgroupError, CgroupTree};
use crate::pidfd;

/// Built by build.rs from `agent/pause/main.rs`.
static PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));

/// As the CRI has it: killed after everything else in the pod.
const OOM_SCORE_ADJ: i32 = -998;

/// What all pause processes of this agent have in common.
pub(crate) struct Pauses {
    /// The mount namespace with the program in it.
    root: File,
    cgroups: CgroupTree,
    /// The agent may not lower its children's `oom_score_adj` below this.
    oom_floor: i32,
}

impl Pauses {
    /// Writes the program below `run_dir` and makes its mount namespace.
    pub(crate) fn open(run_dir: &Path, oom_floor: i32) -> Result<Pauses, RuntimeError> {
        let rootfs = run_dir.join("pause");
        install(&rootfs)?;
        let root = root::mount_namespace(&rootfs)
            .map_err(RuntimeError::system("make a mount namespace with", &rootfs))?;
        Ok(Pauses { root, cgroups: CgroupTree::detect("/").map_err(no_cgroup)?, oom_floor })
    }

    /// Starts the pause process of a sandbox whose namespaces are pinned in `dir`. Blocking.
    pub(crate) fn start(
        &self,
        dir: &SandboxDir,
        record: &SandboxRecord,
        cgroup: &str,
    ) -> Result<OwnedFd, RuntimeError> {
        let open = |path: PathBuf| {
            File::open(&path).map_err(RuntimeError::system("open the namespace", path))
        };
        let mut namespaces = vec![open(dir.namespace("net"))?];
        if !record.host_network {
            namespaces.push(open(dir.namespace("uts"))?);
        }
        if !record.host_ipc {
            namespaces.push(open(dir.namespace("ipc"))?);
        }
        let folders = self.cgroups.make_leaf(cgroup).map_err(no_cgroup)?;
        let cgroups = folders.into_iter().map(|folder| {
            let path = folder.join("cgroup.procs");
            File::options().write(true).open(&path).map_err(RuntimeError::system("open", path))
        });
        let pause = process::Pause {
            root: self.root.try_clone().map_err(RuntimeError::system("duplicate", "/pause"))?,
            namespaces,
            own_pid_namespace: !record.host_pid,
            cgroups: cgroups.collect::<Result<_, _>>()?,
            oom_score_adj: OOM_SCORE_ADJ.max(self.oom_floor),
        };
        process::spawn(&pause).map_err(|source| RuntimeError::Pause { source })
    }

    /// The number of the pause process in `cgroup`, if one runs.
    pub(crate) fn pid(&self, cgroup: &str) -> Option<i32> {
        self.cgroups.processes(cgroup).into_iter().next()
    }

    /// The pause process in `cgroup`, if one runs.
    pub(crate) fn process(&self, cgroup: &str) -> Option<OwnedFd> {
        let pid = self.pid(cgroup)?;
        let process = pidfd::open(pid).ok().flatten()?;
        // Still there: so the descriptor is not of a later process of the same number.
        (self.pid(cgroup) == Some(pid)).then_some(process)
    }

    /// Kills the pause process in `cgroup` and returns when it has ended. None there is a success.
    pub(crate) async fn end(&self, cgroup: &str) -> Result<(), RuntimeError> {
        while let Some(process) = self.process(cgroup) {
            match kill(&process) {
                Ok(()) | Err(Errno::ESRCH) => ended(process).await,
                Err(errno) => {
                    return Err(RuntimeError::system("kill pause in", cgroup)(errno.into()));
                }
            }
        }
        Ok(())
    }

    /// Removes the sandbox's cgroup.
    pub(crate) fn forget(&self, cgroup: &str) -> Result<(), RuntimeError> {
        self.cgroups.remove(cgroup).map_err(no_cgroup)
    }
}

/// Returns when the process has ended, and takes its exit if it is this agent's child.
#[allow(unsafe_code, reason = "AsyncFd's safe constructor is deprecated")]
pub(crate) async fn ended(process: OwnedFd) {
    // SAFETY: an OwnedFd is open and stays the same descriptor for as long as AsyncFd owns it.
    let watched = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) };
    // A descriptor that cannot be waited for cannot be told from one whose process has ended.
    if let Ok(process) = watched {
        drop(process.readable().await);
        process::reap(process.get_ref());
    }
}

#[allow(unsafe_code, reason = "pidfd_send_signal(2) has no wrapper in the libraries at hand")]
fn kill(process: &OwnedFd) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    let (fd, signal) = (process.as_fd().as_raw_fd(), Signal::SIGKILL as i32);
    // SAFETY: the descriptor is open, the third argument may be null, nothing of ours is written.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd,
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// Writes the root file system: a folder with the program.
fn install(rootfs: &Path) -> Result<(), RuntimeError> {
    fs::create_dir_all(rootfs).map_err(RuntimeError::system("create", rootfs))?;
    let program = rootfs.join("pause");
    // Never written in place: older sandboxes run this file.
    if fs::read(&program).is_ok_and(|there| there == PROGRAM) {
        return Ok(());
    }
    keelson_durable::write(&program, PROGRAM, 0o555).map_err(|error| RuntimeError::System {
        action: "write",
        path: program.clone(),
        source: error.source,
    })
}

fn no_cgroup(source: CgroupError) -> RuntimeError {
    RuntimeError::Cgroup { source }
}
