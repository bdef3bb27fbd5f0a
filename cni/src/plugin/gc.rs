//! GC: frees what a runtime that was interrupted has left behind.

use std::collections::HashSet;

use keelson_netlink::route::Rtnl;

use super::system::{open_journal, rtnl};
use super::undo;
use crate::config::Network;
use crate::error::{CniError, code};
use crate::ledger::{Key, Record};
use crate::names::{self, Names};

/// Frees whatever is not listed; goes on after an error and reports the first.
pub(super) fn gc(network: &Network, valid: &[(String, String)]) -> Result<(), CniError> {
    let listed_ones: HashSet<(&str, &str)> =
        valid.iter().map(|(id, ifname)| (id.as_str(), ifname.as_str())).collect();
    let journal = open_journal(network)?;
    let listed =
        |key: &Key| listed_ones.contains(&(key.container_id.as_str(), key.ifname.as_str()));
    let stale: Vec<Record> =
        journal.ledger().records().filter(|r| !listed(&r.key)).cloned().collect();
    drop(journal);
    let mut node = rtnl()?;
    let mut first = Ok(());
    for record in stale {
        first = first.and(undo(network, &mut node, &record));
    }
    first.and(sweep(network, &mut node, valid))
}

/// Removes links of the network that belong to none of the `valid` attachments: their record was lost.
fn sweep(network: &Network, node: &mut Rtnl, valid: &[(String, String)]) -> Result<(), CniError> {
    let hosts: HashSet<String> = valid
        .iter()
        .map(|(id, ifname)| Key { container_id: id.clone(), ifname: ifname.clone() })
        .map(|key| Names::of(&network.name, &key).host)
        .collect();
    let prefix = names::alias_prefix(&network.name);
    let links = node
        .links()
        .map_err(|e| CniError::new(code::NETWORK, "cannot list the node's links").caused_by(&e))?;
    for link in links {
        let ours = link.alias.as_ref().is_some_and(|alias| alias.starts_with(&prefix));
        if ours && !hosts.contains(&link.name) {
            node.delete_link(link.index).map_err(|e| {
                CniError::new(code::NETWORK, format!("cannot delete {}", link.name)).caused_by(&e)
            })?;
        }
    }
    Ok(())
}
