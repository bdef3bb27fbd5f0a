//! The rules in the chains. Pure.

use std::hash::{Hash, Hasher};
use std::time::Duration;

use keelson_netlink::nft::{
    CT_STATUS_DNAT, Compare, Conntrack, DESTINATION_PORT, Dynamic, FIB_LOCAL, FibAddress, Header,
    IPV4_DESTINATION, IPV4_SOURCE, IPV6_DESTINATION, IPV6_SOURCE, Meta, Nat, Refusal, Register,
    Rule, Verdict,
};

use super::{Chain, Forward, Kind, Map};
use crate::model::{Family, Masquerade};

impl Chain {
    /// The rules of the chain; `mark` is the bit of the packet mark that asks for masquerading.
    pub(crate) fn rules(self, mark: u32) -> Vec<Rule> {
        let rules = match self {
            Chain::Prerouting | Chain::Output => entry_rules(),
            Chain::Postrouting => postrouting_rules(mark),
            Chain::Services(family) => find_service_rules(family),
            Chain::NodePorts(family) => find_node_port_rules(family),
            Chain::BySource(family, kind) => by_source_rules(family, kind, mark),
            Chain::Sources(family) => source_rules(family),
            Chain::Reject => reject_rules(),
            Chain::Forward(forward) => forward_rules(forward, mark),
        };
        rules.into_iter().map(stamped).collect()
    }
}

/// Marks a rule with a hash of its content, by which it is recognised after a restart.
fn stamped(rule: Rule) -> Rule {
    // A fixed hash: the stamp must not differ between builds.
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    rule.encoded().hash(&mut hasher);
    rule.stamp(&hasher.finish().to_be_bytes())
}

struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// The stamp that [`Chain::rules`] gave a rule.
pub(crate) fn stamps_of(chain: Chain, mark: u32) -> Vec<Vec<u8>> {
    let stamp = |rule: &Rule| {
        let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
        rule.encoded().hash(&mut hasher);
        hasher.finish().to_be_bytes().to_vec()
    };
    chain.rules(mark).iter().map(stamp).collect()
}

fn address_registers(family: Family) -> u8 {
    if family == Family::V4 { 1 } else { 4 }
}

fn only(family: Family) -> Rule {
    if family == Family::V4 { Rule::new().only_ipv4() } else { Rule::new().only_ipv6() }
}

/// Loads the source address.
fn source(rule: Rule, family: Family, to: u8) -> Rule {
    match family {
        Family::V4 => rule.payload(Header::Network, IPV4_SOURCE, 4, Register(to)),
        Family::V6 => rule.payload(Header::Network, IPV6_SOURCE, 16, Register(to)),
    }
}

/// Loads the destination address.
fn destination(rule: Rule, family: Family, to: u8) -> Rule {
    match family {
        Family::V4 => rule.payload(Header::Network, IPV4_DESTINATION, 4, Register(to)),
        Family::V6 => rule.payload(Header::Network, IPV6_DESTINATION, 16, Register(to)),
    }
}

/// Loads a frontend's key into the registers from 0 on; the next free register comes back, too.
fn frontend(rule: Rule, family: Family, kind: Kind) -> (Rule, u8) {
    let (rule, next) = match kind {
        Kind::Address => (destination(rule, family, 0), address_registers(family)),
        Kind::NodePort => (rule, 0),
    };
    let rule = rule.meta(Meta::TransportProtocol, Register(next)).payload(
        Header::Transport,
        DESTINATION_PORT,
        2,
        Register(next + 1),
    );
    (rule, next + 2)
}

/// Sets the bit of the packet mark that asks for masquerading.
fn set_mark(rule: Rule, mark: u32) -> Rule {
    let register = Register(15);
    rule.meta(Meta::Mark, register)
        .bitwise(register, register, &(!mark).to_ne_bytes(), &mark.to_ne_bytes())
        .set_meta(Meta::Mark, register)
}

fn entry_rules() -> Vec<Rule> {
    let find = |family| only(family).verdict(Verdict::Jump(services_chain(family)));
    Family::BOTH.map(find).into()
}

fn services_chain(family: Family) -> &'static str {
    if family == Family::V4 { "find-service4" } else { "find-service6" }
}

fn find_service_rules(family: Family) -> Vec<Rule> {
    let v4 = family == Family::V4;
    let (key, _) = frontend(only(family), family, Kind::Address);
    let restricted = key
        .clone()
        .lookup(Map::Restricted.name(family), Register(0), false)
        .verdict(Verdict::Jump(if v4 { "check-source4" } else { "check-source6" }));
    let found = key.lookup_verdict(Map::Frontends(Kind::Address).name(family), Register(0));
    // A node port answers on the node's own addresses except the loopback ones.
    let local = destination(only(family), family, 0);
    let local = if v4 {
        local.bitwise(Register(0), Register(4), &[255, 0, 0, 0], &[0; 4]).compare(
            Register(4),
            Compare::NotEqual,
            &[127, 0, 0, 0],
        )
    } else {
        let loopback = std::net::Ipv6Addr::LOCALHOST.octets();
        local.compare(Register(0), Compare::NotEqual, &loopback)
    };
    let local = local
        .lookup(Map::NodePortAddresses.name(family), Register(0), false)
        .fib_address_type(FibAddress::Destination, Register(4))
        .compare(Register(4), Compare::Equal, &FIB_LOCAL.to_ne_bytes())
        .verdict(Verdict::Goto(if v4 { "find-node-port4" } else { "find-node-port6" }));
    vec![restricted, found, local]
}

fn find_node_port_rules(family: Family) -> Vec<Rule> {
    let (key, _) = frontend(only(family), family, Kind::NodePort);
    vec![key.lookup_verdict(Map::Frontends(Kind::NodePort).name(family), Register(0))]
}

fn by_source_rules(family: Family, kind: Kind, mark: u32) -> Vec<Rule> {
    let inside = Map::Inside(kind).name(family);
    let from_pod =
        source(only(family), family, 0).lookup(Map::ClusterCidrs.name(family), Register(0), false);
    let from_node = only(family).fib_address_type(FibAddress::Source, Register(0)).compare(
        Register(0),
        Compare::Equal,
        &FIB_LOCAL.to_ne_bytes(),
    );
    let from_node = set_mark(from_node, mark);
    let follow = |rule, map: &str| frontend(rule, family, kind).0.lookup_verdict(map, Register(0));
    vec![
        follow(from_pod, inside),
        follow(from_node, inside),
        follow(only(family), Map::Outside(kind).name(family)),
    ]
}

fn source_rules(family: Family) -> Vec<Rule> {
    let (key, next) = frontend(only(family), family, Kind::Address);
    let allowed = source(key, family, next)
        .lookup(Map::Allowed.name(family), Register(0), false)
        .verdict(Verdict::Return);
    vec![allowed, Rule::new().verdict(Verdict::Drop)]
}

fn reject_rules() -> Vec<Rule> {
    const TCP: u8 = 6;
    let tcp = Rule::new().meta(Meta::TransportProtocol, Register(0)).compare(
        Register(0),
        Compare::Equal,
        &[TCP],
    );
    vec![tcp.reject(Refusal::TcpReset), Rule::new().reject(Refusal::PortUnreachable)]
}

fn postrouting_rules(mark: u32) -> Vec<Rule> {
    let (register, bit) = (Register(0), mark.to_ne_bytes());
    let all = (!0u32).to_ne_bytes();
    let marked = Rule::new()
        .meta(Meta::Mark, register)
        .bitwise(register, Register(1), &bit, &[0; 4])
        .compare(Register(1), Compare::Equal, &bit)
        .bitwise(register, register, &all, &bit)
        .set_meta(Meta::Mark, register)
        .masquerade();
    let hairpin = |family| {
        let translated = only(family)
            .conntrack(Conntrack::Status, Register(0))
            .bitwise(Register(0), Register(0), &CT_STATUS_DNAT.to_ne_bytes(), &[0; 4])
            .compare(Register(0), Compare::NotEqual, &[0; 4]);
        let addresses =
            destination(source(translated, family, 0), family, address_registers(family));
        addresses.lookup(Map::Hairpin.name(family), Register(0), false).masquerade()
    };
    vec![marked, hairpin(Family::V4), hairpin(Family::V6)]
}

fn forward_rules(forward: Forward, mark: u32) -> Vec<Rule> {
    let mut rules = Vec::new();
    match forward.masquerade {
        Masquerade::Never => {}
        Masquerade::Always => rules.push(set_mark(Rule::new(), mark)),
        Masquerade::UnlessPod => {
            let others = source(only(forward.family), forward.family, 0).lookup(
                Map::ClusterCidrs.name(forward.family),
                Register(0),
                true,
            );
            rules.push(set_mark(others, mark));
        }
    }
    let registers = Registers::new(forward);
    if let Some(secs) = forward.sticky_secs {
        let timeout = Duration::from_secs(secs.into());
        rules.push(registers.stick(forward, timeout));
        rules.push(registers.choose_and_remember(forward, timeout));
        // The table of remembered clients is full.
        rules.push(registers.choose_place(forward).nat(registers.translation(forward)));
    } else {
        rules.push(registers.choose(forward));
    }
    rules
}

/// Where a forwarding rule keeps what: all sixteen registers are needed with IPv6 and affinity.
///
/// `frontend, later the packet's mark and a place | pool | place or client | address, port`
///
/// A number that came out of a map goes through the packet mark before it becomes part of another key,
/// and the mark gets its old value back at once. The registers would do without, but `nft list` can
/// show a key with a part that comes from a map only in this way (1.0.6 aborts otherwise).
struct Registers {
    pool: u8,
    next: u8,
    endpoint: u8,
    port: u8,
}

const SAVED_MARK: Register = Register(0);
const PLACE: Register = Register(1);

impl Registers {
    fn new(forward: Forward) -> Self {
        let address = address_registers(forward.family);
        let pool = match forward.kind {
            Kind::Address => address + 2,
            Kind::NodePort => 2,
        };
        let endpoint = pool + 1 + address;
        Registers { pool, next: pool + 1, endpoint, port: endpoint + address }
    }

    fn load_pool(&self, forward: Forward) -> Rule {
        let (key, _) = frontend(only(forward.family), forward.family, forward.kind);
        let map = Map::Pools(forward.kind, forward.view).name(forward.family);
        let pool = Register(self.pool);
        let found = key.lookup_value(map, Register(0), pool).meta(Meta::Mark, SAVED_MARK);
        through_mark(found, pool, &[pool])
    }

    /// A random slot.
    fn random(&self, rule: Rule, forward: Forward) -> Rule {
        rule.random(forward.size, Register(self.next))
    }

    fn load_endpoint(&self, rule: Rule, forward: Forward) -> Rule {
        let map = Map::Endpoints.name(forward.family);
        rule.lookup_value(map, Register(self.pool), Register(self.endpoint))
    }

    /// Without affinity the slots are the places.
    fn choose(&self, forward: Forward) -> Rule {
        let rule = self.random(self.load_pool(forward), forward);
        self.load_endpoint(rule, forward).nat(self.translation(forward))
    }

    /// Forwards to the place that is remembered for the client, if somebody is still there.
    fn stick(&self, forward: Forward, timeout: Duration) -> Rule {
        let affinity = Map::Affinity.name(forward.family);
        let pool = Register(self.pool);
        let remembered = source(self.load_pool(forward), forward.family, self.next)
            .lookup_value(affinity, pool, PLACE);
        let remembered = through_mark(remembered, PLACE, &[PLACE]).dynamic_set(
            affinity,
            Dynamic::Update,
            pool,
            Some(PLACE),
            Some(timeout),
        );
        let placed = through_mark(remembered, PLACE, &[Register(self.next)]);
        self.load_endpoint(placed, forward).nat(self.translation(forward))
    }

    fn choose_place(&self, forward: Forward) -> Rule {
        let slot = self.random(self.load_pool(forward), forward);
        let found = slot.lookup_value(Map::Places.name(forward.family), Register(self.pool), PLACE);
        let placed = through_mark(found, PLACE, &[Register(self.next), PLACE]);
        self.load_endpoint(placed, forward)
    }

    /// An element's value cannot be overwritten by a rule: so remove the old one first.
    fn choose_and_remember(&self, forward: Forward, timeout: Duration) -> Rule {
        let affinity = Map::Affinity.name(forward.family);
        let pool = Register(self.pool);
        source(self.choose_place(forward), forward.family, self.next)
            .dynamic_set(affinity, Dynamic::Delete, pool, Some(PLACE), Some(timeout))
            .dynamic_set(affinity, Dynamic::Add, pool, Some(PLACE), Some(timeout))
            .nat(self.translation(forward))
    }

    fn translation(&self, forward: Forward) -> Nat {
        Nat {
            destination: true,
            ipv6: forward.family == Family::V6,
            address: Register(self.endpoint),
            address_end: None,
            port: Some(Register(self.port)),
            port_end: None,
        }
    }
}

/// Copies a register to others by way of the packet mark, which [`SAVED_MARK`] restores.
///
/// Nothing between the two changes of the mark can end the rule.
fn through_mark(rule: Rule, from: Register, to: &[Register]) -> Rule {
    let set = rule.set_meta(Meta::Mark, from);
    let loaded = to.iter().fold(set, |rule, register| rule.meta(Meta::Mark, *register));
    loaded.set_meta(Meta::Mark, SAVED_MARK)
}
