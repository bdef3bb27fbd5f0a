//! The fixed part of the table: maps, chains and the rules in them. Pure.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use keelson_netlink::nft::{
    Base, CT_STATUS_DNAT, ChainKind, Compare, Conntrack, DESTINATION_PORT, Dynamic, FIB_LOCAL,
    FibAddress, Field, Header, Hook, IPV4_DESTINATION, IPV4_SOURCE, IPV6_DESTINATION, IPV6_SOURCE,
    Meta, Nat, PRIORITY_DNAT, PRIORITY_SNAT, Refusal, Register, Rule, Set, Table, Verdict,
};

use crate::model::{Family, Masquerade};

pub(crate) const TABLE: Table<'static> =
    Table { family: keelson_netlink::nft::Family::Inet, name: "keelson-proxy" };

/// Changes whenever a table of an older version cannot be repaired but must be made anew.
pub(crate) const STAMP: &[u8] = b"keelson-proxy 1";

/// More clients than this are not remembered; they are served all the same.
const AFFINITY_ENTRIES: u32 = 1 << 20;

/// What a frontend's key consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Address, protocol, port.
    Address,
    /// Protocol, port.
    NodePort,
}

pub(crate) const KINDS: [Kind; 2] = [Kind::Address, Kind::NodePort];

/// Which of a frontend's two pools a look-up means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum View {
    Direct,
    /// The short cut of pods and the node itself under externalTrafficPolicy Local.
    Inside,
}

/// A map or set of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Map {
    /// Frontend to verdict.
    Frontends(Kind),
    /// Frontend to pool number.
    Pools(Kind, View),
    /// Frontend to verdict, for pods and the node.
    Inside(Kind),
    /// Frontend to verdict, for everybody else.
    Outside(Kind),
    /// Pool number and place to endpoint.
    Endpoints,
    /// Pool number and slot to place, where clients stick: slots move up, places never do.
    Places,
    /// Pool number and client to place; the kernel adds and expires elements.
    Affinity,
    /// An endpoint's address twice: it talks to itself through a Service.
    Hairpin,
    /// The pod ranges of the cluster.
    ClusterCidrs,
    /// Node addresses that serve node ports.
    NodePortAddresses,
    /// Frontends that only some sources may use.
    Restricted,
    /// Those sources.
    Allowed,
}

impl Map {
    pub(crate) fn all() -> impl Iterator<Item = Map> {
        let per_kind = KINDS.into_iter().flat_map(|kind| {
            [
                Map::Frontends(kind),
                Map::Pools(kind, View::Direct),
                Map::Pools(kind, View::Inside),
                Map::Inside(kind),
                Map::Outside(kind),
            ]
        });
        per_kind.chain([
            Map::Endpoints,
            Map::Places,
            Map::Affinity,
            Map::Hairpin,
            Map::ClusterCidrs,
            Map::NodePortAddresses,
            Map::Restricted,
            Map::Allowed,
        ])
    }

    pub(crate) fn name(self, family: Family) -> &'static str {
        use Kind::{Address, NodePort};
        use View::{Direct, Inside};
        let [v4, v6] = match self {
            Map::Frontends(Address) => ["services4", "services6"],
            Map::Frontends(NodePort) => ["node-ports4", "node-ports6"],
            Map::Pools(Address, Direct) => ["service-pools4", "service-pools6"],
            Map::Pools(NodePort, Direct) => ["node-port-pools4", "node-port-pools6"],
            Map::Pools(Address, Inside) => ["service-inside-pools4", "service-inside-pools6"],
            Map::Pools(NodePort, Inside) => ["node-port-inside-pools4", "node-port-inside-pools6"],
            Map::Inside(Address) => ["service-inside4", "service-inside6"],
            Map::Inside(NodePort) => ["node-port-inside4", "node-port-inside6"],
            Map::Outside(Address) => ["service-outside4", "service-outside6"],
            Map::Outside(NodePort) => ["node-port-outside4", "node-port-outside6"],
            Map::Endpoints => ["endpoints4", "endpoints6"],
            Map::Affinity => ["affinity4", "affinity6"],
            Map::Places => ["affinity-places4", "affinity-places6"],
            Map::Hairpin => ["hairpin4", "hairpin6"],
            Map::ClusterCidrs => ["cluster-cidrs4", "cluster-cidrs6"],
            Map::NodePortAddresses => ["node-port-addresses4", "node-port-addresses6"],
            Map::Restricted => ["restricted4", "restricted6"],
            Map::Allowed => ["allowed-sources4", "allowed-sources6"],
        };
        if family == Family::V4 { v4 } else { v6 }
    }

    /// Hands the kernel's description of the map to `take`.
    pub(crate) fn describe<T>(self, family: Family, take: impl FnOnce(&Set<'_>) -> T) -> T {
        let name = self.name(family);
        let ip = if family == Family::V4 { Field::Ipv4 } else { Field::Ipv6 };
        let endpoint = [ip, Field::Port];
        let frontend = [ip, Field::Protocol, Field::Port];
        let key = |kind| match kind {
            Kind::Address => &frontend[..],
            Kind::NodePort => &frontend[1..],
        };
        match self {
            Map::Frontends(kind) | Map::Inside(kind) | Map::Outside(kind) => {
                take(&Set::verdict_map(name, key(kind)))
            }
            Map::Pools(kind, _) => take(&Set::map(name, key(kind), &[Field::Mark])),
            Map::Endpoints => take(&Set::map(name, &[Field::Mark, Field::Mark], &endpoint)),
            Map::Affinity => take(&Set {
                dynamic: true,
                timeout: true,
                size: Some(AFFINITY_ENTRIES),
                ..Set::map(name, &[Field::Mark, ip], &[Field::Mark])
            }),
            Map::Places => take(&Set::map(name, &[Field::Mark, Field::Mark], &[Field::Mark])),
            Map::Hairpin => take(&Set::new(name, &[ip, ip])),
            Map::ClusterCidrs | Map::NodePortAddresses => {
                take(&Set { interval: true, ..Set::new(name, &[ip]) })
            }
            Map::Restricted => take(&Set::new(name, &frontend)),
            Map::Allowed => {
                let key = [ip, Field::Protocol, Field::Port, ip];
                take(&Set { interval: true, ..Set::new(name, &key) })
            }
        }
    }
}

/// A chain of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Chain {
    /// Hooks.
    Prerouting,
    Output,
    Postrouting,
    /// Look-up of a frontend.
    Services(Family),
    NodePorts(Family),
    /// Chooses between the inside and the outside view.
    BySource(Family, Kind),
    /// Drops sources that may not use a restricted frontend.
    Sources(Family),
    Reject,
    /// Forwards to one of `size` endpoints.
    Forward(Forward),
}

/// What distinguishes two chains that forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Forward {
    pub(crate) family: Family,
    pub(crate) kind: Kind,
    pub(crate) view: View,
    pub(crate) masquerade: Masquerade,
    pub(crate) sticky_secs: Option<u32>,
    pub(crate) size: u32,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |family: &Family| if *family == Family::V4 { 4 } else { 6 };
        match self {
            Chain::Prerouting => write!(f, "prerouting"),
            Chain::Output => write!(f, "output"),
            Chain::Postrouting => write!(f, "postrouting"),
            Chain::Services(family) => write!(f, "find-service{}", number(family)),
            Chain::NodePorts(family) => write!(f, "find-node-port{}", number(family)),
            Chain::BySource(family, kind) => write!(f, "local-{}{}", kind.word(), number(family)),
            Chain::Sources(family) => write!(f, "check-source{}", number(family)),
            Chain::Reject => write!(f, "reject-all"),
            Chain::Forward(forward) => {
                write!(f, "{}{}", forward.kind.word(), number(&forward.family))?;
                if forward.view == View::Inside {
                    write!(f, "-inside")?;
                }
                match forward.masquerade {
                    Masquerade::Never => {}
                    Masquerade::UnlessPod => write!(f, "-hide-others")?,
                    Masquerade::Always => write!(f, "-hide")?,
                }
                if let Some(secs) = forward.sticky_secs {
                    write!(f, "-sticky{secs}")?;
                }
                write!(f, "-of-{}", forward.size)
            }
        }
    }
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Kind::Address => "service",
            Kind::NodePort => "node-port",
        }
    }
}

impl Chain {
    /// The chains that are always there.
    pub(crate) fn fixed() -> impl Iterator<Item = Chain> {
        let per_family = Family::BOTH.into_iter().flat_map(|family| {
            [
                Chain::Sources(family),
                Chain::BySource(family, Kind::Address),
                Chain::BySource(family, Kind::NodePort),
                Chain::NodePorts(family),
                Chain::Services(family),
            ]
        });
        // Those that refer to others come after them.
        std::iter::once(Chain::Reject).chain(per_family).chain([
            Chain::Prerouting,
            Chain::Output,
            Chain::Postrouting,
        ])
    }

    /// The chain of that name, if it is one of ours.
    pub(crate) fn parse(name: &str) -> Option<Chain> {
        if let Some(fixed) = Chain::fixed().find(|chain| chain.to_string() == name) {
            return Some(fixed);
        }
        let (rest, size) = name.rsplit_once("-of-")?;
        let size = size.parse().ok()?;
        let (rest, sticky_secs) = match rest.rsplit_once("-sticky") {
            Some((rest, secs)) => (rest, Some(secs.parse().ok()?)),
            None => (rest, None),
        };
        let (rest, masquerade) = if let Some(rest) = rest.strip_suffix("-hide-others") {
            (rest, Masquerade::UnlessPod)
        } else if let Some(rest) = rest.strip_suffix("-hide") {
            (rest, Masquerade::Always)
        } else {
            (rest, Masquerade::Never)
        };
        let (rest, view) = match rest.strip_suffix("-inside") {
            Some(rest) => (rest, View::Inside),
            None => (rest, View::Direct),
        };
        let (kind, family) = match rest {
            "service4" => (Kind::Address, Family::V4),
            "service6" => (Kind::Address, Family::V6),
            "node-port4" => (Kind::NodePort, Family::V4),
            "node-port6" => (Kind::NodePort, Family::V6),
            _ => return None,
        };
        Some(Chain::Forward(Forward { family, kind, view, masquerade, sticky_secs, size }))
    }

    pub(crate) fn base(self) -> Option<Base> {
        let (hook, priority) = match self {
            Chain::Prerouting => (Hook::Prerouting, PRIORITY_DNAT),
            Chain::Output => (Hook::Output, PRIORITY_DNAT),
            Chain::Postrouting => (Hook::Postrouting, PRIORITY_SNAT),
            _ => return None,
        };
        Some(Base { kind: ChainKind::Nat, hook, priority })
    }

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
