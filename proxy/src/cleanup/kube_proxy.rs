//! kube-proxy's leftovers, in all of its modes.

use std::process::Command;

use keelson_netlink::nft::{Batch, Family, Nft, NftError, Table};
use keelson_netlink::route::Rtnl;

use super::CleanupError;
use crate::iptables::{Leftovers, Variant, count_leftovers, remove_leftovers};
use crate::ipvs::KUBE_PROXYS_LINK as IPVS_INTERFACE;
use crate::switch::with_sources;

/// kube-proxy's chains with fixed names, in the tables nat, filter and mangle. The kubelet's
/// (KUBE-FIREWALL, KUBE-MARK-DROP, KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT) are not among them.
const CHAINS: [&str; 17] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    // Its IPVS mode:
    "KUBE-LOAD-BALANCER",
    "KUBE-NODE-PORT",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    // Older versions:
    "KUBE-PORTALS-CONTAINER",
    "KUBE-PORTALS-HOST",
    "KUBE-NODEPORT-CONTAINER",
    "KUBE-NODEPORT-HOST",
];

/// kube-proxy's chains for one Service or endpoint.
const PREFIXES: [&str; 6] =
    ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-XLB-", "KUBE-EXT-"];

/// Whether a chain was made by kube-proxy.
fn is_its_chain(name: &str) -> bool {
    CHAINS.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Removes what kube-proxy left in the calling thread's network namespace.
pub fn clean() -> Result<(), CleanupError> {
    let mut failures = Vec::new();
    for variant in Variant::BOTH {
        match remove_leftovers(variant, &Leftovers { is_chain: is_its_chain }) {
            Ok(0) => {}
            Ok(chains) => {
                tracing::info!(variant = variant.word(), chains, "Removed kube-proxy's chains")
            }
            Err(error) => failures.push(format!(
                "kube-proxy's chains (iptables-{}): {}",
                variant.word(),
                with_sources(&error)
            )),
        }
    }
    if let Err(error) = tables() {
        failures.push(format!("kube-proxy's nftables tables: {}", with_sources(&error)));
    }
    match crate::ipvs::remove_kube_proxys() {
        Ok(0) => {}
        Ok(servers) => tracing::info!(servers, "Removed kube-proxy's virtual servers"),
        Err(error) => {
            failures.push(format!("kube-proxy's virtual servers: {}", with_sources(&error)))
        }
    }
    if let Err(error) = interface() {
        failures.push(format!("interface {IPVS_INTERFACE}: {}", with_sources(&error)));
    }
    ip_sets();
    if failures.is_empty() { Ok(()) } else { Err(CleanupError(failures.join("; "))) }
}

/// What of kube-proxy's is there: as long as it is, both may answer for a Service.
#[must_use]
pub fn traces() -> Vec<String> {
    let mut traces = Vec::new();
    for variant in Variant::BOTH {
        match count_leftovers(variant, &Leftovers { is_chain: is_its_chain }) {
            Ok(0) => {}
            Ok(chains) => traces.push(format!("{chains} chains (iptables-{})", variant.word())),
            Err(error) => tracing::debug!(%error, "Cannot look for kube-proxy's chains"),
        }
    }
    let there = |table: &Table<'_>| {
        Nft::open().and_then(|mut nft| nft.table(*table)).is_ok_and(|found| found.is_some())
    };
    if TABLES.iter().any(there) {
        traces.push("nftables table kube-proxy".to_owned());
    }
    if Rtnl::open().and_then(|mut rtnl| rtnl.link(IPVS_INTERFACE)).is_ok_and(|link| link.is_some())
    {
        traces.push(format!("interface {IPVS_INTERFACE}"));
    }
    traces
}

const TABLES: [Table<'static>; 2] = [
    Table { family: Family::Ipv4, name: "kube-proxy" },
    Table { family: Family::Ipv6, name: "kube-proxy" },
];

fn tables() -> Result<(), NftError> {
    let mut nft = Nft::open()?;
    let mut batch = Batch::new();
    for table in TABLES {
        // Deleting what may not be there: make it first, in the same transaction.
        batch.add_table(table);
        batch.delete_table(table);
    }
    nft.commit(batch)
}

fn interface() -> Result<(), keelson_netlink::socket::NetlinkError> {
    if Rtnl::open()?.delete_link(IPVS_INTERFACE)? {
        tracing::info!(interface = IPVS_INTERFACE, "Removed kube-proxy's interface");
    }
    Ok(())
}

/// Its IPVS mode's sets. Only a node that had that mode has the program.
fn ip_sets() {
    let Ok(listed) = Command::new("ipset").args(["list", "-name"]).output() else { return };
    let names = String::from_utf8_lossy(&listed.stdout).into_owned();
    // KUBE-6- are those for IPv6.
    for name in names.lines().filter(|name| name.starts_with("KUBE-")) {
        match Command::new("ipset").args(["destroy", name]).output() {
            Ok(output) if output.status.success() => {
                tracing::info!(set = name, "Removed kube-proxy's IP set");
            }
            Ok(output) => {
                let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                tracing::warn!(set = name, error, "Cannot remove kube-proxy's IP set");
            }
            Err(error) => tracing::warn!(set = name, %error, "Cannot remove kube-proxy's IP set"),
        }
    }
}
