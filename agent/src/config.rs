//! What one node agent needs to know, as plain values.
//!
//! [`AgentConfig`] has no command line in it: `keelson agent` fills it from a KubeletConfiguration
//! file ([`kubelet`]) and the kubelet's usual flags, `keelson up` fills it directly. Its
//! [`Default`] is the kubelet's default wherever the kubelet has one.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub mod duration;
mod image_gc;
pub mod kubelet;
pub mod labels;
pub mod quantity;

pub use image_gc::ImageGc;

/// Everything that one agent needs to know about its node, its control plane and its runtime.
#[derive(Debug, Clone, PartialEq)]
pub struct AgentConfig {
    /// The name of the Node object.
    pub node_name: String,
    /// The node's addresses, primary one first. Empty: taken from the default route's link.
    pub node_ips: Vec<IpAddr>,
    /// How to reach the API server. Without it only static pods run.
    pub kubeconfig: Option<PathBuf>,
    /// Asks the API server for a client certificate when `kubeconfig` does not exist yet.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// State that must survive a reboot.
    pub root_dir: PathBuf,
    /// State that must not survive a reboot.
    pub run_dir: PathBuf,
    /// Certificates that the agent makes for itself. `None`: `<root_dir>/pki`.
    pub cert_dir: Option<PathBuf>,
    /// Container logs, `<namespace>_<pod>_<uid>/<container>/<n>.log`.
    pub pod_logs_dir: PathBuf,
    /// A folder of manifests to run without asking the API server.
    pub static_pod_path: Option<PathBuf>,
    pub runtime: RuntimeConfig,
    pub node: NodeConfig,
    pub server: ServerConfig,
    pub pods: PodDefaults,
    pub image_gc: ImageGc,
    /// Where `/healthz` answers without TLS; `None` switches it off.
    pub healthz: Option<SocketAddr>,
}

/// How containers are run on this node.
#[derive(Debug, Clone, PartialEq)]
pub struct RuntimeConfig {
    /// containerd's socket.
    pub socket: PathBuf,
    /// The containerd namespace that holds this agent's containers.
    pub namespace: String,
    pub cni_conf_dir: PathBuf,
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Where the pods' cgroups start; several agents on one machine need several roots.
    pub cgroup_root: String,
    pub cgroup_driver: CgroupDriver,
    /// A network namespace to reach registries from, for nodes whose own has no way out.
    pub pull_netns: Option<PathBuf>,
    /// How to reach registries, in containerd's `certs.d` layout.
    pub registry_config_dir: PathBuf,
    /// The OCI runtime's program; empty for containerd's default.
    pub default_runtime: String,
}

/// Who creates cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupDriver {
    Cgroupfs,
    Systemd,
}

impl CgroupDriver {
    /// The name that flags and files use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cgroupfs => "cgroupfs",
            Self::Systemd => "systemd",
        }
    }
}

/// What the Node object says, and how often.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeConfig {
    /// Create the Node object. When off, somebody else has to.
    pub register: bool,
    pub labels: BTreeMap<String, String>,
    pub taints: Vec<labels::NodeTaint>,
    pub max_pods: u32,
    /// Withheld from pods; cpu in thousandths of a core, everything else in bytes or pieces.
    pub kube_reserved: BTreeMap<String, u64>,
    /// Withheld from pods, in the same units.
    pub system_reserved: BTreeMap<String, u64>,
    /// Below this much free memory the node is under memory pressure; pods cannot have it either.
    pub eviction_memory: Threshold,
    /// Below this much free space on the file system of `root_dir` the node is under disk pressure.
    pub eviction_disk: Threshold,
    /// Below this share of free inodes there, too.
    pub eviction_inodes: Threshold,
    /// How often the status is looked at.
    pub status_update_frequency: Duration,
    /// How often an unchanged status is written all the same.
    pub status_report_frequency: Duration,
    /// How long the node counts as alive after its last sign of life.
    pub lease_duration: Duration,
    pub provider_id: Option<String>,
    /// How many images the Node lists; `None` is all.
    pub status_max_images: Option<usize>,
}

/// An amount below which a resource counts as scarce.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Threshold {
    Amount(u64),
    /// Between 0 and 1, of the capacity.
    Share(f64),
}

impl Threshold {
    /// The amount that this threshold means for a given capacity.
    pub fn of(self, capacity: u64) -> u64 {
        match self {
            Self::Amount(amount) => amount,
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss,
                reason = "a share of a capacity is never negative and need not be exact"
            )]
            Self::Share(share) => (capacity as f64 * share) as u64,
        }
    }
}

/// The HTTPS API of the node.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerConfig {
    pub address: IpAddr,
    pub port: u16,
    /// Certificate chain and key in PEM. `None`: self-signed, kept in the certificate folder.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Clients with a certificate of this CA are who their certificate says they are.
    pub client_ca_file: Option<PathBuf>,
    /// Let requests without credentials in as `system:anonymous`.
    pub anonymous: bool,
    /// Ask the API server whom a bearer token belongs to.
    pub token_review: bool,
    pub token_review_ttl: Duration,
    pub authorization: Authorization,
    /// How long a yes of the API server holds.
    pub authorized_ttl: Duration,
    /// How long a no holds.
    pub unauthorized_ttl: Duration,
    /// An exec, attach or port-forward without traffic is ended after this time.
    pub streaming_idle_timeout: Duration,
    /// Serve logs, exec, attach and port-forward.
    pub debugging_handlers: bool,
}

/// Who may do what on the node's HTTPS API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authorization {
    AlwaysAllow,
    /// The API server decides (SubjectAccessReview).
    Webhook,
}

/// What pods get unless they say otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct PodDefaults {
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    /// The resolver configuration that pods inherit; empty means none.
    pub resolv_conf: PathBuf,
    /// A container's log is rotated when it reaches this size.
    pub log_max_size: u64,
    /// How many files of a container's log are kept.
    pub log_max_files: u32,
    /// The longest pause between two starts of a crashing container.
    pub max_restart_period: Duration,
    /// Pods of these runtime classes want their sockets left alone by the service proxy.
    pub socket_exempt_runtime_classes: Vec<String>,
    /// Sysctls beyond the safe ones that pods may set; a `*` at the end stands for any rest.
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Processes per pod; `None` is no limit.
    pub pids_limit: Option<i64>,
    /// How many images are pulled at the same time.
    pub max_parallel_image_pulls: u32,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            node_name: String::new(),
            node_ips: Vec::new(),
            kubeconfig: None,
            bootstrap_kubeconfig: None,
            root_dir: PathBuf::from("/var/lib/keelson"),
            run_dir: PathBuf::from("/run/keelson"),
            cert_dir: None,
            pod_logs_dir: PathBuf::from("/var/log/pods"),
            static_pod_path: None,
            runtime: RuntimeConfig::default(),
            node: NodeConfig::default(),
            server: ServerConfig::default(),
            pods: PodDefaults::default(),
            image_gc: ImageGc::default(),
            healthz: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 10248))),
        }
    }
}

impl AgentConfig {
    /// Where the agent keeps the certificates that it makes for itself.
    pub fn cert_dir(&self) -> PathBuf {
        self.cert_dir.clone().unwrap_or_else(|| self.root_dir.join("pki"))
    }
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            socket: PathBuf::from("/run/containerd/containerd.sock"),
            namespace: "keelson".to_owned(),
            cni_conf_dir: PathBuf::from("/etc/cni/net.d"),
            cni_bin_dirs: default_cni_bin_dirs(),
            cgroup_root: "/".to_owned(),
            cgroup_driver: CgroupDriver::Cgroupfs,
            pull_netns: None,
            registry_config_dir: PathBuf::from("/etc/containerd/certs.d"),
            default_runtime: String::new(),
        }
    }
}

/// `/opt/cni/bin`, then the folder of this program, where `keelson-cni` is installed beside it.
fn default_cni_bin_dirs() -> Vec<PathBuf> {
    let mut dirs = vec![PathBuf::from("/opt/cni/bin")];
    let own = std::env::current_exe().ok();
    dirs.extend(own.as_deref().and_then(std::path::Path::parent).map(PathBuf::from));
    dirs
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            register: true,
            labels: BTreeMap::new(),
            taints: Vec::new(),
            max_pods: 110,
            kube_reserved: BTreeMap::new(),
            system_reserved: BTreeMap::new(),
            eviction_memory: Threshold::Amount(100 << 20),
            eviction_disk: Threshold::Share(0.10),
            eviction_inodes: Threshold::Share(0.05),
            status_update_frequency: Duration::from_secs(10),
            status_report_frequency: Duration::from_secs(300),
            lease_duration: Duration::from_secs(40),
            provider_id: None,
            status_max_images: Some(50),
        }
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            address: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            port: 10250,
            tls: None,
            client_ca_file: None,
            anonymous: false,
            token_review: true,
            token_review_ttl: Duration::from_secs(120),
            authorization: Authorization::Webhook,
            authorized_ttl: Duration::from_secs(300),
            unauthorized_ttl: Duration::from_secs(30),
            streaming_idle_timeout: Duration::from_secs(4 * 3600),
            debugging_handlers: true,
        }
    }
}

impl Default for PodDefaults {
    fn default() -> Self {
        Self {
            cluster_dns: Vec::new(),
            cluster_domain: String::new(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            log_max_size: 10 << 20,
            log_max_files: 5,
            max_restart_period: Duration::from_secs(300),
            socket_exempt_runtime_classes: Vec::new(),
            allowed_unsafe_sysctls: Vec::new(),
            pids_limit: None,
            max_parallel_image_pulls: 8,
        }
    }
}

/// A value that the configuration cannot have, with what it should have been.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {found} is not {expected}")]
pub struct BadValue {
    /// The flag or the path in the file.
    pub field: String,
    /// What was there, as the user wrote it.
    pub found: String,
    /// What belongs there, with an example.
    pub expected: &'static str,
}

impl BadValue {
    /// A value of `field` that was found where `expected` belongs.
    pub fn new(
        field: impl Into<String>,
        found: impl std::fmt::Display,
        expected: &'static str,
    ) -> Self {
        Self { field: field.into(), found: found.to_string(), expected }
    }
}
