//! The tree `kubepods/{burstable,besteffort}/pod<uid>` in every cgroup hierarchy of the machine.
//!
//! ```text
//! v2:      /sys/fs/cgroup/<root>/kubepods/burstable/pod<uid>/<container>
//! v1:      /sys/fs/cgroup/{cpu,memory,pids,…}/<root>/kubepods/…       the same tree once per controller
//! hybrid:  as v1; in the controller-less unified hierarchy nothing is set
//! ```
//! Pod cgroups are made by the agent; those of containers by the OCI runtime, which on v1 leaves empty pod folders in every
//! controller that it visited, so removal visits all of them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;
use keelson_procfs::Mount;

use super::resources::{self, QosClass};
use crate::pod::spec;
use crate::runtime::types::Resources;

/// A cgroup operation that the kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot read the mounts of this machine from {path}")]
    Mounts { path: &'static str, source: io::Error },
    #[error("no cgroup hierarchy is mounted; hint: mount cgroup2 on /sys/fs/cgroup")]
    None,
    #[error("cannot {step} {path}")]
    Io { step: &'static str, path: PathBuf, source: io::Error },
}

/// The hierarchies of this machine and where our part of them begins.
#[derive(Debug, Clone)]
pub struct CgroupTree {
    hierarchies: Vec<Hierarchy>,
    root: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    mount: PathBuf,
    /// v1 controllers; empty for v2.
    controllers: Vec<String>,
    unified: bool,
    /// We set values here. Others are only visited for removal: runc makes folders in all of them.
    managed: bool,
}

const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "cpuset"];

impl CgroupTree {
    /// Looks at what is mounted. `root` is the cgroup below which `kubepods` stands, `/` for the top.
    ///
    /// # Errors
    /// When nothing is mounted that could hold cgroups.
    pub fn detect(root: &str) -> Result<Self, CgroupError> {
        const PATH: &str = "/proc/self/mountinfo";
        let mounts = keelson_procfs::own_mounts()
            .map_err(|source| CgroupError::Mounts { path: PATH, source })?;
        let hierarchies = hierarchies(&mounts);
        if hierarchies.is_empty() {
            return Err(CgroupError::None);
        }
        Ok(Self { hierarchies, root: root.trim_matches('/').to_owned() })
    }

    /// The cgroup of a pod as the OCI runtime wants it: the same in every hierarchy, beginning with `/`.
    pub fn pod_path(&self, pod: &Pod) -> String {
        let class = match resources::qos_class(pod) {
            QosClass::Guaranteed => "",
            QosClass::Burstable => "/burstable",
            QosClass::BestEffort => "/besteffort",
        };
        let root = if self.root.is_empty() { String::new() } else { format!("/{}", self.root) };
        format!("{root}/kubepods{class}/pod{}", spec::uid(pod))
    }

    /// Makes the pod's cgroups with the pod's limits. Idempotent.
    ///
    /// # Errors
    /// When the kernel refuses a folder or a value.
    pub fn ensure_pod(&self, pod: &Pod, pids_limit: Option<i64>) -> Result<String, CgroupError> {
        let path = self.pod_path(pod);
        let values = resources::pod_resources(pod, pids_limit);
        for hierarchy in self.hierarchies.iter().filter(|h| h.matters()) {
            let dir = hierarchy.ensure(&path)?;
            hierarchy.write_values(&dir, &values)?;
        }
        Ok(path)
    }

    /// Sets the CPU weight of all burstable pods together to the sum of their requests, and of best-effort pods to the least.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_class_shares(&self, burstable_milli_cpu: i128) -> Result<(), CgroupError> {
        let shares = |value| Resources { cpu_shares: Some(value), ..Resources::default() };
        let root = if self.root.is_empty() { String::new() } else { format!("/{}", self.root) };
        for hierarchy in self.hierarchies.iter().filter(|h| h.has("cpu")) {
            let dir = hierarchy.ensure(&format!("{root}/kubepods/burstable"))?;
            hierarchy.write_values(&dir, &shares(resources::shares(burstable_milli_cpu)))?;
            let dir = hierarchy.ensure(&format!("{root}/kubepods/besteffort"))?;
            hierarchy.write_values(&dir, &shares(2))?;
        }
        Ok(())
    }

    /// Removes a pod's cgroups in every class and hierarchy; processes that are still in them are killed. Idempotent.
    ///
    /// # Errors
    /// When a cgroup cannot be emptied and removed.
    pub fn remove_pod(&self, uid: &str) -> Result<(), CgroupError> {
        for dir in self.pod_dirs(uid) {
            remove_tree(&dir).map_err(|source| CgroupError::Io {
                step: "remove the cgroup",
                path: dir,
                source,
            })?;
        }
        Ok(())
    }

    /// Makes a cgroup for a process below a pod's and returns its folder in every hierarchy where a process of the pod
    /// shall not be counted with the agent's: also those that only systemd looks at.
    ///
    /// # Errors
    /// When the kernel refuses a folder.
    pub fn make_leaf(&self, path: &str) -> Result<Vec<PathBuf>, CgroupError> {
        let visited =
            self.hierarchies.iter().filter(|h| h.matters() || h.unified || h.is_systemds());
        visited.map(|hierarchy| hierarchy.make(path)).collect()
    }

    /// The processes in the cgroup `path` itself.
    pub fn processes(&self, path: &str) -> Vec<i32> {
        let Some(hierarchy) = self.hierarchies.iter().find(|h| h.matters()) else {
            return Vec::new();
        };
        processes(&hierarchy.mount.join(path.trim_start_matches('/')))
    }

    /// Removes the cgroup `path` from all hierarchies; processes that are still in it are killed. Idempotent.
    ///
    /// # Errors
    /// When it cannot be emptied and removed.
    pub fn remove(&self, path: &str) -> Result<(), CgroupError> {
        for hierarchy in &self.hierarchies {
            let dir = hierarchy.mount.join(path.trim_start_matches('/'));
            remove_tree(&dir).map_err(|source| CgroupError::Io {
                step: "remove the cgroup",
                path: dir,
                source,
            })?;
        }
        Ok(())
    }

    /// The uids of all pods that have cgroups.
    pub fn pod_uids(&self) -> Vec<String> {
        let mut uids: Vec<String> = Vec::new();
        for parent in self.class_dirs() {
            let entries = fs::read_dir(parent).into_iter().flatten().flatten();
            uids.extend(entries.filter_map(|entry| {
                entry.file_name().to_str()?.strip_prefix("pod").map(str::to_owned)
            }));
        }
        uids.sort();
        uids.dedup();
        uids
    }

    fn pod_dirs(&self, uid: &str) -> Vec<PathBuf> {
        let name = format!("pod{uid}");
        self.class_dirs().map(|dir| dir.join(&name)).filter(|dir| dir.is_dir()).collect()
    }

    fn class_dirs(&self) -> impl Iterator<Item = PathBuf> {
        self.hierarchies.iter().flat_map(|hierarchy| {
            let base = hierarchy.mount.join(&self.root).join("kubepods");
            [base.clone(), base.join("burstable"), base.join("besteffort")]
        })
    }
}

impl Hierarchy {
    fn has(&self, controller: &str) -> bool {
        self.managed && (self.unified || self.controllers.iter().any(|c| c == controller))
    }

    fn matters(&self) -> bool {
        ["cpu", "memory", "pids"].iter().any(|c| self.has(c))
    }

    /// systemd's own hierarchy on cgroup v1, by which it knows the processes of its units.
    fn is_systemds(&self) -> bool {
        self.controllers.iter().any(|c| c == "name=systemd")
    }

    /// Makes `path` for cgroups below it.
    fn ensure(&self, path: &str) -> Result<PathBuf, CgroupError> {
        let dir = self.make(path)?;
        if self.unified {
            delegate(&dir);
        }
        Ok(dir)
    }

    /// Makes `path`, in which processes may be: on v2 that excludes cgroups with controllers below it.
    fn make(&self, path: &str) -> Result<PathBuf, CgroupError> {
        let mut dir = self.mount.clone();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if self.unified {
                delegate(&dir);
            }
            dir.push(part);
            match fs::create_dir(&dir) {
                Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::Io { step: "make the cgroup", path: dir, source });
                }
                _ => {}
            }
        }
        Ok(dir)
    }

    fn write_values(&self, dir: &Path, values: &Resources) -> Result<(), CgroupError> {
        for (file, value) in self.files(values) {
            let path = dir.join(file);
            // Unchanged values are not written: a quota write disturbs running threads.
            let current = fs::read_to_string(&path).unwrap_or_default();
            if current.trim() == value {
                continue;
            }
            write_value(&path, &value)?;
        }
        Ok(())
    }

    fn files(&self, values: &Resources) -> Vec<(&'static str, String)> {
        let mut files = Vec::new();
        let quota = values.cpu_quota_us;
        let period = values.cpu_period_us.unwrap_or(resources::CPU_PERIOD_US);
        let or_max = |v: Option<i64>| v.map_or("max".to_owned(), |v| v.to_string());
        if self.unified {
            files.extend(values.cpu_shares.map(|s| ("cpu.weight", weight(s).to_string())));
            if quota.is_some() {
                files.push(("cpu.max", format!("{} {period}", or_max(quota))));
            }
            if values.memory_limit_bytes.is_some() {
                files.push(("memory.max", or_max(values.memory_limit_bytes)));
            }
        } else {
            if self.has("cpu") {
                files.extend(values.cpu_shares.map(|s| ("cpu.shares", s.to_string())));
                if let Some(quota) = quota {
                    files.push(("cpu.cfs_period_us", period.to_string()));
                    files.push(("cpu.cfs_quota_us", quota.to_string()));
                }
            }
            if let (true, Some(limit)) = (self.has("memory"), values.memory_limit_bytes) {
                files.push(("memory.limit_in_bytes", limit.to_string()));
            }
        }
        if self.has("pids") && values.pids_limit.is_some() {
            files.push(("pids.max", or_max(values.pids_limit)));
        }
        files
    }
}

/// runc's mapping of v1 shares (2..262144) to v2 weights (1..10000).
fn weight(shares: u64) -> u64 {
    1 + (shares.saturating_sub(2) * 9999) / 262_142
}

/// Lets children of a v2 cgroup use the controllers. What is missing shows when a value is written.
fn delegate(dir: &Path) {
    let path = dir.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&path).unwrap_or_default();
    let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for controller in CONTROLLERS {
        let has = |list: &str| list.split_whitespace().any(|c| c == controller);
        if has(&available)
            && !has(&enabled)
            && write_value(&path, &format!("+{controller}")).is_err()
        {
            tracing::debug!(controller, path = %path.display(), "Cannot delegate controller");
        }
    }
}

fn write_value(path: &Path, value: &str) -> Result<(), CgroupError> {
    use std::io::Write as _;
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|source| CgroupError::Io { step: "write", path: path.to_owned(), source })
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    kill_processes(dir);
    // A killed process leaves its cgroup when it is reaped, which is soon but not at once.
    for _ in 0..50 {
        match fs::remove_dir(dir) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => return Ok(()),
        }
    }
    fs::remove_dir(dir)
}

fn processes(dir: &Path) -> Vec<i32> {
    let procs = fs::read(dir.join("cgroup.procs")).unwrap_or_default();
    let pids = keelson_procfs::numbers(&procs).filter_map(|pid| i32::try_from(pid).ok());
    // 0 is a process outside our PID namespace.
    pids.filter(|pid| *pid > 1).collect()
}

fn kill_processes(dir: &Path) {
    for pid in processes(dir) {
        let pid = nix::unistd::Pid::from_raw(pid);
        if let Err(error) = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL) {
            tracing::debug!(%pid, %error, "Process in a removed cgroup is gone already");
        }
    }
}

pub(crate) fn hierarchies(mounts: &[Mount]) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = mounts.iter().filter_map(hierarchy).collect();
    if found.iter().any(|h| h.controllers.iter().any(|c| c == "memory" || c == "cpu")) {
        found.iter_mut().filter(|h| h.unified).for_each(|h| h.managed = false);
    }
    found.sort_by(|a, b| a.mount.cmp(&b.mount));
    found.dedup();
    found
}

fn hierarchy(found: &Mount) -> Option<Hierarchy> {
    let mount = found.point.clone();
    match found.kind.as_str() {
        "cgroup2" => {
            Some(Hierarchy { mount, controllers: Vec::new(), unified: true, managed: true })
        }
        "cgroup" => {
            let skip = ["rw", "ro", "relatime", "noprefix", "clone_children"];
            let named = found.super_options.iter().filter(|o| !skip.contains(&o.as_str()));
            let controllers = named.cloned().collect();
            Some(Hierarchy { mount, controllers, unified: false, managed: true })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_uses_the_controllers_and_not_the_empty_unified_hierarchy() {
        let text = "\
30 25 0:26 / /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu,cpuacct
31 25 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
33 25 0:29 / /proc rw - proc proc rw";
        let read =
            |text: &str| hierarchies(&keelson_procfs::mounts(text.as_bytes()).collect::<Vec<_>>());
        let found = read(text);
        let managed: Vec<_> =
            found.iter().filter(|h| h.matters()).map(|h| h.controllers.join(",")).collect();
        assert_eq!(managed, ["cpu,cpuacct", "memory"]);
        assert_eq!(found.len(), 3);
        let v2 = read("32 25 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw");
        assert!(v2[0].unified && v2[0].matters());
    }

    #[test]
    fn values_of_both_versions() {
        let values = Resources {
            cpu_shares: Some(1024),
            cpu_quota_us: Some(50_000),
            cpu_period_us: Some(100_000),
            memory_limit_bytes: Some(1 << 20),
            pids_limit: Some(10),
            oom_score_adj: 0,
        };
        let v2 =
            Hierarchy { mount: "/x".into(), controllers: vec![], unified: true, managed: true };
        let shown: Vec<_> =
            v2.files(&values).into_iter().map(|(f, v)| format!("{f}={v}")).collect();
        assert_eq!(
            shown,
            ["cpu.weight=39", "cpu.max=50000 100000", "memory.max=1048576", "pids.max=10"]
        );
        let v1 = Hierarchy { unified: false, controllers: vec!["cpu".into()], ..v2 };
        assert_eq!(v1.files(&values).len(), 3);
    }
}
