//! Shims that nothing runs in: containerd leaves one behind when the agent is killed while it creates a task.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Weak;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Inner, container};

/// What somebody began is finished or given up by then.
const SETTLED: Duration = Duration::from_secs(10);

/// Ends, once, the shims of our containerd namespace in which nothing runs and of whose task containerd knows nothing. To be
/// sure that none is just coming or going, each must be found so twice.
pub(crate) async fn end(runtime: Weak<Inner>) {
    tokio::time::sleep(SETTLED).await;
    let Some(before) = taskless(&runtime).await else { return };
    if before.is_empty() {
        return;
    }
    tokio::time::sleep(SETTLED).await;
    let Some(still) = taskless(&runtime).await else { return };
    for shim in still.intersection(&before) {
        tracing::info!(pid = shim.pid, "Ending a shim that an interrupted start left behind");
        // Gone already is what we want.
        kill(Pid::from_raw(shim.pid), Signal::SIGKILL).ok();
    }
}

/// What decides whether a process is a leftover shim.
#[derive(Debug, Clone)]
struct Process {
    pid: i32,
    parent: i32,
    /// Clock ticks since boot: tells apart processes of the same number.
    started: u64,
    arguments: Vec<String>,
}

/// A shim without a child.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Shim {
    pid: i32,
    started: u64,
    container: String,
}

/// The empty shims whose container has no task and is not being started by us.
async fn taskless(runtime: &Weak<Inner>) -> Option<HashSet<Shim>> {
    let options = &runtime.upgrade()?.options;
    let (socket, namespace) = (options.socket.clone(), options.namespace.clone());
    let look = move || empty_shims(&processes(), &socket, &namespace);
    let shims = tokio::task::spawn_blocking(look).await.ok()?;
    let inner = runtime.upgrade()?;
    let mut taskless = HashSet::new();
    for shim in shims {
        let known = inner.starting.contains(&shim.container)
            || !matches!(container::task_of(&inner, &shim.container).await, Ok(None));
        if !known {
            taskless.insert(shim);
        }
    }
    Some(taskless)
}

fn empty_shims(processes: &[Process], socket: &Path, namespace: &str) -> Vec<Shim> {
    let parents: HashSet<i32> = processes.iter().map(|p| p.parent).collect();
    let value = |process: &Process, flag: &str| {
        let mut pairs = process.arguments.windows(2);
        pairs.find(|pair| pair[0] == flag).map(|pair| pair[1].clone())
    };
    let socket = socket.to_string_lossy();
    processes
        .iter()
        .filter(|p| {
            p.arguments.first().is_some_and(|program| program.contains("containerd-shim-runc"))
        })
        .filter(|p| value(p, "-namespace").as_deref() == Some(namespace))
        .filter(|p| value(p, "-address").as_deref() == Some(&*socket))
        // A container's process is a child of its shim, also when its starter has ended.
        .filter(|p| !parents.contains(&p.pid))
        .filter_map(|p| Some(Shim { pid: p.pid, started: p.started, container: value(p, "-id")? }))
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
    fn only_our_empty_shims_may_be_leftovers() {
        let shim = "/usr/bin/containerd-shim-runc-v2 -namespace keelson -id x -address /run/c.sock";
        let all = [
            process(-1, 1, 50, shim),
            process(-2, 1, 50, shim),
            process(-3, -2, 51, "sleep"),
            process(-5, 1, 50, &shim.replace("keelson", "k8s.io")),
            process(-6, 1, 50, &shim.replace("/run/c.sock", "/run/other.sock")),
        ];
        let found = empty_shims(&all, Path::new("/run/c.sock"), "keelson");
        assert_eq!(found, [Shim { pid: -1, started: 50, container: "x".to_owned() }]);
    }

    #[test]
    fn this_process_is_found_with_its_parent() {
        let own = std::process::id().cast_signed();
        assert!(processes().iter().any(|p| p.pid == own && p.parent > 0 && p.started > 0));
    }
}
