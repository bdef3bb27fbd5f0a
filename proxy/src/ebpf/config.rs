//! Settings of this mode.

use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use serde::{Deserialize, Serialize};

use super::error::EbpfError;

/// Where BPF file systems are mounted.
const BPFFS: &str = "/sys/fs/bpf";
/// Where cgroup v2 is mounted: alone, or beside version 1.
const CGROUP2: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// What only the eBPF mode needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EbpfConfig {
    /// Folder in a BPF file system that keeps maps, programs and links while no proxy runs.
    pub pins: PathBuf,
    /// Sockets of processes in this cgroup (version 2) and below are served when they connect; nothing means all.
    pub cgroup: Option<PathBuf>,
    /// Whether sockets are served at all. Packets always are.
    pub sockets: bool,
    /// At most so many Service ports are shown on /metrics with their traffic.
    pub service_metrics: usize,
    /// Folders in which network namespaces are pinned. Sockets are looked for there and wherever a process lives.
    pub namespaces: Vec<PathBuf>,
}

impl Default for EbpfConfig {
    fn default() -> Self {
        EbpfConfig {
            pins: Path::new(BPFFS).join("keelson-proxy"),
            cgroup: None,
            sockets: true,
            service_metrics: 1000,
            namespaces: vec![PathBuf::from("/run/netns")],
        }
    }
}

impl EbpfConfig {
    /// The cgroup whose sockets are served.
    pub(crate) fn cgroup(&self) -> Result<PathBuf, EbpfError> {
        if let Some(cgroup) = &self.cgroup {
            return Ok(cgroup.clone());
        }
        let is_cgroup2 = |path: &&&str| {
            statfs(**path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
        };
        CGROUP2.iter().find(is_cgroup2).map(PathBuf::from).ok_or(EbpfError::NoCgroup2)
    }

    /// Makes the folder, in a file system that is mounted if there is none yet.
    pub(crate) fn make_pins(&self) -> Result<(), EbpfError> {
        let fail = |source| EbpfError::Bpffs { path: self.pins.clone(), source };
        let parent = self.pins.parent().unwrap_or(&self.pins);
        if !is_bpffs(parent) && parent == Path::new(BPFFS) {
            mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
                .map_err(|errno| fail(errno.into()))?;
            tracing::info!(path = BPFFS, "Mounted a BPF file system");
        }
        std::fs::create_dir_all(&self.pins).map_err(fail)?;
        if is_bpffs(&self.pins) {
            return Ok(());
        }
        Err(fail(std::io::Error::other("it is in another file system")))
    }
}

pub(crate) fn is_bpffs(path: &Path) -> bool {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    statfs(path).is_ok_and(|found| found.filesystem_type().0 == BPF_FS_MAGIC)
}
