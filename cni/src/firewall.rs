//! Address translation at the node's edge, in a table of our own: `inet keelson-cni-NETWORK`.
//!
//! ```text
//! set cluster4, cluster6        ranges whose pods are reached under their own address
//! set pods4, pods6              ranges that this node's pods come from
//! map ports4, ports6            protocol . port            -> pod . port
//! map ports4at, ports6at        address . protocol . port  -> pod . port
//! set own4, own6                pod . pod, for pods with ports
//! chain prerouting, output      fib daddr type local: dnat to the maps' answer
//! chain postrouting             from a pod to itself, or from loopback into a port: masquerade
//!                               saddr @pods, daddr not @cluster: masquerade
//! chain input                   to 127/8 from a link, unless it answers the node: drop
//! ```
//!
//! The table carries a stamp of the configuration that it was made from. ADD reads the stamp (one message) and makes the
//! table anew, with the ports of all recorded pods and in one transaction, when it is missing or differs.

use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::IpNetwork;
use keelson_netlink::nft::{
    Base, Batch, CT_STATUS_DNAT, ChainKind, Compare, Conntrack, Element, FIB_LOCAL, FibAddress,
    Field, Header, Hook, IPV4_DESTINATION, IPV4_SOURCE, IPV6_DESTINATION, IPV6_SOURCE, Meta, Nat,
    Nft, NftError, PRIORITY_DNAT, PRIORITY_SNAT, Register, Rule, Set, Table, Verdict,
};

use crate::hostport::HostPort;
use crate::names::fnv1a;

/// Changes whenever the shape of the table does.
const LAYOUT: &str = "2";

/// What the table is made from.
#[derive(Debug, Clone, Copy)]
pub struct Edge<'a> {
    /// The network's name.
    pub network: &'a str,
    /// Ranges of this node's pods; nothing is masqueraded if empty.
    pub pods: &'a [IpNetwork],
    /// Ranges that are reached without masquerade.
    pub cluster: &'a [IpNetwork],
}

/// A port of the node and where it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// The port.
    pub port: HostPort,
    /// The pod.
    pub pod: IpAddr,
}

/// The forwards of one pod: each port for each of its addresses of a fitting family.
#[must_use]
pub fn forwards(ports: &[HostPort], ips: &[IpAddr]) -> Vec<Forward> {
    let fits = |port: &HostPort, ip: &IpAddr| {
        port.address.is_none_or(|address| address.is_ipv4() == ip.is_ipv4())
    };
    ports
        .iter()
        .flat_map(|port| {
            ips.iter()
                .filter(move |ip| fits(port, ip))
                .map(|ip| Forward { port: port.clone(), pod: *ip })
        })
        .collect()
}

/// The two families and all that differs between them.
#[derive(Debug, Clone, Copy)]
struct Family {
    v4: bool,
    pods: &'static str,
    cluster: &'static str,
    ports: &'static str,
    ports_at: &'static str,
    own: &'static str,
    field: Field,
    source: u32,
    destination: u32,
    length: u32,
}

const FAMILIES: [Family; 2] = [
    Family {
        v4: true,
        pods: "pods4",
        cluster: "cluster4",
        ports: "ports4",
        ports_at: "ports4at",
        own: "own4",
        field: Field::Ipv4,
        source: IPV4_SOURCE,
        destination: IPV4_DESTINATION,
        length: 4,
    },
    Family {
        v4: false,
        pods: "pods6",
        cluster: "cluster6",
        ports: "ports6",
        ports_at: "ports6at",
        own: "own6",
        field: Field::Ipv6,
        source: IPV6_SOURCE,
        destination: IPV6_DESTINATION,
        length: 16,
    },
];

impl Family {
    fn of(ip: IpAddr) -> Self {
        FAMILIES[usize::from(!ip.is_ipv4())]
    }

    fn rule(self) -> Rule {
        if self.v4 { Rule::new().only_ipv4() } else { Rule::new().only_ipv6() }
    }

    fn load(self, rule: Rule, offset: u32, to: Register) -> Rule {
        rule.payload(Header::Network, offset, self.length, to)
    }
}

impl Edge<'_> {
    fn table_name(&self) -> String {
        table_name(self.network)
    }

    fn stamp(&self) -> [u8; 8] {
        let text = format!("{LAYOUT} {:?} {:?}", self.pods, self.cluster);
        fnv1a(text.as_bytes()).to_be_bytes()
    }

    /// Makes the table unless the one that is there was made from the same configuration. `forwards` are all ports that
    /// must lead somewhere; they are asked for only when the table is made. Answers whether it was.
    ///
    /// # Errors
    /// When the kernel has no nftables or refuses the table.
    pub fn ensure(
        &self,
        nft: &mut Nft,
        forwards: impl FnOnce() -> Vec<Forward>,
    ) -> Result<bool, NftError> {
        let name = self.table_name();
        let table = Table::inet(&name);
        let found = nft.table(table)?;
        if found.as_ref().is_some_and(|found| found.stamp.as_deref() == Some(&self.stamp())) {
            return Ok(false);
        }
        let mut batch = Batch::new();
        if found.is_some() {
            batch.delete_table(table);
        }
        batch.create_table(table, &self.stamp());
        self.add_sets(&mut batch, table);
        add_chains(&mut batch, table);
        for forward in forwards() {
            add_forward(&mut batch, table, &forward);
        }
        nft.commit(batch).map(|()| true)
    }

    /// Whether the table is there and up to date.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn is_current(&self, nft: &mut Nft) -> Result<bool, NftError> {
        let name = self.table_name();
        let found = nft.table(Table::inet(&name))?;
        Ok(found.is_some_and(|found| found.stamp.as_deref() == Some(&self.stamp())))
    }

    fn add_sets(&self, batch: &mut Batch, table: Table<'_>) {
        for family in FAMILIES {
            let address = [family.field];
            for (name, ranges) in [(family.pods, self.pods), (family.cluster, self.cluster)] {
                batch.add_set(table, &Set { interval: true, ..Set::new(name, &address) });
                let ranges = merged(ranges, family.v4);
                let elements =
                    ranges.iter().map(|(first, last)| (first.as_slice(), last.as_slice()));
                batch.add_ranges(table, name, elements);
            }
            let port = [Field::Protocol, Field::Port];
            let port_at = [family.field, Field::Protocol, Field::Port];
            let target = [family.field, Field::Port];
            batch.add_set(table, &Set::map(family.ports, &port, &target));
            batch.add_set(table, &Set::map(family.ports_at, &port_at, &target));
            batch.add_set(table, &Set::new(family.own, &[family.field, family.field]));
        }
    }
}

/// Adds a pod's ports to the maps of the network's table.
///
/// # Errors
/// When a port is taken (`EEXIST`) or the table is missing.
pub fn open_ports(nft: &mut Nft, network: &str, forwards: &[Forward]) -> Result<(), NftError> {
    let name = table_name(network);
    let mut batch = Batch::new();
    for forward in forwards {
        add_forward(&mut batch, Table::inet(&name), forward);
    }
    nft.commit(batch)
}

/// Takes a pod's ports out of the maps. Ports or a table that are not there are a success.
///
/// # Errors
/// When the kernel refuses.
pub fn close_ports(nft: &mut Nft, network: &str, forwards: &[Forward]) -> Result<(), NftError> {
    let name = table_name(network);
    let ports = forwards.iter().map(|forward| {
        let (map, key, _) = element(forward);
        (map, key)
    });
    let mut pods: Vec<_> = forwards.iter().map(|forward| itself(forward.pod)).collect();
    pods.dedup();
    // One by one: what is not there would refuse the whole transaction.
    for (set, key) in ports.chain(pods) {
        let mut batch = Batch::new();
        batch.delete_elements(Table::inet(&name), set, [Element::key(&key)]);
        match nft.commit(batch) {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn table_name(network: &str) -> String {
    format!("keelson-cni-{network}")
}

fn add_forward(batch: &mut Batch, table: Table<'_>, forward: &Forward) {
    let (map, key, value) = element(forward);
    batch.add_elements(table, map, [Element::value(&key, &value)]);
    let (set, key) = itself(forward.pod);
    batch.add_elements(table, set, [Element::key(&key)]);
}

/// The pod as source and destination.
fn itself(pod: IpAddr) -> (&'static str, Vec<u8>) {
    (Family::of(pod).own, [octets(pod), octets(pod)].concat())
}

/// Parts of keys and values are padded to four bytes each.
fn element(forward: &Forward) -> (&'static str, Vec<u8>, Vec<u8>) {
    let Forward { port, pod } = forward;
    let family = Family::of(*pod);
    let mut key = Vec::new();
    let map = match port.address {
        Some(address) => {
            key.extend(octets(address));
            family.ports_at
        }
        None => family.ports,
    };
    key.extend([port.protocol.number(), 0, 0, 0]);
    key.extend(padded(port.host));
    let mut value = octets(*pod);
    value.extend(padded(port.container));
    (map, key, value)
}

fn padded(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// First and last addresses of a family's ranges, in order and without overlap, as interval sets want them.
fn merged(networks: &[IpNetwork], v4: bool) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut ranges: Vec<_> = networks
        .iter()
        .filter(|network| network.is_ipv4() == v4)
        .map(|network| (octets(network.network()), octets(network.broadcast())))
        .collect();
    ranges.sort();
    let mut merged: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if first <= *end => *end = last.max(end.clone()),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn add_chains(batch: &mut Batch, table: Table<'_>) {
    let nat = |hook, priority| Some(Base { kind: ChainKind::Nat, hook, priority });
    // Behind the Service proxy's chains: a Service's port wins over a pod's.
    batch.add_chain(table, "prerouting", nat(Hook::Prerouting, PRIORITY_DNAT + 1));
    batch.add_chain(table, "output", nat(Hook::Output, PRIORITY_DNAT + 1));
    batch.add_chain(table, "postrouting", nat(Hook::Postrouting, PRIORITY_SNAT + 1));
    let input = Base { kind: ChainKind::Filter, hook: Hook::Input, priority: 0 };
    batch.add_chain(table, "input", Some(input));
    batch.add_rule(table, "input", &loopback_guard());
    for family in FAMILIES {
        for chain in ["prerouting", "output"] {
            batch.add_rule(table, chain, &dnat(family, true));
            batch.add_rule(table, chain, &dnat(family, false));
        }
    }
    batch.add_rule(table, "postrouting", &from_loopback());
    for family in FAMILIES {
        for rule in [hairpin(family), leaving(family)] {
            batch.add_rule(table, "postrouting", &rule);
        }
    }
}

/// `fib daddr type local dnat to [daddr .] protocol . dport map @ports`
fn dnat(family: Family, with_address: bool) -> Rule {
    let local = family.rule().fib_address_type(FibAddress::Destination, Register(0)).compare(
        Register(0),
        Compare::Equal,
        &FIB_LOCAL.to_ne_bytes(),
    );
    let words = u8::try_from(family.length / 4).unwrap_or(4);
    let (rule, map, next) = if with_address {
        (family.load(local, family.destination, Register(0)), family.ports_at, words)
    } else {
        (local, family.ports, 0)
    };
    rule.meta(Meta::TransportProtocol, Register(next))
        .payload(Header::Transport, keelson_netlink::nft::DESTINATION_PORT, 2, Register(next + 1))
        .lookup_value(map, Register(0), Register(8))
        .nat(Nat {
            destination: true,
            ipv6: !family.v4,
            address: Register(8),
            address_end: None,
            port: Some(Register(8 + words)),
            port_end: None,
        })
}

fn translated(rule: Rule) -> Rule {
    let bit = CT_STATUS_DNAT.to_ne_bytes();
    rule.conntrack(Conntrack::Status, Register(0))
        .bitwise(Register(0), Register(0), &bit, &[0; 4])
        .compare(Register(0), Compare::NotEqual, &[0; 4])
}

/// A pod that calls its own port through the node must see the node, or it would answer itself directly. Other pods are
/// seen under their own addresses.
fn hairpin(family: Family) -> Rule {
    let words = u8::try_from(family.length / 4).unwrap_or(4);
    let rule = family.load(translated(family.rule()), family.source, Register(0));
    let rule = family.load(rule, family.destination, Register(words));
    rule.lookup(family.own, Register(0), false).masquerade()
}

/// The links of pods with ports route 127/8, so that the node can call its ports there. Nobody else may come that way
/// (CVE-2020-8558): only answers, whose connection was translated, may enter.
fn loopback_guard() -> Rule {
    let v4 = Family::of(Ipv4Addr::LOCALHOST.into());
    let mut name = [0; 16];
    name[..2].copy_from_slice(b"lo");
    let rule = v4.rule().meta(Meta::InputName, Register(0));
    let rule = rule.compare(Register(0), Compare::NotEqual, &name);
    let rule = rule.payload(Header::Network, v4.destination, 1, Register(0));
    let rule = rule.compare(Register(0), Compare::Equal, &[127]);
    let bit = CT_STATUS_DNAT.to_ne_bytes();
    rule.conntrack(Conntrack::Status, Register(0))
        .bitwise(Register(0), Register(0), &bit, &[0; 4])
        .compare(Register(0), Compare::Equal, &[0; 4])
        .verdict(Verdict::Drop)
}

/// The node that calls a port on 127.0.0.1.
fn from_loopback() -> Rule {
    let v4 = Family::of(Ipv4Addr::LOCALHOST.into());
    let rule = translated(v4.rule()).payload(Header::Network, v4.source, 1, Register(0));
    rule.compare(Register(0), Compare::Equal, &[127]).masquerade()
}

/// From a pod of this node to the world.
fn leaving(family: Family) -> Rule {
    let rule = family.load(family.rule(), family.source, Register(0));
    let rule = rule.lookup(family.pods, Register(0), false);
    let rule = family.load(rule, family.destination, Register(0));
    rule.lookup(family.cluster, Register(0), true).masquerade()
}
