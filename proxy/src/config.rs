//! What a caller tells the proxy. No command line here: see the binary.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;
use serde_json::json;

use crate::backend::Mode;
use crate::conntrack::ConntrackLimits;
use crate::ebpf::EbpfConfig;
use crate::ipvs::IpvsConfig;

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
    /// Node ports answer on 127.0.0.1, too.
    pub localhost_node_ports: bool,
    /// What only the IPVS mode needs.
    pub ipvs: IpvsConfig,
    /// What only the eBPF mode needs.
    pub ebpf: EbpfConfig,
    /// Limits of connection tracking to set for the whole node; nothing leaves them alone.
    pub conntrack: Option<ConntrackLimits>,
    /// Where the last known state is kept, so that Services work after a reboot while the API server is
    /// still away; nowhere when not given.
    pub state_file: Option<PathBuf>,
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
    /// Their packets come through this bridge.
    Bridge(String),
    /// Their packets come through an interface whose name starts like this.
    InterfacePrefix(String),
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
            modes: &Mode::AUTO,
            local_sources: LocalSources::Unknown,
            masquerade_all: false,
            masquerade_bit: 14,
            node_port_addresses: NodePortAddresses::Primary,
            localhost_node_ports: true,
            ipvs: IpvsConfig::default(),
            ebpf: EbpfConfig::default(),
            conntrack: None,
            state_file: None,
            healthz_address: Some(SocketAddr::from(([0, 0, 0, 0], 10256))),
            metrics_address: Some(SocketAddr::from(([127, 0, 0, 1], 10249))),
            sync_period: Duration::from_secs(30),
        }
    }
}

impl ProxyConfig {
    /// As /configz shows it: the fields of KubeProxyConfiguration that mean something here.
    pub(crate) fn as_json(&self, mode: Mode) -> serde_json::Value {
        let texts =
            |ranges: &[IpNetwork]| ranges.iter().map(ToString::to_string).collect::<Vec<_>>();
        let address =
            |address: Option<SocketAddr>| address.map(|a| a.to_string()).unwrap_or_default();
        let (detect, cidrs, local) = match &self.local_sources {
            LocalSources::Unknown => ("ClusterCIDR", Vec::new(), json!({})),
            LocalSources::Cidrs(cidrs) => ("ClusterCIDR", texts(cidrs), json!({})),
            LocalSources::NodeCidrs => ("NodeCIDR", Vec::new(), json!({})),
            LocalSources::Bridge(name) => {
                ("BridgeInterface", Vec::new(), json!({"bridgeInterface": name}))
            }
            LocalSources::InterfacePrefix(prefix) => {
                ("InterfaceNamePrefix", Vec::new(), json!({"interfaceNamePrefix": prefix}))
            }
        };
        let node_ports = match &self.node_port_addresses {
            NodePortAddresses::Primary => vec!["primary".to_owned()],
            NodePortAddresses::All => Vec::new(),
            NodePortAddresses::Ranges(ranges) => texts(ranges),
        };
        json!({"kubeproxy.config.k8s.io": {
            "kind": "KubeProxyConfiguration",
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "mode": mode.name(),
            "hostnameOverride": self.node_name,
            "clientConnection": {"kubeconfig": self.kubeconfig},
            "clusterCIDR": cidrs.join(","),
            "detectLocalMode": detect,
            "detectLocal": local,
            "nodePortAddresses": node_ports,
            "healthzBindAddress": address(self.healthz_address),
            "metricsBindAddress": address(self.metrics_address),
            (match mode {
                // kube-proxy's IPVS mode takes these from the section of the iptables mode.
                Mode::Ipvs => "iptables",
                mode => mode.name(),
            }): {"masqueradeAll": self.masquerade_all, "masqueradeBit": self.masquerade_bit},
            "ipvs": {
                "scheduler": self.ipvs.scheduler,
                "strictARP": self.ipvs.strict_arp,
                "excludeCIDRs": texts(&self.ipvs.excluded),
                "tcpTimeout": format!("{}s", self.ipvs.tcp_timeout),
                "tcpFinTimeout": format!("{}s", self.ipvs.tcp_fin_timeout),
                "udpTimeout": format!("{}s", self.ipvs.udp_timeout),
            },
        }})
    }
}
