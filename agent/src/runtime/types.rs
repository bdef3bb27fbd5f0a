//! The runtime's vocabulary: what pods ask for ([`SandboxConfig`], [`ContainerConfig`]) and what is observed
//! ([`ObservedPod`]).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use jiff::Timestamp;

/// Names one pod for the whole of its life.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodId {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// What a pod's sandbox shall be. One sandbox is one pause process plus the namespaces that it owns.
#[derive(Debug, Clone)]
pub struct SandboxConfig {
    pub pod: PodId,
    /// Counts the sandboxes of this pod, from 0.
    pub attempt: u32,
    pub hostname: String,
    /// The pod's cgroup below each controller, e.g. `/kubepods/burstable/pod<uid>`. The caller has created it.
    pub cgroup_parent: String,
    pub network: PodNetwork,
    pub host_ipc: bool,
    pub host_pid: bool,
    /// All containers see one another's processes (`shareProcessNamespace`).
    pub share_pid: bool,
    pub privileged: bool,
    pub sysctls: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Name of the OCI runtime, empty for the configured default.
    pub runtime_handler: String,
    /// The service proxy shall leave its sockets alone and translate its packets.
    pub exempt_sockets: bool,
}

/// Where a pod's network comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodNetwork {
    /// The node's own network namespace.
    Host,
    /// A namespace of its own, set up by CNI.
    Cni { host_ports: Vec<HostPort> },
}

/// One `hostPort` mapping, as CNI's `portMappings` capability wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    pub host_port: u16,
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    pub host_ip: Option<IpAddr>,
}

/// What a container shall be, with every reference already resolved by the caller.
#[derive(Debug, Clone)]
pub struct ContainerConfig {
    pub name: String,
    /// Counts the containers of this name in this pod, from 0: the restart count.
    pub attempt: u32,
    /// An image that is present, as [`ImageRef::id`] names it.
    pub image_id: String,
    /// What the manifest called the image.
    pub image_name: String,
    /// Hash over name and image: a container with another one is replaced.
    pub spec_hash: String,
    /// `command`: replaces the image's entrypoint when not empty.
    pub command: Vec<String>,
    /// `args`: replaces the image's cmd when not empty.
    pub args: Vec<String>,
    pub working_dir: Option<String>,
    /// In order; later names win. The runtime adds the image's own environment below it and HOSTNAME.
    pub env: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    pub devices: Vec<PathBuf>,
    pub resources: Resources,
    pub security: ContainerSecurity,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
    /// Path of the CRI log file; its folder exists.
    pub log_path: PathBuf,
    /// Where in the container the file for its last words is.
    pub termination_message_path: String,
    /// Without last words, a failed container's log has them (`FallbackToLogsOnError`).
    pub termination_message_from_log: bool,
    pub grace_period_secs: i64,
    pub annotations: BTreeMap<String, String>,
    /// Join this running container's PID namespace (ephemeral containers).
    pub target_container_id: Option<String>,
}

/// A bind mount into a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub host_path: PathBuf,
    pub container_path: String,
    pub read_only: bool,
    pub propagation: Propagation,
}

/// How mounts made on one side reach the other (`mountPropagation`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Propagation {
    #[default]
    Private,
    HostToContainer,
    Bidirectional,
}

/// cgroup values, already computed from requests and limits. `None` leaves the kernel's default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    pub cpu_shares: Option<u64>,
    pub cpu_quota_us: Option<i64>,
    pub cpu_period_us: Option<u64>,
    pub memory_limit_bytes: Option<i64>,
    pub pids_limit: Option<i64>,
    /// -1000 to 1000; clamped by the runtime when the agent lacks CAP_SYS_RESOURCE.
    pub oom_score_adj: i32,
}

/// A container's effective security context (pod and container level already merged).
#[derive(Debug, Clone, Default)]
pub struct ContainerSecurity {
    pub privileged: bool,
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    pub run_as_non_root: bool,
    pub supplemental_groups: Vec<i64>,
    /// `supplementalGroupsPolicy: Strict`: the groups that the image gives its user do not count.
    pub strict_groups: bool,
    pub add_capabilities: Vec<String>,
    pub drop_capabilities: Vec<String>,
    pub read_only_root_fs: bool,
    pub no_new_privs: bool,
    /// `RuntimeDefault`, `Unconfined` or `Localhost/<file>`; `None` is Unconfined, as kubelet has it by default.
    pub seccomp: Option<String>,
    /// `procMount: Unmasked`.
    pub unmasked_proc: bool,
}

/// An image that is present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRef {
    /// `sha256:<config digest>`.
    pub id: String,
    /// What `imageID` of a container status shows: `<repository>@sha256:…` where it was pulled, else `id`.
    pub repo_digest: String,
}

/// Everything that the runtime has of one pod.
#[derive(Debug, Clone, PartialEq)]
pub struct ObservedPod {
    pub pod: PodId,
    /// Newest first.
    pub sandboxes: Vec<ObservedSandbox>,
    /// Newest first (by attempt) per name.
    pub containers: Vec<ObservedContainer>,
}

/// A sandbox as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct ObservedSandbox {
    pub id: String,
    pub attempt: u32,
    pub ready: bool,
    pub created_at: Timestamp,
    /// Primary address first; empty for the host network.
    pub ips: Vec<IpAddr>,
    pub host_network: bool,
}

/// A container as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct ObservedContainer {
    pub id: String,
    pub name: String,
    pub attempt: u32,
    pub sandbox_id: String,
    pub spec_hash: String,
    pub image_name: String,
    pub image: ImageRef,
    pub state: ContainerState,
    pub created_at: Timestamp,
    pub log_path: PathBuf,
}

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq)]
pub enum ContainerState {
    Created,
    Running {
        started_at: Timestamp,
        pid: u32,
    },
    Exited(Exit),
    /// containerd has the container but cannot say what became of its task.
    Unknown,
}

/// How a container ended. Persisted before the task is deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `ContainerStatusUnknown`.
    pub reason: String,
    /// The termination message, or why the start failed.
    pub message: String,
    pub started_at: Option<Timestamp>,
    pub finished_at: Timestamp,
}

/// Something changed; look again. Deliberately says no more: whoever is woken observes the truth itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeEvent {
    /// This pod's sandbox or a container of it changed.
    Pod { uid: String },
    /// The event stream was interrupted: anything may have changed.
    Resync,
}
