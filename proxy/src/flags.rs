//! kube-proxy's command line and configuration file, as far as they mean something here.

mod conntrack;
mod ebpf;
pub(crate) mod file;
mod ipvs;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{ArgAction, Parser};
pub use ebpf::EbpfFlags;
use ipnetwork::IpNetwork;

use crate::backend::Mode;
use crate::config::{LocalSources, NodePortAddresses, ProxyConfig};

/// Where the last known Services are kept by default.
const STATE_FILE: &str = "/var/lib/keelson-proxy/last-known.json";

/// Replaces kube-proxy: the same flags, the same behaviour.
#[derive(Debug, Default, Parser)]
#[command(name = "keelson-proxy", version)]
pub struct Flags {
    /// A KubeProxyConfiguration file; flags that are given win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Kubeconfig file with the API server's address and credentials
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// URL of the API server, instead of the kubeconfig's
    #[arg(long, value_name = "URL")]
    pub master: Option<String>,
    /// Name of this node, instead of the host name
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// How to program the kernel: ebpf, nftables, iptables (or iptables-nft, iptables-legacy to choose the
    /// variant), ipvs, or auto for the first that does everything here
    #[arg(long, value_name = "MODE")]
    pub proxy_mode: Option<String>,
    /// Pod ranges of the cluster, one per IP family
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    pub cluster_cidr: Vec<String>,
    /// How pods are told from other sources: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix
    #[arg(long, value_name = "MODE")]
    pub detect_local_mode: Option<String>,
    /// The bridge that pods are on, for BridgeInterface
    #[arg(long, value_name = "NAME")]
    pub pod_bridge_interface: Option<String>,
    /// How the names of pods' interfaces start, for InterfaceNamePrefix
    #[arg(long, value_name = "PREFIX")]
    pub pod_interface_name_prefix: Option<String>,
    /// Node ports answer on 127.0.0.1, too
    #[arg(long, num_args = 0..=1, default_missing_value = "true", action = ArgAction::Set)]
    pub iptables_localhost_nodeports: Option<bool>,
    /// Where the last known Services are kept for a start without the API server; empty for nowhere
    #[arg(long, value_name = "FILE")]
    pub state_file: Option<String>,
    /// Masquerade all traffic to ClusterIPs
    #[arg(long, num_args = 0..=1, default_missing_value = "true", action = ArgAction::Set)]
    pub masquerade_all: Option<bool>,
    /// Bit of the packet mark that asks for masquerading
    #[arg(long, value_name = "BIT")]
    pub iptables_masquerade_bit: Option<u8>,
    /// Ranges of node addresses that serve node ports, `primary`, or `all`
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    pub nodeport_addresses: Vec<String>,
    /// Where to serve health checks; empty for nowhere
    #[arg(long, value_name = "ADDRESS")]
    pub healthz_bind_address: Option<String>,
    /// Where to serve metrics; empty for nowhere
    #[arg(long, value_name = "ADDRESS")]
    pub metrics_bind_address: Option<String>,
    /// The node's address, instead of those in the Node object; 0.0.0.0 and :: mean none
    #[arg(long, value_name = "IP")]
    pub bind_address: Option<IpAddr>,
    /// Remove everything that the proxy, in any mode, and kube-proxy ever made, and exit;
    /// =kube-proxy: only what kube-proxy made
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub cleanup: Option<Cleanup>,
    /// Verbosity: 4 shows decisions, 6 everything
    #[arg(short, long, value_name = "LEVEL", default_value_t = 2)]
    pub v: u8,
    #[command(flatten)]
    pub conntrack: conntrack::ConntrackFlags,
    #[command(flatten)]
    pub ipvs: ipvs::IpvsFlags,
    #[command(flatten)]
    pub ebpf: ebpf::EbpfFlags,
    #[command(flatten)]
    pub ignored: IgnoredFlags,
}

/// What `--cleanup` removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Cleanup {
    #[value(name = "true")]
    Everything,
    #[value(name = "false")]
    Nothing,
    /// So that kube-proxy can be replaced while keelson-proxy runs already.
    #[value(name = "kube-proxy")]
    KubeProxy,
}

/// Flags of kube-proxy without a meaning here: taken, and named in a warning.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub struct IgnoredFlags {
    #[arg(long, hide = true)]
    config_sync_period: Option<String>,
    #[arg(long, hide = true)]
    iptables_min_sync_period: Option<String>,
    #[arg(long, hide = true)]
    iptables_sync_period: Option<String>,
    #[arg(long, hide = true)]
    kube_api_burst: Option<String>,
    #[arg(long, hide = true)]
    kube_api_qps: Option<String>,
    #[arg(long, hide = true)]
    oom_score_adj: Option<String>,
    #[arg(long, hide = true)]
    feature_gates: Option<String>,
    #[arg(long, hide = true)]
    logging_format: Option<String>,
    #[arg(long, hide = true)]
    profiling: Option<String>,
}

impl IgnoredFlags {
    fn given(&self) -> Vec<&'static str> {
        let flags = [
            ("--config-sync-period", &self.config_sync_period),
            ("--iptables-min-sync-period", &self.iptables_min_sync_period),
            ("--iptables-sync-period", &self.iptables_sync_period),
            ("--kube-api-burst", &self.kube_api_burst),
            ("--kube-api-qps", &self.kube_api_qps),
            ("--oom-score-adj", &self.oom_score_adj),
            ("--feature-gates", &self.feature_gates),
            ("--logging-format", &self.logging_format),
            ("--profiling", &self.profiling),
        ];
        flags.into_iter().filter(|(_, value)| value.is_some()).map(|(name, _)| name).collect()
    }
}

impl Flags {
    /// The configuration, and a warning for each setting that has no effect.
    pub fn resolve(mut self) -> anyhow::Result<(ProxyConfig, Vec<String>)> {
        let mut warnings: Vec<String> = self
            .ignored
            .given()
            .into_iter()
            .map(|flag| format!("{flag} has no effect in keelson-proxy"))
            .collect();
        if let Some(path) = self.config.take() {
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let found =
                file::read(&text).with_context(|| format!("cannot use {}", path.display()))?;
            warnings.extend(found.warnings);
            self.fill_from(found.flags);
        }
        Ok((self.into_config()?, warnings))
    }

    /// Takes over what is not given on the command line.
    fn fill_from(&mut self, file: Flags) {
        fn fill<T>(flag: &mut Option<T>, file: Option<T>) {
            if flag.is_none() {
                *flag = file;
            }
        }
        self.conntrack.fill_from(file.conntrack);
        self.ipvs.fill_from(file.ipvs);
        fill(&mut self.kubeconfig, file.kubeconfig);
        fill(&mut self.hostname_override, file.hostname_override);
        fill(&mut self.proxy_mode, file.proxy_mode);
        fill(&mut self.detect_local_mode, file.detect_local_mode);
        fill(&mut self.pod_bridge_interface, file.pod_bridge_interface);
        fill(&mut self.pod_interface_name_prefix, file.pod_interface_name_prefix);
        fill(&mut self.iptables_localhost_nodeports, file.iptables_localhost_nodeports);
        fill(&mut self.masquerade_all, file.masquerade_all);
        fill(&mut self.iptables_masquerade_bit, file.iptables_masquerade_bit);
        fill(&mut self.healthz_bind_address, file.healthz_bind_address);
        fill(&mut self.metrics_bind_address, file.metrics_bind_address);
        fill(&mut self.bind_address, file.bind_address);
        if self.cluster_cidr.is_empty() {
            self.cluster_cidr = file.cluster_cidr;
        }
        if self.nodeport_addresses.is_empty() {
            self.nodeport_addresses = file.nodeport_addresses;
        }
    }

    fn into_config(self) -> anyhow::Result<ProxyConfig> {
        let mode = self.proxy_mode.as_deref().unwrap_or("auto");
        let Some(modes) = Mode::candidates(mode) else {
            let known = Mode::ALL.map(Mode::name).join(", ");
            bail!(
                "--proxy-mode: {mode:?} is not a mode that this version knows; use auto, iptables, or one of {known}"
            )
        };
        let default = ProxyConfig::default();
        let masquerade_bit = self.iptables_masquerade_bit.unwrap_or(default.masquerade_bit);
        if masquerade_bit > 31 {
            bail!("--iptables-masquerade-bit: {masquerade_bit} is not a bit of the mark (0-31)");
        }
        let node_name = match &self.hostname_override {
            Some(name) => name.trim().to_lowercase(),
            None => host_name()?,
        };
        let conntrack = self.conntrack.limits()?;
        let healthz = self.healthz_bind_address.as_deref();
        let metrics = self.metrics_bind_address.as_deref();
        Ok(ProxyConfig {
            modes,
            node_name,
            node_addresses: self
                .bind_address
                .filter(|ip| !ip.is_unspecified())
                .into_iter()
                .collect(),
            local_sources: local_sources(&self)?,
            localhost_node_ports: self.iptables_localhost_nodeports.unwrap_or(true),
            state_file: match self.state_file.as_deref() {
                Some("") => None,
                path => Some(PathBuf::from(path.unwrap_or(STATE_FILE))),
            },
            masquerade_all: self.masquerade_all.unwrap_or(false),
            masquerade_bit,
            node_port_addresses: node_port_addresses(&self.nodeport_addresses)?,
            healthz_address: address("healthz", healthz, 10256, default.healthz_address)?,
            metrics_address: address("metrics", metrics, 10249, default.metrics_address)?,
            ipvs: self.ipvs.config()?,
            ebpf: self.ebpf.config(conntrack.most_here()),
            conntrack: Some(conntrack),
            kubeconfig: self.kubeconfig,
            api_server: self.master,
            sync_period: default.sync_period,
        })
    }
}

fn host_name() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("cannot read the host name")?;
    Ok(name.to_string_lossy().trim().to_lowercase())
}

fn parse_cidrs(flag: &str, texts: &[String]) -> anyhow::Result<Vec<IpNetwork>> {
    let parse = |text: &String| {
        let parsed = text.trim().parse();
        parsed.with_context(|| format!("{flag}: {text:?} is not a range such as 10.0.0.0/8"))
    };
    texts.iter().filter(|text| !text.trim().is_empty()).map(parse).collect()
}

fn local_sources(flags: &Flags) -> anyhow::Result<LocalSources> {
    let cidrs = parse_cidrs("--cluster-cidr", &flags.cluster_cidr)?;
    let given = |flag: &str, value: &Option<String>| match value.as_deref() {
        None | Some("") => bail!("--detect-local-mode: this mode needs {flag}"),
        Some(name) if name.len() > 15 => {
            bail!("{flag}: {name:?} is longer than an interface name can be (15)")
        }
        Some(name) => Ok(name.to_owned()),
    };
    match flags.detect_local_mode.as_deref() {
        None | Some("" | "ClusterCIDR") if cidrs.is_empty() => Ok(LocalSources::Unknown),
        None | Some("" | "ClusterCIDR") => Ok(LocalSources::Cidrs(cidrs)),
        Some("NodeCIDR") => Ok(LocalSources::NodeCidrs),
        Some("BridgeInterface") => {
            given("--pod-bridge-interface", &flags.pod_bridge_interface).map(LocalSources::Bridge)
        }
        Some("InterfaceNamePrefix") => {
            given("--pod-interface-name-prefix", &flags.pod_interface_name_prefix)
                .map(LocalSources::InterfacePrefix)
        }
        Some(mode) => bail!(
            "--detect-local-mode: {mode:?} is not a mode; use ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix"
        ),
    }
}

fn node_port_addresses(texts: &[String]) -> anyhow::Result<NodePortAddresses> {
    let texts: Vec<String> =
        texts.iter().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()).collect();
    match texts.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] | ["primary"] => Ok(NodePortAddresses::Primary),
        ["all"] => Ok(NodePortAddresses::All),
        _ => Ok(NodePortAddresses::Ranges(parse_cidrs("--nodeport-addresses", &texts)?)),
    }
}

/// An address with or without a port; empty for nowhere.
fn address(
    what: &str,
    text: Option<&str>,
    port: u16,
    default: Option<SocketAddr>,
) -> anyhow::Result<Option<SocketAddr>> {
    let Some(text) = text else { return Ok(default) };
    if text.is_empty() {
        return Ok(None);
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(Some(SocketAddr::new(ip, port)));
    }
    let parsed: SocketAddr = text.parse().with_context(|| {
        format!("--{what}-bind-address: {text:?} is not an address like 0.0.0.0:{port}")
    })?;
    Ok((parsed.port() != 0).then_some(parsed))
}
