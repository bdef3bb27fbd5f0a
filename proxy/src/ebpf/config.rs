//! Settings of this mode.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount, umount};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use serde::{Deserialize, Serialize};

use super::direct::Forwarding;
use super::error::EbpfError;
use super::xdp::XdpChoice;

/// Where BPF file systems are mounted.
pub(super) const BPFFS: &str = "/sys/fs/bpf";
/// Where cgroup v2 is mounted if nobody else did.
const OWN_CGROUP2: &str = "/run/keelson-proxy/cgroup2";
/// Where cgroup v2 is mounted: alone, beside version 1, by an earlier process of ours.
const CGROUP2: [&str; 3] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", OWN_CGROUP2];

/// How an endpoint is chosen for the first packet of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    #[default]
    Random,
    /// By the client's address and port, at every node the same (Maglev), for Services that are reached from outside.
    Maglev,
}

/// What only the eBPF mode needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EbpfConfig {
    /// Folder in a BPF file system that keeps maps, programs and links while no proxy runs.
    pub pins: PathBuf,
    /// Sockets of processes in this cgroup (version 2) and below are served when they connect; nothing means all.
    pub cgroup: Option<PathBuf>,
    /// Whose sockets are served. Packets always are.
    pub sockets: Sockets,
    /// A folder in which others keep pinned network namespaces, or symbolic links to such, whose sockets are not
    /// served. It need not be there.
    pub exempt: PathBuf,
    /// At most so many Service ports are shown on /metrics with their traffic.
    pub service_metrics: usize,
    /// How an endpoint is chosen for packets from outside.
    pub algorithm: Algorithm,
    /// How packets of clients outside get to endpoints on other nodes, and answers back.
    pub forwarding: Forwarding,
    /// Whether frames of known connections are forwarded at XDP.
    pub xdp: XdpChoice,
    /// The interfaces where they are; without any, those that a default route leaves by.
    pub xdp_interfaces: Vec<String>,
    /// Folders in which network namespaces are pinned. Sockets are looked for there and wherever a process lives.
    pub namespaces: Vec<PathBuf>,
    /// Connections that the packet layer may remember: entries of each of its tables, which begin small and grow.
    pub max_flows: u32,
    /// Endpoints of all Services together that there may be. The other maps of Services go by that: a quarter as many
    /// addresses with a port, an eighth as many lists of endpoints.
    pub max_endpoints: u32,
}

/// Sockets that are translated when they connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sockets {
    /// Those of all network namespaces that are not exempt.
    All,
    /// Those of the node's own network namespace, pods in it included.
    Node,
    None,
}

impl Default for EbpfConfig {
    fn default() -> Self {
        EbpfConfig {
            pins: Path::new(BPFFS).join("keelson-proxy"),
            cgroup: None,
            sockets: Sockets::All,
            exempt: PathBuf::from("/run/keelson/socket-exempt"),
            algorithm: Algorithm::Random,
            forwarding: Forwarding::Snat,
            xdp: XdpChoice::Off,
            xdp_interfaces: Vec::new(),
            service_metrics: 1000,
            namespaces: vec![PathBuf::from("/run/netns")],
            max_flows: 131_072,
            max_endpoints: 1 << 20,
        }
    }
}

impl EbpfConfig {
    /// The cgroup whose sockets are served.
    pub(crate) fn cgroup(&self) -> Result<PathBuf, EbpfError> {
        if let Some(cgroup) = &self.cgroup {
            return Ok(cgroup.clone());
        }
        cgroup2()
    }

    /// Whether routes say where something is done, or what stands in its way.
    pub(crate) fn goes_by_routes(&self) -> bool {
        self.xdp != XdpChoice::Off || self.forwarding != Forwarding::Snat
    }

    /// The cgroup (version 2) that has all others; mounted if it is nowhere yet.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn all_cgroups() -> Result<PathBuf, EbpfError> {
        cgroup2()
    }

    /// Whether a folder is in a BPF file system.
    #[must_use]
    pub fn is_bpffs(path: &Path) -> bool {
        is_bpffs(path)
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
        // Maps and programs beneath are root's alone, whatever the umask was.
        std::fs::create_dir_all(&self.pins)
            .and_then(|()| std::fs::set_permissions(&self.pins, Permissions::from_mode(0o700)))
            .map_err(fail)?;
        if is_bpffs(&self.pins) {
            return Ok(());
        }
        Err(fail(std::io::Error::other("it is in another file system")))
    }
}

/// The cgroup (version 2) that has all others that are seen here; mounted if it is nowhere yet.
pub(crate) fn cgroup2() -> Result<PathBuf, EbpfError> {
    let found = CGROUP2.map(Path::new).into_iter().find(|path| is_cgroup2(path));
    let Some(path) = found else { return mount_cgroup2() };
    Ok(path.to_owned())
}

fn is_cgroup2(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

fn mount_cgroup2() -> Result<PathBuf, EbpfError> {
    let path = PathBuf::from(OWN_CGROUP2);
    let fail = |source| EbpfError::NoCgroup2 { path: path.clone(), source };
    std::fs::create_dir_all(&path).map_err(fail)?;
    mount(Some("cgroup2"), &path, Some("cgroup2"), MsFlags::empty(), None::<&str>)
        .map_err(|errno| fail(errno.into()))?;
    tracing::info!(path = OWN_CGROUP2, "Mounted a cgroup2 file system");
    Ok(path)
}

/// Takes back what [`cgroup2`] mounted.
pub(crate) fn unmount_cgroup2() {
    let path = Path::new(OWN_CGROUP2);
    if is_cgroup2(path)
        && let Err(error) = umount(path)
    {
        tracing::warn!(path = OWN_CGROUP2, %error, "Cannot unmount");
    }
}

pub(crate) fn is_bpffs(path: &Path) -> bool {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    statfs(path).is_ok_and(|found| found.filesystem_type().0 == BPF_FS_MAGIC)
}
