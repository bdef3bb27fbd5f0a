//! Who holds which address: the pure part of address management.
//!
//! The ledger is what the journal's entries add up to. Addresses are taken in turn, and one that was given back is the
//! last to be taken again: peers may still remember connections or hardware addresses of its former owner.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::path::PathBuf;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::hostport::HostPort;

/// How many returned addresses are remembered in order; older ones count as never used.
const FREED_REMEMBERED: usize = 4096;

/// What names an attachment within its network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The sandbox.
    #[serde(rename = "cid")]
    pub container_id: String,
    /// The interface in it.
    #[serde(rename = "if")]
    pub ifname: String,
}

/// All that is needed to undo an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Whose it is.
    #[serde(flatten)]
    pub key: Key,
    /// The addresses taken.
    pub ips: Vec<IpAddr>,
    /// The host side of the veth pair.
    pub host: String,
    /// Where the namespace was.
    pub netns: PathBuf,
    /// Device and inode of the namespace, by which a later one at the same path is told apart.
    pub inode: (u64, u64),
    /// The boot in which this was made: no attachment survives a reboot.
    pub boot: String,
    /// Ports of the node that lead here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<HostPort>,
}

/// One line of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Entry {
    /// Addresses are taken. Written before anything is made.
    Take(Record),
    /// Addresses are given back. Written after everything is undone.
    Free(Key),
    /// In a shortened journal: the most recently taken addresses, and those given back, oldest first.
    Past {
        /// The last one taken of each family.
        last: Vec<IpAddr>,
        /// Given back.
        freed: Vec<IpAddr>,
    },
}

/// Every address of a family is taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no free address is left in {}", listed(.cidrs))]
pub struct Exhausted {
    /// The ranges that were looked through.
    pub cidrs: Vec<IpNetwork>,
}

fn listed(cidrs: &[IpNetwork]) -> String {
    cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Attachments and the order in which addresses were used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    records: BTreeMap<Key, Record>,
    freed: VecDeque<IpAddr>,
    last_v4: Option<IpAddr>,
    last_v6: Option<IpAddr>,
}

impl Ledger {
    /// Takes an entry into account.
    pub fn apply(&mut self, entry: Entry) {
        match entry {
            Entry::Take(record) => {
                for ip in &record.ips {
                    self.freed.retain(|freed| freed != ip);
                    self.note_last(*ip);
                }
                self.records.insert(record.key.clone(), record);
            }
            Entry::Free(key) => {
                if let Some(record) = self.records.remove(&key) {
                    self.freed.extend(record.ips);
                }
                while self.freed.len() > FREED_REMEMBERED {
                    self.freed.pop_front();
                }
            }
            Entry::Past { last, freed } => {
                last.into_iter().for_each(|ip| self.note_last(ip));
                self.freed.extend(freed);
            }
        }
    }

    /// The shortest list of entries that adds up to the same.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries: Vec<_> = self.records.values().cloned().map(Entry::Take).collect();
        // Last, because taking an address moves the marks.
        entries.push(Entry::Past {
            last: self.last_v4.into_iter().chain(self.last_v6).collect(),
            freed: self.freed.iter().copied().collect(),
        });
        entries
    }

    /// The record of an attachment.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<&Record> {
        self.records.get(key)
    }

    /// All records.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// The records of earlier boots, whose attachments cannot exist any more.
    #[must_use]
    pub fn stale(&self, boot: &str) -> Vec<Key> {
        let stale = |record: &&Record| record.boot != boot;
        self.records.values().filter(stale).map(|record| record.key.clone()).collect()
    }

    /// The first of `ports` that another attachment of this boot holds, or that is listed twice, and whose it is.
    #[must_use]
    pub fn port_clash<'a>(
        &'a self,
        key: &'a Key,
        ports: &'a [HostPort],
    ) -> Option<(&'a HostPort, &'a Key)> {
        let others = self.records.values().filter(|record| record.key != *key);
        let held = others.flat_map(|record| record.ports.iter().map(move |p| (p, &record.key)));
        let held: Vec<_> = held.collect();
        ports.iter().enumerate().find_map(|(position, port)| {
            let own = ports[..position].iter().map(|other| (other, key));
            let mut taken = held.iter().copied().chain(own);
            taken.find(|(other, _)| port.clashes(other)).map(|(_, owner)| (port, owner))
        })
    }

    /// Picks one address of each family that `cidrs` has. `unusable` is asked about each candidate before it is taken.
    ///
    /// # Errors
    /// When a family has nothing left.
    pub fn choose(
        &self,
        cidrs: &[IpNetwork],
        exclude: &[IpNetwork],
        mut unusable: impl FnMut(IpAddr) -> bool,
    ) -> Result<Vec<IpAddr>, Exhausted> {
        let used: HashSet<IpAddr> =
            self.records.values().flat_map(|record| record.ips.iter().copied()).collect();
        let mut chosen = Vec::new();
        for v4 in [true, false] {
            let cidrs: Vec<_> = cidrs.iter().filter(|cidr| cidr.is_ipv4() == v4).copied().collect();
            if !cidrs.is_empty() {
                let ip = self.choose_one(&cidrs, exclude, &used, &mut unusable);
                chosen.push(ip.ok_or(Exhausted { cidrs })?);
            }
        }
        Ok(chosen)
    }

    fn choose_one(
        &self,
        cidrs: &[IpNetwork],
        exclude: &[IpNetwork],
        used: &HashSet<IpAddr>,
        unusable: &mut impl FnMut(IpAddr) -> bool,
    ) -> Option<IpAddr> {
        let recent: HashSet<IpAddr> = self.freed.iter().copied().collect();
        for cidr in cidrs {
            let last = if cidr.is_ipv4() { self.last_v4 } else { self.last_v6 };
            let taken = |ip: IpAddr| used.contains(&ip) || recent.contains(&ip);
            let found = in_turn(*cidr, last, exclude, |ip| !taken(ip) && !unusable(ip));
            if found.is_some() {
                return found;
            }
        }
        let allowed = |ip: &IpAddr| {
            cidrs.iter().any(|cidr| range(*cidr).contains(number(*ip)) && cidr.contains(*ip))
                && !exclude.iter().any(|network| network.contains(*ip))
        };
        self.freed.iter().copied().find(|ip| allowed(ip) && !used.contains(ip) && !unusable(*ip))
    }

    fn note_last(&mut self, ip: IpAddr) {
        match ip {
            IpAddr::V4(_) => self.last_v4 = Some(ip),
            IpAddr::V6(_) => self.last_v6 = Some(ip),
        }
    }
}

/// First and last usable address of a range as numbers.
#[derive(Debug, Clone, Copy)]
struct Range {
    first: u128,
    last: u128,
}

impl Range {
    fn contains(self, number: u128) -> bool {
        (self.first..=self.last).contains(&number)
    }
}

/// Leaves out the network and broadcast address of IPv4 and the router anycast address of IPv6 (RFC 4291, 2.6.1),
/// except in ranges too small to have them.
fn range(cidr: IpNetwork) -> Range {
    let (first, bits) = match cidr {
        IpNetwork::V4(v4) => (u128::from(u32::from(v4.network())), 32),
        IpNetwork::V6(v6) => (u128::from(v6.network()), 128),
    };
    let host_bits = bits - u32::from(cidr.prefix());
    let mask = if host_bits == 128 { u128::MAX } else { (1 << host_bits) - 1 };
    let last = first | mask;
    match cidr {
        _ if host_bits < 2 => Range { first, last },
        IpNetwork::V4(_) => Range { first: first + 1, last: last - 1 },
        IpNetwork::V6(_) => Range { first: first + 1, last },
    }
}

/// How many addresses of the ranges can be given to pods, exclusions not counted.
#[must_use]
pub fn capacity(cidrs: &[IpNetwork]) -> u128 {
    cidrs.iter().map(|cidr| range(*cidr)).map(|r| (r.last - r.first).saturating_add(1)).sum()
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn address(number: u128, v4: bool) -> IpAddr {
    if v4 {
        // Numbers of IPv4 ranges come from 32 bits.
        IpAddr::V4(u32::try_from(number).unwrap_or(u32::MAX).into())
    } else {
        IpAddr::V6(number.into())
    }
}

/// The first good address behind `last`, going round once.
fn in_turn(
    cidr: IpNetwork,
    last: Option<IpAddr>,
    exclude: &[IpNetwork],
    mut good: impl FnMut(IpAddr) -> bool,
) -> Option<IpAddr> {
    let Range { first, last: end } = range(cidr);
    let after = last.filter(|ip| cidr.contains(*ip)).map(|ip| number(ip).saturating_add(1));
    let start = after.filter(|number| (first..=end).contains(number)).unwrap_or(first);
    let mut scan = |from: u128, to: u128| {
        let mut at = from;
        while at <= to {
            let ip = address(at, cidr.is_ipv4());
            if let Some(network) = exclude.iter().find(|network| network.contains(ip)) {
                // An excluded range is passed in one step: it may be huge.
                at = last_of(*network).checked_add(1)?;
                continue;
            }
            if good(ip) {
                return Some(ip);
            }
            at = at.checked_add(1)?;
        }
        None
    };
    scan(start, end).or_else(|| start.checked_sub(1).and_then(|before| scan(first, before)))
}

fn last_of(network: IpNetwork) -> u128 {
    match network {
        IpNetwork::V4(v4) => u128::from(u32::from(v4.broadcast())),
        IpNetwork::V6(v6) => u128::from(v6.broadcast()),
    }
}

#[cfg(test)]
mod tests;
