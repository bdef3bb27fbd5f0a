//! How packets for Services reach IPVS: it only works on those that are delivered to this host.
//!
//! ```text
//! 64: from all iif lo goto 66          what the node sends itself is not concerned: IPVS sees it anyhow
//! 65: from all fwmark 0x2000/0x2000 lookup 27493
//! 66: from all nop
//! table 27493: local default dev lo
//! ```
//!
//! So no address of a Service is put on an interface. The first rule also keeps the look-up of the way back, which the
//! kernel makes for each source address, away from the table.

use ipnetwork::IpNetwork;
use keelson_netlink::route::{Route, RouteKind, RoutingRule, Rtnl, RuleAction, Scope};
use keelson_netlink::socket::NetlinkError;

const TABLE: u32 = 27_493;
/// After the table of local addresses, before what others add.
const PRIORITY: u32 = 64;
/// Marks what is ours (`RTPROT_*`); others have no such number.
const PROTOCOL: u8 = 107;
const LOOPBACK: u32 = 1;
const HOST_SCOPE: u8 = 254;

/// IPv4, and IPv6 where the kernel has it.
type Families = &'static [bool];

fn families(rules: &[RoutingRule]) -> Families {
    // Without IPv6 there are no rules for it, else some come with it.
    if rules.iter().any(|rule| rule.ipv6) { &[false, true] } else { &[false] }
}

fn rules(bit: u32, families: Families) -> Vec<RoutingRule> {
    let of_family = |ipv6| {
        let rule = |offset, mark, input: Option<&str>, action| RoutingRule {
            ipv6,
            priority: PRIORITY + offset,
            mark,
            input: input.map(str::to_owned),
            protocol: PROTOCOL,
            action,
        };
        [
            rule(0, None, Some("lo"), RuleAction::Goto(PRIORITY + 2)),
            rule(1, Some((bit, bit)), None, RuleAction::Table(TABLE)),
            rule(2, None, None, RuleAction::Nothing),
        ]
    };
    families.iter().copied().flat_map(of_family).collect()
}

fn routes(families: Families) -> Vec<Route> {
    let all = ["0.0.0.0/0", "::/0"].into_iter().filter_map(|all| all.parse::<IpNetwork>().ok());
    let all = all.filter(|all| families.contains(&all.is_ipv6()));
    all.map(|all| Route {
        link: Some(LOOPBACK),
        kind: RouteKind::Local,
        table: TABLE,
        protocol: PROTOCOL,
        scope: if all.is_ipv4() { Scope::Other(HOST_SCOPE) } else { Scope::Universe },
        ..Route::to(all)
    })
    .collect()
}

/// What of rules and routes is missing, and what is there in vain.
#[derive(Debug, Default)]
pub(crate) struct Gaps {
    missing_routes: Vec<Route>,
    missing_rules: Vec<RoutingRule>,
    foreign_rules: Vec<RoutingRule>,
}

impl Gaps {
    pub(crate) fn find(rtnl: &mut Rtnl, bit: u32) -> Result<Gaps, NetlinkError> {
        let same = |a: &Route, b: &Route| {
            (a.destination, a.link, a.kind) == (b.destination, b.link, b.kind)
        };
        let all = rtnl.rules()?;
        let families = families(&all);
        let found = rtnl.routes_of(TABLE)?;
        let missing_routes = routes(families)
            .into_iter()
            .filter(|route| !found.iter().any(|f| same(f, route)))
            .collect();
        let found: Vec<RoutingRule> =
            all.into_iter().filter(|rule| rule.protocol == PROTOCOL).collect();
        let wanted = rules(bit, families);
        Ok(Gaps {
            missing_routes,
            missing_rules: wanted.iter().filter(|rule| !found.contains(rule)).cloned().collect(),
            foreign_rules: found.into_iter().filter(|rule| !wanted.contains(rule)).collect(),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.missing_routes.len() + self.missing_rules.len() + self.foreign_rules.len()
    }

    /// Closes them: the table before the rules that lead there, the rule that others go to first.
    pub(crate) fn close(&self, rtnl: &mut Rtnl) -> Result<(), NetlinkError> {
        for route in &self.missing_routes {
            rtnl.ensure_route(route)?;
        }
        for rule in &self.foreign_rules {
            rtnl.delete_rule(rule)?;
        }
        for rule in self.missing_rules.iter().rev() {
            rtnl.add_rule(rule)?;
        }
        Ok(())
    }
}

/// Removes what is ours.
pub(crate) fn remove(rtnl: &mut Rtnl) -> Result<(), NetlinkError> {
    for rule in rtnl.rules()?.iter().filter(|rule| rule.protocol == PROTOCOL) {
        rtnl.delete_rule(rule)?;
    }
    for route in rtnl.routes_of(TABLE)?.iter().filter(|route| route.protocol == PROTOCOL) {
        rtnl.delete_route(route)?;
    }
    Ok(())
}
