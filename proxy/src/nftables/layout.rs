//! The fixed part of the table: its maps and its chains. Pure.

mod rules;
mod setup;

use std::fmt;

use keelson_netlink::nft::{
    Base, Batch, ChainKind, Field, Hook, PRIORITY_DNAT, PRIORITY_SNAT, Set, Table,
};

use super::transaction::add_chain;
use crate::backend::BackendConfig;
use crate::model::{Family, Masquerade};
pub(crate) use rules::stamps_of;
pub(crate) use setup::{Role, Setup};

/// Changes whenever a table of an older version cannot be repaired but must be made anew.
pub(crate) const STAMP: &[u8] = b"keelson-proxy 1";

/// `filter`: where others expect packets to be filtered.
const PRIORITY_FILTER: i32 = 0;
/// After address translation, before routing.
const PRIORITY_DNAT_DONE: i32 = PRIORITY_DNAT + 10;
/// IPVS takes arriving packets at 98 and 99.
const PRIORITY_BEFORE_IPVS: i32 = 97;
const PRIORITY_AFTER_IPVS: i32 = 110;

/// More clients than this are not remembered; they are served all the same.
const AFFINITY_ENTRIES: u32 = 1 << 20;

/// Makes a table with everything that is ever used and removes it, all in one transaction: the kernel
/// checks it and nobody ever sees it.
pub(crate) fn trial(role: Role) -> Batch {
    const TRIAL: Table<'static> =
        Table { family: keelson_netlink::nft::Family::Inet, name: "keelson-proxy-trial" };
    let setup = Setup { role, config: BackendConfig::default() };
    let mut batch = Batch::new();
    batch.add_table(TRIAL);
    for family in Family::BOTH {
        Map::all(role).for_each(|map| map.describe(family, |set| batch.add_set(TRIAL, set)));
    }
    for chain in Chain::fixed(role) {
        add_chain(&mut batch, TRIAL, chain, &setup);
    }
    for family in Family::BOTH.into_iter().filter(|_| role != Role::IpvsFlows) {
        let forward = Forward {
            family,
            kind: Kind::Address,
            view: View::Direct,
            masquerade: Masquerade::UnlessPod,
            sticky_secs: Some(1),
            size: 2,
        };
        add_chain(&mut batch, TRIAL, Chain::Forward(forward), &setup);
        if role == Role::BesideIpvs {
            let chain = Chain::ToIpvs(family, Masquerade::UnlessPod);
            add_chain(&mut batch, TRIAL, chain, &setup);
        }
    }
    batch.delete_table(TRIAL);
    batch
}

/// What a frontend's key consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Address, protocol, port.
    Address,
    /// Protocol, port.
    NodePort,
    /// Protocol, port: a node port on 127.0.0.1, where IPVS serves the others.
    Loopback,
}

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
    /// The ranges that ClusterIPs come from.
    ServiceRanges,
    /// ClusterIPs: what is no frontend there is refused.
    ClusterIps,
    /// Frontends that only some sources may use.
    Restricted,
    /// Those sources.
    Allowed,
}

impl Map {
    pub(crate) fn all(role: Role) -> impl Iterator<Item = Map> {
        let per_kind = [Kind::Address, Kind::NodePort].into_iter().flat_map(|kind| {
            [
                Map::Frontends(kind),
                Map::Pools(kind, View::Direct),
                Map::Pools(kind, View::Inside),
                Map::Inside(kind),
                Map::Outside(kind),
            ]
        });
        let loopback = [Map::Frontends(Kind::Loopback), Map::Pools(Kind::Loopback, View::Direct)];
        let loopback = loopback.into_iter().filter(move |_| role == Role::BesideIpvs);
        let all = per_kind.chain(loopback).chain([
            Map::Endpoints,
            Map::Places,
            Map::Affinity,
            Map::Hairpin,
            Map::ClusterCidrs,
            Map::NodePortAddresses,
            Map::ServiceRanges,
            Map::ClusterIps,
            Map::Restricted,
            Map::Allowed,
        ]);
        all.filter(move |_| role != Role::IpvsFlows)
    }

    pub(crate) fn name(self, family: Family) -> &'static str {
        use Kind::{Address, Loopback, NodePort};
        use View::{Direct, Inside};
        let [v4, v6] = match self {
            Map::Frontends(Address) => ["services4", "services6"],
            Map::Frontends(NodePort) => ["node-ports4", "node-ports6"],
            Map::Frontends(Loopback) => ["loopback-ports4", "loopback-ports6"],
            Map::Pools(Loopback, _) => ["loopback-port-pools4", "loopback-port-pools6"],
            Map::Pools(Address, Direct) => ["service-pools4", "service-pools6"],
            Map::Pools(NodePort, Direct) => ["node-port-pools4", "node-port-pools6"],
            Map::Pools(Address, Inside) => ["service-inside-pools4", "service-inside-pools6"],
            Map::Pools(NodePort, Inside) => ["node-port-inside-pools4", "node-port-inside-pools6"],
            Map::Inside(Address) => ["service-inside4", "service-inside6"],
            Map::Inside(NodePort | Loopback) => ["node-port-inside4", "node-port-inside6"],
            Map::Outside(Address) => ["service-outside4", "service-outside6"],
            Map::Outside(NodePort | Loopback) => ["node-port-outside4", "node-port-outside6"],
            Map::Endpoints => ["endpoints4", "endpoints6"],
            Map::Affinity => ["affinity4", "affinity6"],
            Map::Places => ["affinity-places4", "affinity-places6"],
            Map::Hairpin => ["hairpin4", "hairpin6"],
            Map::ClusterCidrs => ["cluster-cidrs4", "cluster-cidrs6"],
            Map::NodePortAddresses => ["node-port-addresses4", "node-port-addresses6"],
            Map::ServiceRanges => ["service-ranges4", "service-ranges6"],
            Map::ClusterIps => ["cluster-ips4", "cluster-ips6"],
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
            Kind::NodePort | Kind::Loopback => &frontend[1..],
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
            Map::ClusterCidrs | Map::NodePortAddresses | Map::ServiceRanges => {
                take(&Set { interval: true, ..Set::new(name, &[ip]) })
            }
            Map::ClusterIps => take(&Set::new(name, &[ip])),
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
    /// Packets for this host: nobody outside reaches 127.0.0.1.
    Input,
    /// Packets that pass through: those that connection tracking cannot place end here.
    PassThrough,
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
    /// Lets the packet go on to IPVS, which chooses.
    ToIpvs(Family, Masquerade),
    /// Packets of connections that IPVS has.
    Flow(Flow),
}

/// Where packets of connections that IPVS has are touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Flow {
    /// Before routing: marks them, so that they are routed to this host.
    Arriving,
    /// Takes the mark away again.
    Arrived,
    /// What IPVS did not want, though it came for a Service's address.
    Unwanted,
    /// The node's own packets that IPVS sent to the node itself: routes them anew.
    Turning,
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
            Chain::Input => write!(f, "input"),
            Chain::PassThrough => write!(f, "forward"),
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
                write!(f, "{}", masquerade_suffix(forward.masquerade))?;
                if let Some(secs) = forward.sticky_secs {
                    write!(f, "-sticky{secs}")?;
                }
                write!(f, "-of-{}", forward.size)
            }
            Chain::Flow(Flow::Arriving) => write!(f, "to-ipvs"),
            Chain::Flow(Flow::Arrived) => write!(f, "before-ipvs"),
            Chain::Flow(Flow::Unwanted) => write!(f, "after-ipvs"),
            Chain::Flow(Flow::Turning) => write!(f, "to-this-node"),
            Chain::ToIpvs(family, masquerade) => {
                write!(f, "ipvs{}{}", number(family), masquerade_suffix(*masquerade))
            }
        }
    }
}

fn masquerade_suffix(masquerade: Masquerade) -> &'static str {
    match masquerade {
        Masquerade::Never => "",
        Masquerade::UnlessPod => "-hide-others",
        Masquerade::Always => "-hide",
    }
}

fn parse_masquerade(name: &str) -> (&str, Masquerade) {
    if let Some(rest) = name.strip_suffix("-hide-others") {
        (rest, Masquerade::UnlessPod)
    } else if let Some(rest) = name.strip_suffix("-hide") {
        (rest, Masquerade::Always)
    } else {
        (name, Masquerade::Never)
    }
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Kind::Address => "service",
            Kind::NodePort => "node-port",
            Kind::Loopback => "loopback-port",
        }
    }
}

impl Chain {
    /// The chains that are always there.
    pub(crate) fn fixed(role: Role) -> impl Iterator<Item = Chain> {
        let flows = [Flow::Arriving, Flow::Arrived, Flow::Unwanted, Flow::Turning];
        let flows = flows.into_iter().map(Chain::Flow).filter(move |_| role == Role::IpvsFlows);
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
        let services = per_family.chain([
            Chain::Prerouting,
            Chain::Output,
            Chain::Postrouting,
            Chain::Input,
            Chain::PassThrough,
        ]);
        let services = services.filter(move |_| role != Role::IpvsFlows);
        std::iter::once(Chain::Reject).chain(services).chain(flows)
    }

    /// The forwarding chains that most Services need: made along with the table, since a rule that is
    /// added later costs the kernel a walk over all maps.
    pub(crate) fn prepared(role: Role) -> impl Iterator<Item = Chain> {
        const SIZES: std::ops::RangeInclusive<u32> = 1..=16;
        const WHOLE: [(Kind, View, Masquerade); 7] = [
            (Kind::Address, View::Direct, Masquerade::UnlessPod),
            (Kind::Address, View::Direct, Masquerade::Always),
            (Kind::Address, View::Direct, Masquerade::Never),
            (Kind::Address, View::Inside, Masquerade::Never),
            (Kind::NodePort, View::Direct, Masquerade::Always),
            (Kind::NodePort, View::Direct, Masquerade::Never),
            (Kind::NodePort, View::Inside, Masquerade::Never),
        ];
        const BESIDE_IPVS: [(Kind, View, Masquerade); 3] = [
            (Kind::Loopback, View::Direct, Masquerade::Always),
            (Kind::Address, View::Inside, Masquerade::Never),
            (Kind::NodePort, View::Inside, Masquerade::Never),
        ];
        let shapes = match role {
            Role::Whole => &WHOLE[..],
            Role::BesideIpvs => &BESIDE_IPVS,
            Role::IpvsFlows => &[],
        };
        Family::BOTH.into_iter().flat_map(move |family| {
            shapes.iter().flat_map(move |(kind, view, masquerade)| {
                SIZES.map(move |size| {
                    Chain::Forward(Forward {
                        family,
                        kind: *kind,
                        view: *view,
                        masquerade: *masquerade,
                        sticky_secs: None,
                        size,
                    })
                })
            })
        })
    }

    /// The chain of that name, if it is one of ours.
    pub(crate) fn parse(name: &str) -> Option<Chain> {
        let mut fixed = [Role::Whole, Role::IpvsFlows].into_iter().flat_map(Chain::fixed);
        if let Some(fixed) = fixed.find(|chain| chain.to_string() == name) {
            return Some(fixed);
        }
        match parse_masquerade(name) {
            ("ipvs4", masquerade) => return Some(Chain::ToIpvs(Family::V4, masquerade)),
            ("ipvs6", masquerade) => return Some(Chain::ToIpvs(Family::V6, masquerade)),
            _ => {}
        }
        let (rest, size) = name.rsplit_once("-of-")?;
        let size = size.parse().ok()?;
        let (rest, sticky_secs) = match rest.rsplit_once("-sticky") {
            Some((rest, secs)) => (rest, Some(secs.parse().ok()?)),
            None => (rest, None),
        };
        let (rest, masquerade) = parse_masquerade(rest);
        let (rest, view) = match rest.strip_suffix("-inside") {
            Some(rest) => (rest, View::Inside),
            None => (rest, View::Direct),
        };
        let (kind, family) = match rest {
            "service4" => (Kind::Address, Family::V4),
            "service6" => (Kind::Address, Family::V6),
            "node-port4" => (Kind::NodePort, Family::V4),
            "node-port6" => (Kind::NodePort, Family::V6),
            "loopback-port4" => (Kind::Loopback, Family::V4),
            "loopback-port6" => (Kind::Loopback, Family::V6),
            _ => return None,
        };
        Some(Chain::Forward(Forward { family, kind, view, masquerade, sticky_secs, size }))
    }

    pub(crate) fn base(self) -> Option<Base> {
        let (kind, hook, priority) = match self {
            Chain::Prerouting => (ChainKind::Nat, Hook::Prerouting, PRIORITY_DNAT),
            Chain::Output => (ChainKind::Nat, Hook::Output, PRIORITY_DNAT),
            Chain::Postrouting => (ChainKind::Nat, Hook::Postrouting, PRIORITY_SNAT),
            Chain::Input => (ChainKind::Filter, Hook::Input, PRIORITY_FILTER),
            Chain::PassThrough => (ChainKind::Filter, Hook::Forward, PRIORITY_FILTER),
            Chain::Flow(flow) => match flow {
                Flow::Arriving => (ChainKind::Filter, Hook::Prerouting, PRIORITY_DNAT_DONE),
                Flow::Arrived => (ChainKind::Filter, Hook::Input, PRIORITY_BEFORE_IPVS),
                Flow::Unwanted => (ChainKind::Filter, Hook::Input, PRIORITY_AFTER_IPVS),
                Flow::Turning => (ChainKind::Route, Hook::Output, PRIORITY_DNAT_DONE),
            },
            _ => return None,
        };
        Some(Base { kind, hook, priority })
    }
}
