//! `keelson up` and `keelson down`: a whole node with its own control plane.

use std::path::PathBuf;

use clap::Args;
use ipnetwork::IpNetwork;
use keelson_proxy::backend::Mode;
use keelson_proxy::flags::EbpfFlags;

use super::image_gc::ImageGcArgs;
use crate::up::{self, Layout, UpConfig};

/// Run a whole node with an embedded control plane.
///
/// Any kubectl works against it; where its kubeconfig is, is printed. Pods keep running when this process ends, and the
/// next `keelson up` takes them over; `keelson down` stops and removes everything.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// The node's name on this machine: its folders, namespaces and cgroups are called so
    #[arg(long, default_value = "keelson", value_parser = valid_name)]
    name: String,
    /// Run on the machine's own network instead of a network namespace of its own
    #[arg(long)]
    host_network: bool,
    /// Port of the Kubernetes API, on the machine's loopback and on the node's address
    #[arg(long, default_value_t = 6443, value_name = "PORT")]
    api_port: u16,
    /// Name of the Node object [default: the machine's host name]
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Pod addresses: one network per family
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "10.244.0.0/24,fd00:10:244::/64",
        value_name = "CIDRS"
    )]
    pod_cidrs: Vec<IpNetwork>,
    /// Service addresses: one network per family
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "10.96.0.0/16,fd00:10:96::/112",
        value_name = "CIDRS"
    )]
    service_cidrs: Vec<IpNetwork>,
    /// Use the containerd that answers here instead of starting one
    #[arg(long, value_name = "SOCKET")]
    containerd: Option<PathBuf>,
    /// Only the control plane, containerd and the network: agent and proxy are run by somebody else
    #[arg(long, hide = true)]
    control_plane_only: bool,
    /// How Services are programmed: ebpf, nftables, iptables, ipvs, or auto for the first that does everything here
    #[arg(long, default_value = "auto", value_name = "MODE", value_parser = valid_mode)]
    proxy_mode: String,
    #[command(flatten)]
    ebpf: EbpfFlags,
    /// Runtime classes, separated by commas, whose pods' sockets are never served, as with the annotation
    /// keelson.io/socket-lb: disabled (virtual machines)
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    socket_exempt_runtime_classes: Vec<String>,
    #[command(flatten)]
    image_gc: ImageGcArgs,
    /// How much to log: 0 to 4 (info to trace of everything)
    #[arg(short = 'v', long = "v", default_value_t = 0, value_name = "LEVEL")]
    verbosity: u8,
}

impl UpArgs {
    /// How much to log.
    pub fn verbosity(&self) -> u8 {
        self.verbosity
    }

    /// Runs the node until it is told to stop.
    ///
    /// # Errors
    /// When the machine lacks something that a node needs; the error says what to do about it.
    pub fn run(self) -> anyhow::Result<()> {
        let mut image_gc = up::image_gc();
        self.image_gc.apply(&mut image_gc)?;
        up::run(UpConfig {
            image_gc,
            layout: Layout::named(&self.name),
            host_network: self.host_network,
            api_port: self.api_port,
            node_name: self.node_name,
            pod_cidrs: self.pod_cidrs,
            service_cidrs: self.service_cidrs,
            containerd: self.containerd,
            control_plane_only: self.control_plane_only,
            proxy_modes: Mode::candidates(&self.proxy_mode).unwrap_or_default(),
            ebpf: self.ebpf,
            socket_exempt_runtime_classes: self.socket_exempt_runtime_classes,
        })
    }
}

/// Stop a node of `keelson up` and remove everything that it made.
#[derive(Debug, Args)]
pub struct DownArgs {
    /// The node's name on this machine
    #[arg(long, default_value = "keelson", value_parser = valid_name)]
    name: String,
}

impl DownArgs {
    /// Removes the node.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn run(self) -> anyhow::Result<()> {
        up::down(&Layout::named(&self.name))
    }
}

fn valid_mode(text: &str) -> Result<String, String> {
    let known = Mode::candidates(text).map(|_| text.to_owned());
    known.ok_or_else(|| "expected auto, ebpf, nftables, iptables or ipvs".to_owned())
}

/// Also a name of folders, namespaces and cgroups: nothing in it may lead elsewhere.
fn valid_name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let starts_well = text.starts_with(|c: char| c.is_ascii_lowercase());
    if starts_well && text.len() <= 32 && text.chars().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err("expected a lower-case letter, then letters, digits and '-', at most 32 in all"
            .to_owned())
    }
}
