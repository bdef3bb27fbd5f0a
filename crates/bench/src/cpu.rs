//! CPU time of a process and all that it starts, however short-lived: by a cgroup of its own.
//!
//! Adding up /proc would lose the children of children that nobody waited for, and up to 10 ms per process.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use keelson_procfs::Mount;

/// A cgroup whose only purpose is to count.
#[derive(Debug)]
pub(crate) struct CpuGroup {
    folder: PathBuf,
    version: Version,
    own: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    /// `cpuacct.usage`, in nanoseconds.
    One,
    /// `cpu.stat`, in microseconds.
    Two,
}

impl CpuGroup {
    /// A new group below the root of the hierarchy that counts CPU time.
    ///
    /// # Errors
    /// When there is no such hierarchy or the group cannot be made.
    pub(crate) fn create(name: &str) -> Result<CpuGroup> {
        let (root, version) = hierarchy()?;
        let folder = root.join(name);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make the cgroup {}", folder.display()))?;
        Ok(CpuGroup { folder, version, own: true })
    }

    /// A group that somebody else makes, now or later: that of the pods.
    ///
    /// # Errors
    /// When there is no hierarchy that counts CPU time.
    pub(crate) fn of_others(name: &str) -> Result<CpuGroup> {
        let (root, version) = hierarchy()?;
        Ok(CpuGroup { folder: root.join(name), version, own: false })
    }

    /// Moves a process in; what it starts from now on is counted, too.
    ///
    /// # Errors
    /// When it has ended or may not be moved.
    pub(crate) fn adopt(&self, pid: u32) -> Result<()> {
        let file = self.folder.join("cgroup.procs");
        fs::write(&file, pid.to_string())
            .with_context(|| format!("cannot move process {pid} into {}", self.folder.display()))
    }

    /// Who is in the group now.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// CPU seconds since the group was made; 0 for a group that is not there.
    pub(crate) fn used(&self) -> f64 {
        let read = |file: &str| fs::read_to_string(self.folder.join(file)).unwrap_or_default();
        let used = match self.version {
            Version::One => read("cpuacct.usage").trim().parse::<f64>().ok().map(|ns| ns / 1e9),
            Version::Two => usage_usec(&read("cpu.stat")).map(|us| us / 1e6),
        };
        used.unwrap_or(0.0)
    }
}

impl Drop for CpuGroup {
    fn drop(&mut self) {
        if !self.own || !self.folder.exists() {
            return;
        }
        // What outlives its starter, such as shims, goes on outside: a group with processes cannot be removed.
        if let Some(parent) = self.folder.parent() {
            for pid in self.processes() {
                // It may end at this very moment.
                drop(fs::write(parent.join("cgroup.procs"), pid.to_string()));
            }
        }
        if let Err(error) = fs::remove_dir(&self.folder) {
            eprintln!("cannot remove the cgroup {}: {error}", self.folder.display());
        }
    }
}

fn usage_usec(stat: &str) -> Option<f64> {
    stat.lines().find_map(|l| l.strip_prefix("usage_usec "))?.trim().parse().ok()
}

fn hierarchy() -> Result<(PathBuf, Version)> {
    let mounts = keelson_procfs::own_mounts().context("cannot list the mounts")?;
    accounting(&mounts).context("no cgroup hierarchy is mounted that counts CPU time")
}

/// The mount that counts CPU time: cgroup v1's cpuacct where there is one, else cgroup v2, which always counts.
fn accounting(mounts: &[Mount]) -> Option<(PathBuf, Version)> {
    let counts = |mount: &&Mount| mount.super_options.iter().any(|option| option == "cpuacct");
    let first = mounts.iter().filter(|mount| mount.kind == "cgroup").find(counts);
    let second = || mounts.iter().rfind(|mount| mount.kind == "cgroup2");
    first
        .map(|mount| (mount.point.clone(), Version::One))
        .or_else(|| second().map(|mount| (mount.point.clone(), Version::Two)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n";
    const V2: &str = "31 25 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 none rw\n";

    #[test]
    fn version_one_counts_where_both_are_mounted() {
        let want = Some(("/sys/fs/cgroup/cpu,cpuacct".into(), Version::One));
        let accounting =
            |text: &str| accounting(&keelson_procfs::mounts(text.as_bytes()).collect::<Vec<_>>());
        assert_eq!(accounting(&format!("{V2}{V1}{V2}")), want);
        let want = Some(("/sys/fs/cgroup/unified".into(), Version::Two));
        assert_eq!(accounting(V2), want);
        assert_eq!(accounting("1 2 3 / /proc rw - proc proc rw\n"), None);
    }

    #[test]
    fn version_two_says_microseconds_in_a_line_of_cpu_stat() {
        assert_eq!(usage_usec("usage_usec 2500000\nuser_usec 1\n"), Some(2_500_000.0));
    }
}
