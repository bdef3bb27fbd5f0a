//! What the pod layer needs to know about its node.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Plain values; whoever starts the agent fills them in.
#[derive(Debug, Clone)]
pub struct PodsConfig {
    pub node_name: String,
    /// The node's addresses, primary first.
    pub node_ips: Vec<IpAddr>,
    /// What the node has, as in `status.capacity`.
    pub capacity: BTreeMap<String, Quantity>,
    /// What of it pods may use, as in `status.allocatable`; `pods` limits their number.
    pub allocatable: BTreeMap<String, Quantity>,
    /// Pod folders (volumes, hosts files) stand below `<root_dir>/pods`.
    pub root_dir: PathBuf,
    /// `<namespace>_<pod>_<uid>/<container>/<n>.log` stands below it.
    pub pod_logs_dir: PathBuf,
    /// A folder of manifests to run without asking an API server.
    pub static_pod_path: Option<PathBuf>,
    /// Where `kubepods` starts in every cgroup hierarchy.
    pub cgroup_root: String,
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    /// The resolver configuration that pods inherit; empty means none.
    pub resolv_conf: PathBuf,
    /// Pods of these runtime classes want their sockets left alone by the service proxy.
    pub socket_exempt_runtime_classes: Vec<String>,
    /// Sysctls beyond the safe ones that pods may set; a `*` at the end stands for any rest.
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Processes per pod; `None` is no limit.
    pub pids_limit: Option<i64>,
    /// The longest CrashLoopBackOff.
    pub max_restart_period: Duration,
    pub max_parallel_image_pulls: u32,
}

impl Default for PodsConfig {
    fn default() -> Self {
        Self {
            node_name: String::new(),
            node_ips: Vec::new(),
            capacity: BTreeMap::new(),
            allocatable: BTreeMap::new(),
            root_dir: PathBuf::from("/var/lib/keelson"),
            pod_logs_dir: PathBuf::from("/var/log/pods"),
            static_pod_path: None,
            cgroup_root: "/".into(),
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".into(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            socket_exempt_runtime_classes: Vec::new(),
            allowed_unsafe_sysctls: Vec::new(),
            pids_limit: None,
            max_restart_period: Duration::from_secs(300),
            max_parallel_image_pulls: 4,
        }
    }
}
