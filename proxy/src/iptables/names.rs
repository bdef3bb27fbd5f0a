//! Names of our chains, and in which order they may refer to each other. Pure.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::model::{At, Endpoint};
use crate::model::{Family, FrontendKey, Protocol, ServiceKey};

/// Every chain of ours starts with this, and nobody else's does.
pub(crate) const PREFIX: &str = "KEELSON-";

/// Where packets enter: chains of ours that built-in chains jump to.
pub(crate) const SERVICES: &str = "KEELSON-SERVICES";
pub(crate) const POSTROUTING: &str = "KEELSON-POSTROUTING";
pub(crate) const INPUT: &str = "KEELSON-INPUT";
pub(crate) const FORWARD: &str = "KEELSON-FORWARD";
pub(crate) const OUTPUT: &str = "KEELSON-OUTPUT";

pub(crate) const NODE_PORTS: &str = "KEELSON-NODEPORTS";
pub(crate) const UNSERVED: &str = "KEELSON-UNSERVED";
pub(crate) const UNSERVED_PORTS: &str = "KEELSON-UNSERVED-PORTS";

/// Chains that refer to no other.
pub(crate) const MARK: &str = "KEELSON-MARK";
pub(crate) const MARK_OTHERS: &str = "KEELSON-MARK-OTHERS";
pub(crate) const HAIRPIN: &str = "KEELSON-HAIRPIN";
pub(crate) const REJECT: &str = "KEELSON-REJECT";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Table {
    Nat,
    Filter,
    /// Nothing of ours is in there.
    Mangle,
}

impl Table {
    pub(crate) const ALL: [Table; 3] = [Table::Nat, Table::Filter, Table::Mangle];
    /// Those that we have chains in.
    pub(crate) const OURS: [Table; 2] = [Table::Nat, Table::Filter];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Table::Nat => "nat",
            Table::Filter => "filter",
            Table::Mangle => "mangle",
        }
    }

    pub(crate) fn parse(name: &str) -> Option<Table> {
        Table::ALL.into_iter().find(|table| table.name() == name)
    }
}

/// One of our chains.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Chain {
    pub(crate) family: Family,
    pub(crate) table: Table,
    pub(crate) name: Box<str>,
}

impl Chain {
    pub(crate) fn new(family: Family, table: Table, name: impl Into<Box<str>>) -> Self {
        Chain { family, table, name: name.into() }
    }

    /// Chains refer to those of a lower rank only: written in this order, and removed in the opposite
    /// one, no rule ever points to a chain that is not there or not filled yet.
    pub(crate) fn rank(&self) -> u8 {
        match &*self.name {
            MARK | MARK_OTHERS | HAIRPIN | REJECT => return 0,
            UNSERVED_PORTS | NODE_PORTS => return 6,
            UNSERVED => return 7,
            SERVICES | POSTROUTING | INPUT | FORWARD | OUTPUT => return 8,
            _ => {}
        }
        let starts =
            |kind: &str| self.name.strip_prefix(PREFIX).is_some_and(|rest| rest.starts_with(kind));
        if starts("SVC-") || starts("SVL-") {
            1
        } else if starts("EXT-") {
            2
        } else if starts("FW-") {
            3
        } else {
            let last = self.name.rsplit('-').next().unwrap_or_default();
            // KEELSON-SERVICES-A5 and KEELSON-NODEPORTS-TCP-753 are leaves; one digit less is a branch.
            let by_port = ["-TCP-", "-UDP-", "-SCTP-"].iter().any(|word| self.name.contains(word));
            if last.len() == if by_port { 3 } else { 2 } { 4 } else { 5 }
        }
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.family == Family::V4 { "ipv4" } else { "ipv6" };
        write!(f, "{family} table {} chain {}", self.table.name(), self.name)
    }
}

/// Sixteen characters that stand for a text, as in kube-proxy's chain names.
pub(crate) fn hash(text: &str) -> String {
    const DIGITS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let digest = Sha256::digest(text.as_bytes());
    let mut number = digest.iter().take(10).fold(0u128, |sum, byte| sum << 8 | u128::from(*byte));
    let mut reversed = Vec::with_capacity(16);
    for _ in 0..16 {
        reversed.push(char::from(DIGITS[(number & 31) as usize]));
        number >>= 5;
    }
    reversed.into_iter().rev().collect()
}

/// What distinguishes a Service port: `namespace/name:port`, and the protocol.
#[derive(Clone, Debug)]
pub(crate) struct PortName {
    text: String,
    protocol: Protocol,
}

impl PortName {
    pub(crate) fn new(service: &ServiceKey, port: &str, protocol: Protocol) -> Self {
        let text = if port.is_empty() { service.to_string() } else { format!("{service}:{port}") };
        PortName { text, protocol }
    }

    fn hashed(&self, extra: &str) -> String {
        hash(&format!("{}{}{extra}", self.text, self.protocol))
    }

    /// The chain with the endpoints of the whole cluster.
    pub(crate) fn cluster(&self) -> String {
        format!("KEELSON-SVC-{}", self.hashed(""))
    }

    /// The chain with the endpoints on this node.
    pub(crate) fn local(&self) -> String {
        format!("KEELSON-SVL-{}", self.hashed(""))
    }

    /// The chain between a frontend and the endpoints that decides on masquerading and policy.
    pub(crate) fn entry(&self, route: &str) -> String {
        format!("KEELSON-EXT-{}", self.hashed(route))
    }

    /// The chain with the sources that may use a frontend.
    pub(crate) fn firewall(&self, key: &FrontendKey) -> String {
        format!("KEELSON-FW-{}", self.hashed(&key.to_string()))
    }

    /// The list of clients that stick to an endpoint: one for all frontends of the port.
    pub(crate) fn clients(&self, endpoint: Endpoint) -> String {
        format!("KEELSON-{}", self.hashed(&endpoint.to_string()))
    }

    /// The port's name as it may stand in a rule: nothing when it holds anything unexpected.
    pub(crate) fn comment(&self) -> Option<&str> {
        let harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '/' | ':');
        (self.text.len() <= 200 && self.text.chars().all(harmless)).then_some(&self.text)
    }
}

/// The first level of the way from a built-in chain to a frontend: one of at most sixteen by address,
/// or one of those that hold a node port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Branch {
    /// The lower half of the address's last byte.
    Address(u8),
    /// The port's upper byte.
    Port(Protocol, u8),
}

/// The second level: a chain with the frontends themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Leaf {
    pub(crate) family: Family,
    pub(crate) table: Table,
    pub(crate) branch: Branch,
    /// The upper half of the address's last byte, or the upper half of the port's lower byte.
    pub(crate) slot: u8,
}

impl Leaf {
    pub(crate) fn of(table: Table, key: &FrontendKey) -> Leaf {
        match key.at {
            At::Address(address) => Leaf::of_address(table, address),
            At::NodePort(family) => {
                let [upper, lower] = key.port.to_be_bytes();
                Leaf { family, table, branch: Branch::Port(key.protocol, upper), slot: lower >> 4 }
            }
        }
    }

    pub(crate) fn of_address(table: Table, address: std::net::IpAddr) -> Leaf {
        let last = match address {
            std::net::IpAddr::V4(v4) => v4.octets()[3],
            std::net::IpAddr::V6(v6) => v6.octets()[15],
        };
        let branch = Branch::Address(last & 15);
        Leaf { family: Family::of(address), table, branch, slot: last >> 4 }
    }

    fn name(self) -> String {
        format!("{}{:X}", self.branch_name(), self.slot)
    }

    fn branch_name(self) -> String {
        match (self.table, self.branch) {
            (Table::Nat, Branch::Address(low)) => format!("{SERVICES}-{low:X}"),
            (_, Branch::Address(low)) => format!("{UNSERVED}-{low:X}"),
            (Table::Nat, Branch::Port(protocol, upper)) => {
                format!("{NODE_PORTS}-{}-{upper:02X}", capitals(protocol))
            }
            (_, Branch::Port(protocol, upper)) => {
                format!("{UNSERVED}-{}-{upper:02X}", capitals(protocol))
            }
        }
    }

    /// The chain with the frontends.
    pub(crate) fn chain(self) -> Chain {
        Chain::new(self.family, self.table, self.name())
    }

    /// The chain that leads to this one.
    pub(crate) fn branch_chain(self) -> Chain {
        Chain::new(self.family, self.table, self.branch_name())
    }

    /// The root chain that leads to the branch.
    pub(crate) fn root_chain(self) -> Chain {
        let name = match (self.table, self.branch) {
            (Table::Nat, Branch::Address(_)) => SERVICES,
            (Table::Nat, Branch::Port(..)) => NODE_PORTS,
            (_, Branch::Address(_)) => UNSERVED,
            (_, Branch::Port(..)) => UNSERVED_PORTS,
        };
        Chain::new(self.family, self.table, name)
    }

    /// The rule in the root that leads to the branch.
    pub(crate) fn branch_rule(self) -> String {
        let condition = match self.branch {
            Branch::Address(low) => self.byte(low, 0x0f),
            Branch::Port(protocol, upper) => {
                let first = u16::from(upper) << 8;
                ports(protocol, first, first | 0xff)
            }
        };
        format!("{condition} -j {}", self.branch_name())
    }

    /// The rule in the branch that leads to the leaf.
    pub(crate) fn leaf_rule(self) -> String {
        let condition = match self.branch {
            Branch::Address(_) => self.byte(self.slot << 4, 0xf0),
            Branch::Port(protocol, upper) => {
                let first = u16::from(upper) << 8 | u16::from(self.slot) << 4;
                ports(protocol, first, first | 0x0f)
            }
        };
        format!("{condition} -j {}", self.name())
    }

    /// Compares some bits of the destination's last byte.
    fn byte(self, value: u8, mask: u8) -> String {
        match self.family {
            Family::V4 => format!("-d 0.0.0.{value}/0.0.0.{mask}"),
            Family::V6 => {
                let address = |byte: u8| std::net::Ipv6Addr::from(u128::from(byte));
                format!("-d {}/{}", address(value), address(mask))
            }
        }
    }
}

fn ports(protocol: Protocol, first: u16, last: u16) -> String {
    format!("-p {protocol} -m {protocol} --dport {first}:{last}")
}

fn capitals(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_kube_proxy() {
        // KUBE-SVC-NPX46M4PTMTKRN6Y is default/kubernetes:https on every cluster.
        let key = ServiceKey::new("default", "kubernetes");
        let name = PortName::new(&key, "https", Protocol::Tcp);
        assert_eq!(name.cluster(), "KEELSON-SVC-NPX46M4PTMTKRN6Y");
    }

    #[test]
    fn names_fit_and_ranks_follow_the_references() {
        let key =
            FrontendKey { at: At::NodePort(Family::V6), protocol: Protocol::Sctp, port: 65535 };
        for table in Table::OURS {
            let leaf = Leaf::of(table, &key);
            // The legacy variant takes 28 characters at most.
            assert!(leaf.chain().name.len() <= 28, "{}", leaf.chain());
            assert_eq!(leaf.chain().rank(), 4);
            assert_eq!(leaf.branch_chain().rank(), 5);
            assert!(leaf.root_chain().rank() > 5);
            let leaf = Leaf::of_address(table, "10.0.0.5".parse().unwrap());
            assert_eq!((leaf.chain().rank(), leaf.branch_chain().rank()), (4, 5));
        }
    }

    #[test]
    fn only_harmless_names_become_comments() {
        let name = |name| PortName::new(&ServiceKey::new("default", name), "", Protocol::Tcp);
        assert_eq!(name("web").comment(), Some("default/web"));
        for bad in ["a b", "a\"b", "a\n-j DROP", "ä", "a\\"] {
            assert_eq!(name(bad).comment(), None);
        }
    }
}
