//! What the machine is and how full it is, read from the kernel.
//!
//! Reading is thin; every text that the kernel writes is parsed by a pure function.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What does not change while the machine runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    pub hostname: String,
    pub machine_id: String,
    pub system_uuid: String,
    pub boot_id: String,
    pub kernel_version: String,
    pub os_image: String,
    /// Go's name of the architecture, as Kubernetes labels have it.
    pub architecture: &'static str,
    pub cpus: u64,
    pub memory_bytes: u64,
}

/// What changes: how much is there and how much of it is free.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    pub memory_available: u64,
    pub disk_total: u64,
    pub disk_available: u64,
    pub inodes_total: u64,
    pub inodes_free: u64,
    pub pids_max: u64,
    pub pids_used: u64,
    /// Page size as Kubernetes writes it (`2Mi`) to the bytes reserved in such pages.
    pub hugepages: BTreeMap<String, u64>,
}

impl Machine {
    /// Reads what the machine is. A file that is missing leaves its value empty, as on machines
    /// without DMI or machine-id: none of them is worth refusing to run pods for.
    pub fn read() -> Self {
        let line = |path: &str| first_line(Path::new(path)).unwrap_or_default();
        let machine_id = [line("/etc/machine-id"), line("/var/lib/dbus/machine-id")]
            .into_iter()
            .find(|id| !id.is_empty())
            .unwrap_or_default();
        let system_uuid = [line("/sys/class/dmi/id/product_uuid"), machine_id.clone()]
            .into_iter()
            .find(|id| !id.is_empty())
            .unwrap_or_default();
        let os_release = fs::read_to_string("/etc/os-release")
            .or_else(|_| fs::read_to_string("/usr/lib/os-release"))
            .unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            hostname: line("/proc/sys/kernel/hostname"),
            machine_id,
            system_uuid,
            boot_id: line("/proc/sys/kernel/random/boot_id"),
            kernel_version: line("/proc/sys/kernel/osrelease"),
            os_image: pretty_name(&os_release),
            architecture: go_architecture(std::env::consts::ARCH),
            cpus: online_cpus(&line("/sys/devices/system/cpu/online")).unwrap_or(1),
            memory_bytes: meminfo_bytes(&meminfo, "MemTotal").unwrap_or(0),
        }
    }
}

impl Usage {
    /// Reads how full the machine is; `root_dir` says which file system counts.
    ///
    /// # Errors
    /// When a value cannot be read that pressure conditions depend on.
    pub fn read(root_dir: &Path) -> std::io::Result<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let disk = nix::sys::statvfs::statvfs(root_dir)?;
        let limit = |path: &str| -> std::io::Result<u64> {
            Ok(fs::read_to_string(path)?.trim().parse().unwrap_or(u64::MAX))
        };
        let pids_max =
            limit("/proc/sys/kernel/pid_max")?.min(limit("/proc/sys/kernel/threads-max")?);
        Ok(Self {
            memory_available: meminfo_bytes(&meminfo, "MemAvailable").unwrap_or(0),
            disk_total: disk.blocks() * disk.fragment_size(),
            disk_available: disk.blocks_available() * disk.fragment_size(),
            inodes_total: disk.files(),
            inodes_free: disk.files_free(),
            pids_max,
            pids_used: threads_running(&fs::read_to_string("/proc/loadavg")?).unwrap_or(0),
            hugepages: read_hugepages(Path::new("/sys/kernel/mm/hugepages")),
        })
    }
}

fn first_line(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()?.lines().next().map(|line| line.trim().to_owned())
}

/// `PRETTY_NAME` of an os-release file.
fn pretty_name(os_release: &str) -> String {
    os_release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map(|name| name.trim_matches(['"', '\'']).to_owned())
        .unwrap_or_default()
}

/// A value of /proc/meminfo, which counts in kB.
fn meminfo_bytes(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// How many processors a kernel list such as `0-3,8` names.
fn online_cpus(list: &str) -> Option<u64> {
    let mut count = 0_u64;
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        count = count.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(count)
}

/// The fourth field of /proc/loadavg is `<runnable>/<existing>` scheduling entities.
fn threads_running(loadavg: &str) -> Option<u64> {
    loadavg.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()
}

fn read_hugepages(dir: &Path) -> BTreeMap<String, u64> {
    let mut pages = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(kib) = name.to_str().and_then(hugepage_kib) else { continue };
        let count: u64 = first_line(&entry.path().join("nr_hugepages"))
            .and_then(|count| count.parse().ok())
            .unwrap_or(0);
        pages.insert(hugepage_name(kib), count * kib * 1024);
    }
    pages
}

/// `hugepages-2048kB` is 2048.
fn hugepage_kib(name: &str) -> Option<u64> {
    name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
}

/// The size as Kubernetes writes it in resource names: `2Mi`, `1Gi`, `64Ki`.
fn hugepage_name(kib: u64) -> String {
    match kib {
        kib if kib % (1 << 20) == 0 => format!("{}Gi", kib >> 20),
        kib if kib % (1 << 10) == 0 => format!("{}Mi", kib >> 10),
        kib => format!("{kib}Ki"),
    }
}

fn go_architecture(rust: &str) -> &'static str {
    match rust {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "riscv64" => "riscv64",
        "s390x" => "s390x",
        "powerpc64" => "ppc64le",
        "arm" => "arm",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_texts_are_understood() {
        assert_eq!(online_cpus("0-3,8"), Some(5));
        assert_eq!(online_cpus("0"), Some(1));
        assert_eq!(online_cpus("3-0"), None);
        assert_eq!(meminfo_bytes("MemTotal:  16 kB\nMemFree: 1 kB\n", "MemFree"), Some(1024));
        assert_eq!(meminfo_bytes("MemFreeX: 1 kB\n", "MemFree"), None);
        assert_eq!(threads_running("0.1 0.2 0.3 2/345 6789\n"), Some(345));
        assert_eq!(pretty_name("ID=x\nPRETTY_NAME=\"Debian 12\"\n"), "Debian 12");
        assert_eq!(hugepage_kib("hugepages-2048kB").map(hugepage_name).unwrap(), "2Mi");
        assert_eq!(hugepage_name(1 << 20), "1Gi");
    }

    #[test]
    fn this_machine_can_be_read() {
        let machine = Machine::read();
        assert!(machine.cpus > 0 && machine.memory_bytes > 0, "{machine:?}");
        let usage = Usage::read(Path::new("/")).unwrap();
        assert!(usage.disk_total > 0 && usage.pids_max > usage.pids_used, "{usage:?}");
    }
}
