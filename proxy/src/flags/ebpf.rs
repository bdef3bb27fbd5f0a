//! The flags about the eBPF mode.

use std::path::PathBuf;

use clap::ArgAction;

use crate::ebpf::{EbpfConfig, XdpChoice};

#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub struct EbpfFlags {
    /// Folder below /sys/fs/bpf that keeps the maps and programs of mode ebpf
    #[arg(long, value_name = "PATH")]
    pub ebpf_pins: Option<PathBuf>,
    /// Mode ebpf: serve the sockets of processes in this cgroup (version 2) and below; without it, all
    #[arg(long, value_name = "PATH")]
    pub ebpf_cgroup: Option<PathBuf>,
    /// Mode ebpf: serve sockets when they connect, which costs no packet any work (default true)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", action = ArgAction::Set)]
    pub ebpf_sockets: Option<bool>,
    /// Mode ebpf: forward frames of known connections to other nodes at XDP (default off)
    #[arg(long, value_name = "MODE", value_enum)]
    pub ebpf_xdp: Option<XdpChoice>,
    /// Mode ebpf: where that is done; without it at the interfaces that a default route leaves by
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub ebpf_xdp_interfaces: Vec<String>,
    /// Mode ebpf: show the traffic of at most so many Service ports on /metrics, those with the most (default 1000)
    #[arg(long, value_name = "COUNT")]
    pub ebpf_service_metrics: Option<usize>,
    /// Mode ebpf: endpoints of all Services together that there may be; memory is used only for those that there are
    /// (default 1048576)
    #[arg(long, value_name = "N")]
    pub ebpf_max_endpoints: Option<u32>,
}

impl EbpfFlags {
    /// What they say, where so many connections may be remembered.
    pub fn config(&self, max_flows: Option<u32>) -> EbpfConfig {
        let default = EbpfConfig::default();
        EbpfConfig {
            pins: self.ebpf_pins.clone().unwrap_or(default.pins.clone()),
            cgroup: self.ebpf_cgroup.clone(),
            sockets: self.ebpf_sockets.unwrap_or(default.sockets),
            xdp: self.ebpf_xdp.unwrap_or(default.xdp),
            xdp_interfaces: self.ebpf_xdp_interfaces.clone(),
            service_metrics: self.ebpf_service_metrics.unwrap_or(default.service_metrics),
            max_flows: max_flows.unwrap_or(default.max_flows),
            max_endpoints: self.ebpf_max_endpoints.unwrap_or(default.max_endpoints),
            ..default
        }
    }
}
