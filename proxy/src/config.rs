//! What a caller tells the proxy. No command line here: see the binary.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;

use crate::backend::Mode;

/// Configuration of [`crate::run`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyConfig {
    /// Where and who: without a path, the service account of the pod that the proxy runs in.
    pub kubeconfig: Option<PathBuf>,
    /// URL of the API server, instead of the one in the kubeconfig.
    pub api_server: Option<String>,
    /// Name of the Node object: endpoints with this name are local.
    pub node_name: String,
    /// The node's addresses; when empty, those in the Node object.
    pub node_addresses: Vec<IpAddr>,
    /// How to program the kernel, in order of preference.
    pub modes: &'static [Mode],
    /// The cluster's pod ranges, to tell pods from other sources.
    pub local_sources: LocalSources,
    /// Masquerade all traffic to ClusterIPs.
    pub masquerade_all: bool,
    /// Bit of the packet mark that asks for masquerading (0 to 31).
    pub masquerade_bit: u8,
    /// Which addresses of the node serve node ports.
    pub node_port_addresses: NodePortAddresses,
    /// Where to serve /healthz, /livez and /readyz.
    pub healthz_address: Option<SocketAddr>,
    /// Where to serve /metrics, /proxyMode and /configz.
    pub metrics_address: Option<SocketAddr>,
    /// A change that waits for twice this time makes the proxy unhealthy.
    pub sync_period: Duration,
}

/// How pods are told from other sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalSources {
    /// They are not.
    Unknown,
    /// By these ranges.
    Cidrs(Vec<IpNetwork>),
    /// By the Node object's pod ranges: only the pods of this node.
    NodeCidrs,
}

/// Which addresses of the node serve node ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Those that the Node object names.
    Primary,
    /// All except loopback.
    All,
    /// Those in these ranges; in a family without any, all.
    Ranges(Vec<IpNetwork>),
}

impl Default for ProxyConfig {
    fn default() -> Self {
        ProxyConfig {
            kubeconfig: None,
            api_server: None,
            node_name: String::new(),
            node_addresses: Vec::new(),
            modes: &Mode::ALL,
            local_sources: LocalSources::Unknown,
            masquerade_all: false,
            masquerade_bit: 14,
            node_port_addresses: NodePortAddresses::Primary,
            healthz_address: Some(SocketAddr::from(([0, 0, 0, 0], 10256))),
            metrics_address: Some(SocketAddr::from(([127, 0, 0, 1], 10249))),
            sync_period: Duration::from_secs(30),
        }
    }
}
