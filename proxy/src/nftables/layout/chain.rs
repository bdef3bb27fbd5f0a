//! The chains by name: which there are, and where packets enter them. Pure.

use std::fmt;

use keelson_netlink::nft::{Base, ChainKind, Hook, PRIORITY_DNAT, PRIORITY_SNAT};

use super::{Kind, Role, View};
use crate::model::{Family, Masquerade};

/// `filter`: where others expect packets to be filtered.
const PRIORITY_FILTER: i32 = 0;
/// After address translation, before routing.
const PRIORITY_DNAT_DONE: i32 = PRIORITY_DNAT + 10;
/// IPVS takes arriving packets at 98 and 99.
const PRIORITY_BEFORE_IPVS: i32 = 97;
const PRIORITY_AFTER_IPVS: i32 = 110;

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
    /// Forwards a client to the endpoint that is remembered for it, or lets the packet go on to IPVS.
    StickOrToIpvs(Sticky),
    /// Hooks of packets for which IPVS has chosen, on their way out and in.
    ChosenOutside,
    ChosenHere,
    /// Remembers what IPVS has chosen for a client that sticks.
    Remember(Sticky),
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

/// What distinguishes two chains for clients that stick to what IPVS has chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Sticky {
    pub(crate) family: Family,
    pub(crate) kind: Kind,
    /// Means nothing to those that remember.
    pub(crate) masquerade: Masquerade,
    pub(crate) secs: u32,
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
            Chain::ChosenOutside => write!(f, "chosen-outside"),
            Chain::ChosenHere => write!(f, "chosen-here"),
            Chain::StickOrToIpvs(sticky) => {
                write!(f, "ipvs{sticky}{}", masquerade_suffix(sticky.masquerade))
            }
            Chain::Remember(sticky) => write!(f, "remember{sticky}"),
            Chain::ToIpvs(family, masquerade) => {
                write!(f, "ipvs{}{}", number(family), masquerade_suffix(*masquerade))
            }
        }
    }
}

impl fmt::Display for Sticky {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = if self.family == Family::V4 { 4 } else { 6 };
        write!(f, "{number}-{}-sticky{}", self.kind.word(), self.secs)
    }
}

impl Sticky {
    /// From what is behind the first word of a chain's name.
    fn parse(text: &str) -> Option<Sticky> {
        let (text, masquerade) = parse_masquerade(text);
        let (text, secs) = text.rsplit_once("-sticky")?;
        let (family, kind) = match text {
            "4-service" => (Family::V4, Kind::Address),
            "6-service" => (Family::V6, Kind::Address),
            "4-node-port" => (Family::V4, Kind::NodePort),
            "6-node-port" => (Family::V6, Kind::NodePort),
            _ => return None,
        };
        Some(Sticky { family, kind, masquerade, secs: secs.parse().ok()? })
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
        let chosen = [Chain::ChosenOutside, Chain::ChosenHere].into_iter();
        let chosen = chosen.filter(move |_| role == Role::BesideIpvs);
        std::iter::once(Chain::Reject).chain(services).chain(chosen).chain(flows)
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
        let mut fixed = [Role::BesideIpvs, Role::IpvsFlows].into_iter().flat_map(Chain::fixed);
        if let Some(fixed) = fixed.find(|chain| chain.to_string() == name) {
            return Some(fixed);
        }
        match parse_masquerade(name) {
            ("ipvs4", masquerade) => return Some(Chain::ToIpvs(Family::V4, masquerade)),
            ("ipvs6", masquerade) => return Some(Chain::ToIpvs(Family::V6, masquerade)),
            _ => {}
        }
        let sticky = |word| name.strip_prefix(word).and_then(Sticky::parse);
        if let Some(sticky) = sticky("ipvs") {
            return Some(Chain::StickOrToIpvs(sticky));
        }
        if let Some(sticky) = sticky("remember") {
            return Some(Chain::Remember(sticky));
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
            Chain::ChosenOutside => (ChainKind::Filter, Hook::Postrouting, PRIORITY_SNAT - 10),
            Chain::ChosenHere => (ChainKind::Filter, Hook::Input, PRIORITY_AFTER_IPVS),
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
