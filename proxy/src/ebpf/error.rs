//! What can go wrong with BPF.

use std::io;
use std::path::PathBuf;

use keelson_netlink::netns::NetnsError;
use keelson_netlink::route::OpenError;
use keelson_netlink::socket::NetlinkError;

use super::config::EbpfConfig;
use super::cookie::CookieError;
use super::sizes::Bounds;

#[derive(Debug, thiserror::Error)]
pub enum EbpfError {
    #[error("no BPF file system at {path}, and it cannot be mounted")]
    Bpffs { path: PathBuf, source: io::Error },
    #[error("cannot use the pinned {path}")]
    Pin { path: PathBuf, source: io::Error },
    #[error("the kernel refuses what is done with the BPF map {name}")]
    Map { name: &'static str, source: io::Error },
    #[error("the BPF map {name} is full: it has room for {max_entries}{}", hint(name))]
    Full { name: &'static str, max_entries: u32 },
    #[error("the kernel refuses the BPF object {object}")]
    Load { object: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the kernel refuses the BPF program {program}")]
    Verify { program: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("cannot attach the BPF program {program} to {target}")]
    Attach { program: &'static str, target: String, source: io::Error },
    #[error("cannot attach BPF programs as filters of interfaces")]
    Filter(#[source] NetlinkError),
    #[error("there is no cgroup2 file system, and none can be mounted at {path}")]
    NoCgroup2 { path: PathBuf, source: io::Error },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot tell the node's network namespace from pods'")]
    Cookie(#[from] CookieError),
    #[error("BPF programs need rights that this process has not: {missing}")]
    Rights { missing: String },
    #[error("the kernel lacks {missing}")]
    Lacks { missing: String },
    #[error("cannot watch interfaces and addresses")]
    Watch(#[source] NetlinkError),
    #[error("cannot read interfaces and addresses")]
    Observe(#[source] NetlinkError),
    #[error("cannot look for connections that netfilter translates")]
    Conntrack(#[source] keelson_netlink::conntrack::ConntrackError),
    #[error("cannot keep netfilter translating the connections that there are")]
    Netfilter(#[source] keelson_netlink::nft::NftError),
    #[error("cannot start the thread {name}")]
    Thread { name: &'static str, source: io::Error },
    #[error("cannot watch the clock and what wakes the proxy")]
    Alarm(#[source] nix::errno::Errno),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// What makes a map larger, where something does.
fn hint(map: &str) -> &'static str {
    match Bounds::of(map, &EbpfConfig::default(), 1) {
        Some(_) => " (see --ebpf-max-endpoints)",
        None => "",
    }
}
