//! The seam between the model and the kernel: what a backend is, and the only place that knows how
//! many there are. A new one is a value of [`Mode`], its arms here, and a variant of [`BackendError`].

mod counting;
mod figures;

use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::diff::{Change, Plans};
use crate::ebpf::{Ebpf, EbpfConfig, EbpfError};
use crate::iptables::{Iptables, IptablesError, Variant};
use crate::ipvs::{Ipvs, IpvsConfig, IpvsError};
use crate::model::{ServiceKey, ServicePlan};
use crate::nftables::{Nftables, NftablesError};
pub use counting::{Counted, Counting, Names, PortTraffic, Traffic};
pub use figures::{FamilyFigures, Figures, MapFill, TableRules};

/// A kernel interface that Services can be programmed into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    Nftables,
    Iptables(Variant),
    Ipvs,
    Ebpf,
}

impl Mode {
    pub const ALL: [Mode; 5] = [
        Mode::Nftables,
        Mode::Iptables(Variant::Nft),
        Mode::Iptables(Variant::Legacy),
        Mode::Ipvs,
        Mode::Ebpf,
    ];
    /// What `auto` takes, in order of preference.
    pub const AUTO: [Mode; 5] = [
        Mode::Ebpf,
        Mode::Nftables,
        Mode::Iptables(Variant::Nft),
        Mode::Iptables(Variant::Legacy),
        Mode::Ipvs,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Mode::Nftables => "nftables",
            Mode::Iptables(Variant::Nft) => "iptables-nft",
            Mode::Iptables(Variant::Legacy) => "iptables-legacy",
            Mode::Ipvs => "ipvs",
            Mode::Ebpf => "ebpf",
        }
    }

    /// The name that kube-proxy has for it, on /proxyMode.
    #[must_use]
    pub fn kube_name(self) -> &'static str {
        match self {
            Mode::Iptables(_) => "iptables",
            Mode::Nftables => "nftables",
            Mode::Ipvs => "ipvs",
            Mode::Ebpf => "ebpf",
        }
    }

    /// What a value of `--proxy-mode` means, in order of preference; nothing when it is not a mode.
    #[must_use]
    pub fn candidates(text: &str) -> Option<&'static [Mode]> {
        match text {
            "" | "auto" => Some(&Mode::AUTO),
            "nftables" => Some(&[Mode::Nftables]),
            // Which of the two the node uses is found out when it starts.
            "iptables" => Some(&[Mode::Iptables(Variant::Nft), Mode::Iptables(Variant::Legacy)]),
            "iptables-nft" => Some(&[Mode::Iptables(Variant::Nft)]),
            "ipvs" => Some(&[Mode::Ipvs]),
            "ebpf" => Some(&[Mode::Ebpf]),
            "iptables-legacy" => Some(&[Mode::Iptables(Variant::Legacy)]),
            _ => None,
        }
    }

    /// Whether this kernel (in the calling thread's network namespace) and this machine can do it.
    /// The error says what is missing. Leaves nothing behind.
    pub fn probe(self) -> Result<(), BackendError> {
        match self {
            Mode::Nftables => Ok(Nftables::probe()?),
            Mode::Iptables(variant) => Ok(Iptables::probe(variant)?),
            Mode::Ipvs => Ok(Ipvs::probe()?),
            Mode::Ebpf => Ok(Ebpf::probe()?),
        }
    }

    /// What it would not do on this node although [`Mode::probe`] says that it works, one sentence each. Leaves nothing
    /// behind.
    #[must_use]
    pub fn gaps(self, ebpf: &EbpfConfig) -> Vec<String> {
        match self {
            Mode::Ebpf => Ebpf::gaps(ebpf),
            Mode::Nftables | Mode::Iptables(_) | Mode::Ipvs => Vec::new(),
        }
    }

    /// Opens the backend in the network namespace of the calling thread. Changes nothing yet.
    pub fn open(self, config: BackendConfig) -> Result<Box<dyn Backend>, BackendError> {
        Ok(match self {
            Mode::Nftables => Box::new(Nftables::open(config)?),
            Mode::Iptables(variant) => Box::new(Iptables::open(variant, config)?),
            Mode::Ipvs => Box::new(Ipvs::open(config)?),
            Mode::Ebpf => Box::new(Ebpf::open(config)?),
        })
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Programs plans into one kernel interface. Knows no Service semantics: those live in `model`.
///
/// Lives in the network namespace in which it was opened, also when it is called from a thread
/// elsewhere. Calls block and belong on a thread of their own.
pub trait Backend: Send {
    /// Reads what the kernel has and makes it equal to `plans`, touching only what differs.
    ///
    /// This is the start, the repair after a crash, and the answer to foreign changes.
    fn adopt(&mut self, plans: &Plans) -> Result<Applied, BackendError>;

    /// Puts changes in force, each Service's change at one moment. `plans` is everything that is to be
    /// in force, changes included: for the case that the kernel turns out to be in another state.
    fn apply(&mut self, changes: &[Change], plans: &Plans) -> Result<Applied, BackendError>;

    /// Changes the configuration; the next [`Backend::adopt`] puts it in force. False when it is the
    /// same as before.
    fn configure(&mut self, config: BackendConfig) -> bool;

    /// Reads what the kernel has and tells how it differs from `plans`. Changes nothing.
    fn verify(&mut self, plans: &Plans) -> Result<Vec<Difference>, BackendError>;

    /// Readable when somebody changed the kernel's tables.
    fn alarm(&self) -> BorrowedFd<'_>;

    /// Reads the alarm: true when what we programmed may have been changed by others.
    fn disturbed(&mut self) -> Result<bool, BackendError>;

    /// What was counted since the last call.
    fn take_figures(&mut self) -> Figures {
        Figures::default()
    }

    /// Parts of the node itself that the kernel refuses since the last call, each named once, in words. All else is in
    /// force, and they are tried again.
    fn take_troubles(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// What the kernel side counts of Services, where it does.
    fn counting(&self) -> Option<Arc<dyn Counting>> {
        None
    }

    /// What the kernel has for that plan which the plan does not tell, in lines for people.
    fn details(&mut self, _plan: &ServicePlan) -> Result<Vec<String>, BackendError> {
        Ok(Vec::new())
    }

    /// Removes everything that the backend ever made, also by an earlier process.
    fn cleanup(&mut self) -> Result<(), BackendError>;
}

/// What a backend needs to know about the node beside the plans.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendConfig {
    /// How pods are told from other sources: for [`crate::model::Masquerade::UnlessPod`] and
    /// [`crate::model::Route::BySource`].
    pub pods: PodSources,
    /// Node ports answer on the node's addresses in these ranges, in a family without any on all.
    pub node_port_ranges: Vec<IpNetwork>,
    /// Node ports answer on 127.0.0.1, too (and on ::1 where the kernel lets them).
    pub localhost_node_ports: bool,
    /// The ranges that ClusterIPs come from: packets for an address there that no Service has are
    /// dropped, since they would go round in circles otherwise. Nothing is dropped when empty.
    pub service_ranges: Vec<IpNetwork>,
    /// Bit of the packet mark that asks for masquerading.
    pub masquerade_bit: u8,
    /// What only the IPVS mode needs.
    #[serde(default)]
    pub ipvs: IpvsConfig,
    /// What only the eBPF mode needs.
    #[serde(default)]
    pub ebpf: EbpfConfig,
}

/// How pods are told from other sources of packets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodSources {
    /// They are not.
    #[default]
    Unknown,
    /// Their addresses are in these ranges.
    Ranges(Vec<IpNetwork>),
    /// Their packets come in through this bridge.
    Bridge(String),
    /// Their packets come in through an interface whose name starts like this.
    InterfacePrefix(String),
}

impl PodSources {
    /// The ranges, where pods are known by ranges.
    #[must_use]
    pub fn ranges(&self) -> &[IpNetwork] {
        match self {
            PodSources::Ranges(ranges) => ranges,
            PodSources::Unknown | PodSources::Bridge(_) | PodSources::InterfacePrefix(_) => &[],
        }
    }
}

impl Default for BackendConfig {
    fn default() -> Self {
        BackendConfig {
            pods: PodSources::default(),
            node_port_ranges: Vec::new(),
            localhost_node_ports: true,
            service_ranges: Vec::new(),
            masquerade_bit: 14,
            ipvs: IpvsConfig::default(),
            ebpf: EbpfConfig::default(),
        }
    }
}

impl BackendConfig {
    /// Whether node ports answer on an address of the node, as far as `node_port_ranges` decide that.
    #[must_use]
    pub fn wants_node_ports_on(&self, address: IpAddr) -> bool {
        let of_family = |range: &&IpNetwork| range.is_ipv4() == address.is_ipv4();
        let mut ranges = self.node_port_ranges.iter().filter(of_family).peekable();
        ranges.peek().is_none() || ranges.any(|range| range.contains(address))
    }

    /// The bit of packet and connection marks that tells what IPVS works on, as a number.
    #[must_use]
    pub fn ipvs_mark(&self) -> u32 {
        // Not 15: old kubelets drop what has that one.
        if self.masquerade_bit == 13 { 1 << 12 } else { 1 << 13 }
    }

    /// The bit of the packet mark that asks for masquerading, as a number.
    #[must_use]
    pub fn mark(&self) -> u32 {
        1u32.checked_shl(self.masquerade_bit.into()).unwrap_or(1 << 14)
    }
}

/// What a call to a backend did.
#[derive(Debug, Default)]
pub struct Applied {
    /// Kernel objects added or removed.
    pub operations: usize,
    /// Services that the kernel refused; everything else is in force.
    pub refused: Vec<(ServiceKey, BackendError)>,
}

/// Something in the kernel that is not as planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The Service that it concerns; nothing for what all share, and for leftovers.
    pub service: Option<ServiceKey>,
    /// What is missing, or there in vain, in the words of the kernel interface.
    pub what: String,
}

/// An error of a backend.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error(transparent)]
    Nftables(#[from] NftablesError),
    #[error(transparent)]
    Iptables(#[from] IptablesError),
    #[error(transparent)]
    Ipvs(#[from] IpvsError),
    #[error(transparent)]
    Ebpf(#[from] EbpfError),
}
