//! A program under measurement: started into a namespace, looked at, stopped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use keelson_tests::node::tail;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::cpu::CpuGroup;
use crate::machine::TICKS_PER_SECOND;

/// How long a program may take to end when asked to.
const END_LIMIT: Duration = Duration::from_secs(30);

/// A running program with a cgroup that counts its CPU time.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) name: String,
    /// The moment before the program was started.
    pub(crate) began: Instant,
    child: Child,
    pid: u32,
    log: PathBuf,
    cpu: CpuGroup,
}

impl Daemon {
    /// Starts `program`, which writes its log to `log`. `group` is the name of its cgroup.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn start(
        name: &str,
        program: std::process::Command,
        log: &Path,
        group: &str,
    ) -> Result<Daemon> {
        let file = fs::OpenOptions::new().create(true).append(true).open(log);
        let file = file.with_context(|| format!("cannot write {}", log.display()))?;
        let cpu = CpuGroup::create(group)?;
        let mut command = Command::from(program);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        command.process_group(0).kill_on_drop(true);
        let began = Instant::now();
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let pid = child.id().with_context(|| format!("{name} ended at once"))?;
        cpu.adopt(pid)?;
        Ok(Daemon { name: name.to_owned(), began, child, pid, log: log.to_owned(), cpu })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// CPU seconds of the program and everything that it started.
    pub(crate) fn cpu(&self) -> f64 {
        self.cpu.used()
    }

    /// The processes that it started and that still run.
    pub(crate) fn companions(&self) -> Vec<u32> {
        self.cpu.processes().into_iter().filter(|pid| *pid != self.pid).collect()
    }

    pub(crate) fn memory(&self) -> Memory {
        Memory::of(self.pid)
    }

    /// The end of its log.
    pub(crate) fn log_tail(&self) -> String {
        tail(&self.log)
    }

    /// Fails with the end of its log when the program has ended.
    ///
    /// # Errors
    /// When it has.
    pub(crate) fn must_run(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}:\n{}", self.name, self.log_tail()),
        }
    }

    /// Asks the program to end and waits for it; kills it when it does not.
    ///
    /// # Errors
    /// When it had to be killed or cannot be waited for.
    pub(crate) async fn stop(mut self) -> Result<ExitStatus> {
        if self.child.id().is_some() {
            kill(Pid::from_raw(self.pid.cast_signed()), Signal::SIGTERM)?;
        }
        match timeout(END_LIMIT, self.child.wait()).await {
            Ok(status) => Ok(status?),
            Err(_) => {
                self.child.kill().await?;
                bail!("{} did not end within {END_LIMIT:?} after SIGTERM", self.name)
            }
        }
    }
}

/// A program inside a pinned network namespace. Not `ip netns exec`: that hides the cgroups.
pub(crate) fn in_netns(netns: &Path, program: &Path) -> std::process::Command {
    let mut command = std::process::Command::new("nsenter");
    command.arg(format!("--net={}", netns.display())).arg(program);
    command
}

/// Memory of one process, in MiB.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Memory {
    pub(crate) resident: f64,
    /// Its share of pages that others map, too.
    pub(crate) proportional: Option<f64>,
    /// The most that was ever resident.
    pub(crate) peak: f64,
}

impl Memory {
    pub(crate) fn of(pid: u32) -> Memory {
        let read =
            |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let (status, rollup) = (read("status"), read("smaps_rollup"));
        Memory {
            resident: kib_field(&status, "VmRSS:").unwrap_or(0.0) / 1024.0,
            proportional: kib_field(&rollup, "Pss:").map(|kib| kib / 1024.0),
            peak: kib_field(&status, "VmHWM:").unwrap_or(0.0) / 1024.0,
        }
    }
}

fn kib_field(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// CPU seconds of one process alone, without its children.
pub(crate) fn own_cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat_cpu(&stat).unwrap_or(0.0)
}

/// utime and stime, fields 14 and 15 of proc_pid_stat(5); the name before them may hold anything, also spaces.
fn stat_cpu(stat: &str) -> Option<f64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = |n: usize| fields.split_whitespace().nth(n)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_brackets_does_not_shift_the_fields() {
        let stat = "42 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 250 150 1 1 20 0";
        assert_eq!(stat_cpu(stat), Some(4.0));
    }

    #[test]
    fn fields_of_status_are_kib() {
        assert_eq!(kib_field("VmPeak:\t 9 kB\nVmRSS:\t  2048 kB\n", "VmRSS:"), Some(2048.0));
        assert_eq!(kib_field("", "Pss:"), None);
    }

    #[test]
    fn this_process_has_memory_and_its_own_share_of_it() {
        let memory = Memory::of(std::process::id());
        assert!(memory.resident > 0.0 && memory.peak >= memory.resident * 0.5);
    }
}
