//! The network that an isolated node lives in: a namespace with one cable to a second one, the world outside.
//!
//! ```text
//!   netns <name>                      netns <name>-outside
//!   pods, Services, node 198.18.0.2 ── eth0 ═══ node ── 198.18.0.1
//! ```
//! Neither has a way to the machine's own network. The addresses are from the blocks set aside for tests
//! (RFC 2544, and an ULA), and exist in these two namespaces only.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use keelson_netlink::netns::Netns;
use keelson_netlink::nft::{Batch, Nft, Table};
use keelson_netlink::route::{Route, Rtnl, VethEnd, VethPair};
use keelson_netlink::sysctl;
use nix::mount::{MsFlags, mount};

use super::layout::Layout;

/// The node's addresses on its cable.
pub(crate) const NODE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 18, 0, 2)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x198, 0x18, 0, 0, 0, 0, 2)),
];

/// The other end's.
const OUTSIDE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x198, 0x18, 0, 0, 0, 0, 1)),
];

/// The cable's name in the node and outside.
const NODE_LINK: &str = "eth0";
const OUTSIDE_LINK: &str = "node";

/// Makes both namespaces and the cable, or completes what an earlier start left unfinished.
///
/// # Errors
/// The step that the kernel refused.
pub(crate) fn ensure(layout: &Layout) -> Result<()> {
    let node = ensure_netns(&layout.netns())?;
    let outside = ensure_netns(&layout.outside_netns())?;
    let mut here = Rtnl::open_in(&node)?;
    let mut there = Rtnl::open_in(&outside)?;
    here.set_up("lo").context("cannot set up the node's loopback")?;
    there.set_up("lo").context("cannot set up the outside's loopback")?;
    if here.link(NODE_LINK)?.is_none() {
        let pair = VethPair {
            near: VethEnd { name: NODE_LINK, mac: None, netns: None },
            far: VethEnd { name: OUTSIDE_LINK, mac: None, netns: Some(outside.as_fd()) },
            mtu: None,
        };
        here.create_veth(&pair).context("cannot make the node's cable")?;
    }
    configure(&mut here, NODE_LINK, NODE, Some(OUTSIDE))
        .context("cannot configure the node's end of its cable")?;
    configure(&mut there, OUTSIDE_LINK, OUTSIDE, None)
        .context("cannot configure the outer end of the node's cable")?;
    // Pods are behind the node. The plugin sets these, too; a NodePort must not wait for the first pod.
    node.run(|| {
        sysctl::ensure("net/ipv4/ip_forward", "1")
            .and_then(|_| sysctl::ensure("net/ipv6/conf/all/forwarding", "1"))
    })??;
    Ok(())
}

fn ensure_netns(path: &Path) -> Result<Netns> {
    if let Ok(netns) = Netns::open(path) {
        return Ok(netns);
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        share(folder).with_context(|| format!("cannot mount {}", folder.display()))?;
    }
    // A file without a namespace mounted on it is what a crash or a reboot leaves.
    keelson_netlink::netns::delete(path)?;
    Ok(Netns::create(path)?)
}

/// Makes the folder of network namespaces a shared mount, as `ip netns add` does when it is first used. Done later by
/// `ip netns`, that would hide the pins which are there already, and nothing could unmount them.
fn share(folder: &Path) -> io::Result<()> {
    let none: Option<&str> = None;
    let shared = || mount(none, folder, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    if shared().is_ok() {
        return Ok(());
    }
    // It was no mount point yet.
    mount(Some(folder), folder, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    Ok(shared()?)
}

fn configure(
    rtnl: &mut Rtnl,
    name: &str,
    addresses: [IpAddr; 2],
    gateways: Option<[IpAddr; 2]>,
) -> Result<()> {
    rtnl.set_up(name)?;
    let link = rtnl.link(name)?.with_context(|| format!("there is no link {name}"))?.index;
    for address in addresses {
        let prefix = if address.is_ipv4() { 24 } else { 64 };
        rtnl.ensure_address(link, IpNetwork::new(address, prefix)?)?;
    }
    for gateway in gateways.into_iter().flatten() {
        rtnl.ensure_route(&Route::default_via(gateway, link))?;
    }
    Ok(())
}

/// Removes our tables from the current network namespace: what a node on the machine's own network leaves there. Links
/// and routes of pods go with the pods' namespaces.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn remove_tables() -> Result<()> {
    let mut nft = Nft::open()?;
    for name in ["keelson-proxy", "keelson-proxy-ebpf", "keelson-cni-keelson", "keelson-cni"] {
        let table = Table::inet(name);
        let mut batch = Batch::new();
        // Deleting what may not be there: make it first, in the same transaction.
        batch.add_table(table);
        batch.delete_table(table);
        nft.commit(batch).with_context(|| format!("cannot remove the table {name}"))?;
    }
    Ok(())
}
