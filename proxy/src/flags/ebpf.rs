//! The flags about the eBPF mode.

use std::path::PathBuf;

use crate::ebpf::{Algorithm, EbpfConfig, Forwarding, Sockets, XdpChoice};

#[derive(Clone, Debug, Default, clap::Args)]
#[group(skip)]
pub struct EbpfFlags {
    /// Mode ebpf: folder in a BPF file system that keeps maps, programs and links (default
    /// /sys/fs/bpf/keelson-proxy)
    #[arg(long, value_name = "PATH")]
    pub ebpf_pins: Option<PathBuf>,
    /// Mode ebpf: serve the sockets of processes in this cgroup (version 2) and below; without it, all
    #[arg(long, value_name = "PATH")]
    pub ebpf_cgroup: Option<PathBuf>,
    /// Mode ebpf: whose sockets are served when they connect, which costs no packet any work: all, node (only those of
    /// the node's own network namespace), or none; true and false mean all and none (default all)
    #[arg(long, value_name = "WHOSE", num_args = 0..=1, default_missing_value = "all", value_parser = sockets)]
    pub ebpf_sockets: Option<Sockets>,
    /// Mode ebpf: folder with network namespaces, or symbolic links to such, whose sockets are not served (default
    /// /run/keelson/socket-exempt, where the node agent puts pods that ask for it)
    #[arg(long, value_name = "PATH")]
    pub ebpf_exempt: Option<PathBuf>,
    /// Mode ebpf: choose an endpoint for clients outside at random (default), or by their address and port
    #[arg(long, value_name = "NAME", value_enum)]
    pub ebpf_algorithm: Option<Algorithm>,
    /// Mode ebpf: endpoints on other nodes answer clients outside by way of this node (snat, default), by themselves
    /// (dsr), or by themselves except for UDP (hybrid); every node must have the same
    #[arg(long, value_name = "HOW", value_enum)]
    pub ebpf_forwarding: Option<Forwarding>,
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
    /// (at least 1024, default 1048576)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1024..))]
    pub ebpf_max_endpoints: Option<u32>,
}

fn sockets(text: &str) -> Result<Sockets, String> {
    match text {
        "all" | "true" => Ok(Sockets::All),
        "node" => Ok(Sockets::Node),
        "none" | "false" => Ok(Sockets::None),
        _ => Err("expected all, node or none".to_owned()),
    }
}

impl EbpfFlags {
    /// What they say, where so many connections may be remembered.
    pub fn config(&self, max_flows: Option<u32>) -> EbpfConfig {
        let default = EbpfConfig::default();
        let max_flows = max_flows.unwrap_or(default.max_flows);
        self.over(EbpfConfig { max_flows, ..default })
    }

    /// What they say, and what they leave as it is.
    pub fn over(&self, config: EbpfConfig) -> EbpfConfig {
        EbpfConfig {
            pins: self.ebpf_pins.clone().unwrap_or(config.pins),
            cgroup: self.ebpf_cgroup.clone().or(config.cgroup),
            sockets: self.ebpf_sockets.unwrap_or(config.sockets),
            exempt: self.ebpf_exempt.clone().unwrap_or(config.exempt),
            service_metrics: self.ebpf_service_metrics.unwrap_or(config.service_metrics),
            max_endpoints: self.ebpf_max_endpoints.unwrap_or(config.max_endpoints),
            algorithm: self.ebpf_algorithm.unwrap_or(config.algorithm),
            forwarding: self.ebpf_forwarding.unwrap_or(config.forwarding),
            xdp: self.ebpf_xdp.unwrap_or(config.xdp),
            xdp_interfaces: match self.ebpf_xdp_interfaces.as_slice() {
                [] => config.xdp_interfaces,
                names => names.to_vec(),
            },
            ..config
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        ebpf: EbpfFlags,
    }

    #[test]
    fn sockets_are_named_or_switched() {
        for (flag, wanted) in [
            ("--ebpf-sockets", Sockets::All),
            ("--ebpf-sockets=true", Sockets::All),
            ("--ebpf-sockets=node", Sockets::Node),
            ("--ebpf-sockets=false", Sockets::None),
        ] {
            let line = Line::try_parse_from(["x", flag]).unwrap();
            assert_eq!(line.ebpf.config(None).sockets, wanted, "{flag}");
        }
        assert!(Line::try_parse_from(["x", "--ebpf-sockets=some"]).is_err());
    }

    #[test]
    fn what_is_not_given_stays() {
        let of_node =
            EbpfConfig { pins: "/a".into(), cgroup: Some("/b".into()), ..EbpfConfig::default() };
        let line = Line::try_parse_from(["x", "--ebpf-pins=/c"]).unwrap();
        assert_eq!(line.ebpf.over(of_node.clone()), EbpfConfig { pins: "/c".into(), ..of_node });
    }
}
