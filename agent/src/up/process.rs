//! Finding, ending and waiting for processes of a node.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::pidfd;

/// Waits until process `pid`, which need not be a child, has ended.
///
/// # Errors
/// When the kernel cannot watch it.
pub(crate) fn wait_end(pid: i32) -> io::Result<()> {
    let Some(fd) = pidfd::open(pid)? else { return Ok(()) };
    loop {
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Asks every process of `pids` to end with `first`, and ends those by force that have not gone after `patience`.
pub(crate) fn end_all(pids: &[i32], first: Signal, patience: Duration) {
    let watched: Vec<(i32, OwnedFd)> =
        pids.iter().filter_map(|pid| Some((*pid, pidfd::open(*pid).ok()??))).collect();
    let deadline = Instant::now() + patience;
    for (pid, _) in &watched {
        // Gone already is what we want.
        kill(Pid::from_raw(*pid), first).ok();
    }
    for (pid, fd) in &watched {
        if !ends_before(fd, deadline) {
            kill(Pid::from_raw(*pid), Signal::SIGKILL).ok();
            ends_before(fd, Instant::now() + Duration::from_secs(5));
        }
    }
}

/// Processes one of whose arguments lies at or below one of `folders`.
pub(crate) fn with_argument_below(folders: &[&Path]) -> Vec<i32> {
    let own = std::process::id().cast_signed();
    all().filter(|pid| *pid != own).filter(|pid| mentions(*pid, folders)).collect()
}

fn mentions(pid: i32, folders: &[&Path]) -> bool {
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    line.split(|b| *b == 0).any(|argument| {
        let text = String::from_utf8_lossy(argument);
        // `--flag=path`, `unix://path` and a bare path alike.
        let path = text.find('/').map_or("", |start| &text[start..]);
        let path = path.strip_prefix("//").unwrap_or(path);
        folders.iter().any(|folder| Path::new(path).starts_with(folder))
    })
}

fn all() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok())
}

fn ends_before(fd: &OwnedFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(ready) => return ready > 0,
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_and_ends_a_process_by_a_folder_among_its_arguments() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("followed");
        fs::write(&file, "").unwrap();
        let mut child = std::process::Command::new("tail").arg("-f").arg(&file).spawn().unwrap();
        let pid = child.id().cast_signed();
        // Before its exec the child still has our command line.
        while !with_argument_below(&[dir.path()]).contains(&pid) {
            std::thread::yield_now();
        }
        end_all(&[pid], Signal::SIGTERM, Duration::from_secs(5));
        assert!(!child.wait().unwrap().success());
        assert!(pidfd::open(pid).unwrap().is_none());
    }
}
