//! Shims that nothing runs in: containerd leaves one behind when the agent is killed while it creates a task.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What an earlier agent began is finished or given up by then.
const SETTLED: Duration = Duration::from_secs(10);

/// Ends, once, the shims of our containerd namespace that were started before this process and have no container.
pub(crate) async fn end(socket: &Path, namespace: &str) {
    let (socket, namespace) = (socket.to_owned(), namespace.to_owned());
    tokio::time::sleep(SETTLED).await;
    let work = move || {
        let processes = processes();
        for pid in empty_shims(&processes, &socket, &namespace) {
            tracing::info!(pid, "Ending a shim that an interrupted start left behind");
            // Gone already is what we want.
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
    };
    if let Err(error) = tokio::task::spawn_blocking(work).await {
        tracing::warn!(%error, "Leftover shims were not looked for");
    }
}

/// What decides whether a process is a leftover shim.
#[derive(Debug, Clone)]
struct Process {
    pid: i32,
    parent: i32,
    /// Clock ticks since boot.
    started: u64,
    arguments: Vec<String>,
}

fn empty_shims(processes: &[Process], socket: &Path, namespace: &str) -> Vec<i32> {
    let own = std::process::id().cast_signed();
    let since = processes.iter().find(|p| p.pid == own).map_or(u64::MAX, |p| p.started);
    let parents: HashSet<i32> = processes.iter().map(|p| p.parent).collect();
    let has = |process: &Process, flag: &str, value: &str| {
        process.arguments.windows(2).any(|pair| pair[0] == flag && pair[1] == value)
    };
    let socket = socket.to_string_lossy();
    processes
        .iter()
        .filter(|p| {
            p.arguments.first().is_some_and(|program| program.contains("containerd-shim-runc"))
        })
        .filter(|p| has(p, "-namespace", namespace) && has(p, "-address", &socket))
        // A container's process is a child of its shim, also when its starter has ended.
        .filter(|p| p.started < since && !parents.contains(&p.pid))
        .map(|p| p.pid)
        .collect()
}

fn processes() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| read(entry.file_name().to_str()?.parse().ok()?)).collect()
}

fn read(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything (proc_pid_stat(5)).
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let arguments =
        line.split(|byte| *byte == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
    Some(Process {
        pid,
        parent: fields.get(1)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
        arguments,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32, started: u64, line: &str) -> Process {
        Process { pid, parent, started, arguments: line.split(' ').map(str::to_owned).collect() }
    }

    #[test]
    fn only_our_old_and_empty_shims_are_leftovers() {
        let own = std::process::id().cast_signed();
        let shim = "/usr/bin/containerd-shim-runc-v2 -namespace keelson -id x -address /run/c.sock";
        let all = [
            process(own, 1, 100, "keelson agent"),
            process(-1, 1, 50, shim),
            process(-2, 1, 50, shim),
            process(-3, -2, 51, "/pause"),
            process(-4, 1, 150, shim),
            process(-5, 1, 50, &shim.replace("keelson", "k8s.io")),
            process(-6, 1, 50, &shim.replace("/run/c.sock", "/run/other.sock")),
        ];
        assert_eq!(empty_shims(&all, Path::new("/run/c.sock"), "keelson"), [-1]);
    }

    #[test]
    fn this_process_is_found_with_its_parent() {
        let own = std::process::id().cast_signed();
        assert!(processes().iter().any(|p| p.pid == own && p.parent > 0 && p.started > 0));
    }
}
