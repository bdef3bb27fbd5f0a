//! The part of ADD that is done under the lock: an address of each family, the node's ports, and the record of both.

use std::collections::HashSet;
use std::net::IpAddr;

use keelson_netlink::conntrack::{Conntrack, ConntrackError, Flow};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::Rtnl;

use super::system::{boot_id, journal_error, kernel, nft, open_journal, packet_filter, port_error};
use super::{edge, unmake};
use crate::config::{Config, Network};
use crate::error::{CniError, code};
use crate::firewall;
use crate::hostport::{HostPort, Transport};
use crate::journal::Journal;
use crate::ledger::{Entry, Key, Record};
use crate::names::Names;
use crate::source_guard;
use crate::wire;

/// Takes addresses and ports, brings that to the disk before anything is made, and opens the ports. Under the lock as a
/// whole, so that two ADDs do not both make the table, each with the ports that it knows of.
pub(super) fn reserve(
    network: &Network,
    config: &Config,
    key: &Key,
    names: &Names,
    pod: &Netns,
    node: &mut Rtnl,
) -> Result<Record, CniError> {
    let mut journal = open_journal(network)?;
    let boot = boot_id()?;
    let stale = journal.ledger().stale(&boot).into_iter().map(Entry::Free).collect();
    journal.append(stale).map_err(journal_error)?;
    match journal.ledger().get(key).cloned() {
        Some(_) if wire::is_attached(node, names).map_err(kernel)? => {
            let text = format!(
                "{} of container {} is in network {} already",
                key.ifname, key.container_id, network.name
            );
            return Err(CniError::new(code::EXISTS, text));
        }
        // An ADD that was killed: begin anew.
        Some(old) => {
            unmake(network, node, &old)?;
            journal.append(vec![Entry::Free(old.key)]).map_err(journal_error)?;
        }
        // A DEL that has not let go of the link yet.
        None => drop(wire::detach(node, names).map_err(kernel)?),
    }
    if let Some((port, owner)) = journal.ledger().port_clash(key, &config.host_ports) {
        let text = format!("port {port} of the node is taken by container {}", owner.container_id);
        return Err(CniError::new(code::NETWORK, text)
            .with_details("choose another hostPort, or end the pod that has it"));
    }
    let record = Record {
        key: key.clone(),
        ips: choose(network, config, &mut journal, node)?,
        host: names.host.clone(),
        netns: pod.path().to_owned(),
        inode: pod
            .identity()
            .map_err(|e| CniError::new(code::IO, "the pod's network namespace").caused_by(&e))?,
        boot,
        ports: config.host_ports.clone(),
    };
    journal.append(vec![Entry::Take(record.clone())]).map_err(journal_error)?;
    if let Err(error) = open_edge(network, config, &journal, &record) {
        journal.append(vec![Entry::Free(record.key)]).map_err(journal_error)?;
        return Err(error);
    }
    journal.unlock_and_sync().map_err(journal_error)?;
    Ok(record)
}

/// An address of each family. When none is left, those of pods that vanished without a DEL are given back first.
fn choose(
    network: &Network,
    config: &Config,
    journal: &mut Journal,
    node: &mut Rtnl,
) -> Result<Vec<IpAddr>, CniError> {
    let pick = |journal: &Journal, node: &mut Rtnl| {
        let mut failed = None;
        let unusable = |ip| {
            wire::in_use(node, ip).unwrap_or_else(|error| {
                failed = Some(error);
                false
            })
        };
        let found = journal.ledger().choose(&config.pod_cidrs, &config.exclude, unusable);
        // An address that the kernel says nothing of is not given.
        failed.map_or(Ok(found), |error| Err(kernel(error)))
    };
    if let Ok(ips) = pick(journal, node)? {
        return Ok(ips);
    }
    let records: Vec<Record> = journal.ledger().records().cloned().collect();
    for record in records {
        if is_gone(&record, node)? {
            unmake(network, node, &record)?;
            journal.append(vec![Entry::Free(record.key)]).map_err(journal_error)?;
        }
    }
    pick(journal, node)?.map_err(|e| {
        CniError::new(code::TRY_AGAIN, format!("network {}: {e}", network.name))
            .with_details("end pods on this node, or give it a larger range in podCIDRs")
    })
}

/// Whether the namespace that an attachment is in has ended, and its link with it.
fn is_gone(record: &Record, node: &mut Rtnl) -> Result<bool, CniError> {
    let identity = Netns::open(&record.netns).and_then(|netns| netns.identity());
    if identity.is_ok_and(|identity| identity == record.inode) {
        return Ok(false);
    }
    let link = node.link(record.host.as_str()).map_err(|e| {
        CniError::new(code::NETWORK, format!("cannot look at {}", record.host)).caused_by(&e)
    })?;
    Ok(link.is_none())
}

/// Makes the guard of sources and the network's table if they are not there, and opens the ports of `record`.
fn open_edge(
    network: &Network,
    config: &Config,
    journal: &Journal,
    record: &Record,
) -> Result<(), CniError> {
    let mut nft = nft()?;
    source_guard::ensure(&mut nft).map_err(packet_filter)?;
    let records = journal.ledger().records();
    let all: Vec<_> = records.flat_map(|r| firewall::forwards(&r.ports, &r.ips)).collect();
    if !config.masquerade && all.is_empty() {
        return Ok(());
    }
    // A table that had to be made has all ports in it, also ours.
    let made = edge(network, config).ensure(&mut nft, || all).map_err(packet_filter)?;
    let own = firewall::forwards(&record.ports, &record.ips);
    if !made && !own.is_empty() {
        firewall::open_ports(&mut nft, &network.name, &own).map_err(port_error)?;
    }
    forget_flows(&record.ports)
}

/// UDP clients that keep their port keep their translation, too: to the pod that had the node's port before.
pub(super) fn forget_flows(ports: &[HostPort]) -> Result<(), CniError> {
    let udp: HashSet<u16> =
        ports.iter().filter(|p| p.protocol == Transport::Udp).map(|port| port.host).collect();
    if udp.is_empty() {
        return Ok(());
    }
    let failed = |e: ConntrackError| {
        CniError::new(code::NETWORK, "cannot end old flows to the pod's ports").caused_by(&e)
    };
    let mut conntrack = Conntrack::open().map_err(failed)?;
    let wanted = |flow: &Flow| {
        flow.protocol == Transport::Udp.number() && udp.contains(&flow.destination.port())
    };
    // A walk that was cut short is repeated, but not for ever: the pod waits.
    for _ in 0..3 {
        let found = conntrack.select(0, wanted).map_err(failed)?;
        for flow in &found.flows {
            conntrack.delete(flow).map_err(failed)?;
        }
        if found.whole {
            break;
        }
    }
    Ok(())
}
