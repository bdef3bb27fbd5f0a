//! Routes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use libc::{
    NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, RTA_DST, RTA_GATEWAY, RTA_METRICS, RTA_OIF,
    RTA_PREFSRC, RTA_PRIORITY, RTA_TABLE, RTM_DELROUTE, RTM_GETROUTE, RTM_NEWROUTE,
};

use nix::errno::Errno;

use super::{AF_INET, AF_INET6, Rtnl, created, existed, family, ip, octets};
use crate::message::{Message, Reply, u32_at};
use crate::socket::NetlinkError;

/// The length of `struct rtmsg`.
const HEADER: usize = 12;
const RTAX_MTU: u16 = 2;
/// `RTNH_F_ONLINK`.
const ONLINK: u32 = 4;
const RTM_F_CLONED: u32 = 0x200;
const RTM_F_LOOKUP_TABLE: u32 = 0x1000;
const RTM_F_FIB_MATCH: u32 = 0x2000;

/// What happens to packets on a route (`RTN_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RouteKind {
    /// Delivered to a neighbour or gateway.
    #[default]
    Unicast,
    /// Ours.
    Local,
    /// Dropped silently.
    Blackhole,
    /// Refused with "no route to host".
    Unreachable,
    /// Anything else, by the kernel's number.
    Other(u8),
}

impl RouteKind {
    fn number(self) -> u8 {
        match self {
            Self::Unicast => 1,
            Self::Local => 2,
            Self::Blackhole => 6,
            Self::Unreachable => 7,
            Self::Other(number) => number,
        }
    }

    fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Unicast,
            2 => Self::Local,
            6 => Self::Blackhole,
            7 => Self::Unreachable,
            other => Self::Other(other),
        }
    }
}

/// How far away a route's destination is (`RT_SCOPE_*`); IPv6 ignores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scope {
    /// Behind a gateway.
    #[default]
    Universe,
    /// On the link.
    Link,
    /// Anything else, by the kernel's number.
    Other(u8),
}

impl Scope {
    fn number(self) -> u8 {
        match self {
            Self::Universe => 0,
            Self::Link => 253,
            Self::Other(number) => number,
        }
    }

    fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Universe,
            253 => Self::Link,
            other => Self::Other(other),
        }
    }
}

/// A route. `Route::to` fills in what is usual; set the other fields as needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where to; a prefix of length 0 is the default route.
    pub destination: IpNetwork,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The outgoing link.
    pub link: Option<u32>,
    /// Believe that the gateway is on the link although no address of ours says so.
    pub onlink: bool,
    /// The source address for our own packets.
    pub source: Option<IpAddr>,
    /// The table; 254 is main.
    pub table: u32,
    /// Who made it (`RTPROT_*`): 3 boot, 4 static; pick a number of your own to recognise your routes.
    pub protocol: u8,
    /// Distance.
    pub scope: Scope,
    /// What happens to packets.
    pub kind: RouteKind,
    /// Metric; IPv6 shows 1024 where none was given.
    pub priority: Option<u32>,
    /// Path MTU.
    pub mtu: Option<u32>,
}

impl Route {
    /// A unicast route in the main table.
    #[must_use]
    pub fn to(destination: IpNetwork) -> Self {
        Self {
            destination,
            gateway: None,
            link: None,
            onlink: false,
            source: None,
            table: 254,
            protocol: 4,
            scope: Scope::Universe,
            kind: RouteKind::Unicast,
            priority: None,
            mtu: None,
        }
    }

    /// The route to one address straight over a link.
    #[must_use]
    pub fn host(address: IpAddr, link: u32) -> Self {
        Self { link: Some(link), scope: Scope::Link, ..Self::to(IpNetwork::from(address)) }
    }

    /// The default route of `gateway`'s family.
    #[must_use]
    pub fn default_via(gateway: IpAddr, link: u32) -> Self {
        let any = match gateway {
            IpAddr::V4(_) => IpNetwork::new(Ipv4Addr::UNSPECIFIED.into(), 0),
            IpAddr::V6(_) => IpNetwork::new(Ipv6Addr::UNSPECIFIED.into(), 0),
        };
        // A prefix of 0 is valid for either family.
        let any = any.unwrap_or_else(|_| IpNetwork::from(gateway));
        Self { gateway: Some(gateway), link: Some(link), ..Self::to(any) }
    }

    pub(crate) fn parse(reply: &Reply<'_>) -> Option<Self> {
        let header = &reply.payload;
        let attrs = reply.attrs(HEADER);
        let family = *header.first()?;
        let any: IpAddr = match family {
            AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => Ipv4Addr::UNSPECIFIED.into(),
        };
        let flags = u32_at(header, 8)?;
        if flags & RTM_F_CLONED != 0 {
            return None;
        }
        let destination = attrs.find(RTA_DST).map_or(Some(any), ip)?;
        Some(Self {
            destination: IpNetwork::new(destination, *header.get(1)?).ok()?,
            gateway: attrs.find(RTA_GATEWAY).and_then(ip),
            link: attrs.u32(RTA_OIF),
            onlink: flags & ONLINK != 0,
            source: attrs.find(RTA_PREFSRC).and_then(ip),
            table: attrs.u32(RTA_TABLE).or_else(|| header.get(4).copied().map(u32::from))?,
            protocol: *header.get(5)?,
            scope: Scope::from_number(*header.get(6)?),
            kind: RouteKind::from_number(*header.get(7)?),
            priority: attrs.u32(RTA_PRIORITY),
            mtu: attrs.nested(RTA_METRICS).and_then(|metrics| metrics.u32(RTAX_MTU)),
        })
    }
}

/// What to do when the route exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Create,
    Replace,
    Delete,
}

fn message(route: &Route, action: Action) -> Message {
    let (kind, flags) = match action {
        Action::Create => (RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL),
        Action::Replace => (RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE),
        Action::Delete => (RTM_DELROUTE, 0),
    };
    let mut header = [0; HEADER];
    header[0] = family(route.destination.ip());
    header[1] = route.destination.prefix();
    // Tables above 255 travel in the attribute only (RT_TABLE_COMPAT).
    header[4] = u8::try_from(route.table).unwrap_or(252);
    header[5] = route.protocol;
    header[6] = route.scope.number();
    header[7] = route.kind.number();
    let link_flags = if route.onlink { ONLINK } else { 0 };
    header[8..12].copy_from_slice(&link_flags.to_ne_bytes());
    let mut message = Message::new(kind, flags as u16, &header);
    put_attributes(&mut message, route);
    message
}

fn put_attributes(message: &mut Message, route: &Route) {
    if route.destination.prefix() > 0 {
        message.attr(RTA_DST, &octets(route.destination.network()).1);
    }
    if let Some(gateway) = route.gateway {
        message.attr(RTA_GATEWAY, &octets(gateway).1);
    }
    if let Some(link) = route.link {
        message.attr_u32(RTA_OIF, link);
    }
    if let Some(source) = route.source {
        message.attr(RTA_PREFSRC, &octets(source).1);
    }
    if let Some(priority) = route.priority {
        message.attr_u32(RTA_PRIORITY, priority);
    }
    if let Some(mtu) = route.mtu {
        message.nest_exact(RTA_METRICS, |metrics| {
            metrics.attr_u32(RTAX_MTU, mtu);
        });
    }
    message.attr_u32(RTA_TABLE, route.table);
}

/// Adds a route; refused with `EEXIST` when there is one to the same destination with the same metric.
#[must_use]
pub fn new_route_message(route: &Route) -> Message {
    message(route, Action::Create)
}

/// Sets a route, replacing one to the same destination with the same metric.
#[must_use]
pub fn route_message(route: &Route) -> Message {
    message(route, Action::Replace)
}

impl Rtnl {
    /// The routes of all tables, both families; local and multicast ones included.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn routes(&mut self) -> Result<Vec<Route>, NetlinkError> {
        let replies = self.socket.dump(&Message::new(RTM_GETROUTE, 0, &[0; HEADER]))?;
        Ok(replies.iter().filter_map(Route::parse).collect())
    }

    /// The routes of one table, both families.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn routes_of(&mut self, table: u32) -> Result<Vec<Route>, NetlinkError> {
        let mut routes = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let mut header = [0; HEADER];
            header[0] = family;
            let mut message = Message::new(RTM_GETROUTE, 0, &header);
            message.attr_u32(RTA_TABLE, table);
            match self.socket.dump(&message) {
                Ok(replies) => routes.extend(replies.iter().filter_map(Route::parse)),
                // There is no such table as long as it is empty, or no such family.
                Err(error) if error.is_absent() => {}
                Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(routes)
    }

    /// The route that a packet to `address` would take, as it stands in the table; `None` when there is none.
    ///
    /// # Errors
    /// When the kernel refuses the question.
    pub fn route_to(&mut self, address: IpAddr) -> Result<Option<Route>, NetlinkError> {
        let mut header = [0; HEADER];
        header[0] = family(address);
        header[1] = if address.is_ipv4() { 32 } else { 128 };
        // IPv6 answers with the table anyhow, and refuses to be asked for it.
        let table = if address.is_ipv4() { RTM_F_LOOKUP_TABLE } else { 0 };
        header[8..12].copy_from_slice(&(table | RTM_F_FIB_MATCH).to_ne_bytes());
        let mut message = Message::new(RTM_GETROUTE, 0, &header);
        message.attr(RTA_DST, &octets(address).1);
        match self.socket.ask(message) {
            Ok(reply) => Ok(Route::parse(&reply)),
            Err(error) => match error.errno() {
                // No route, an unreachable one, or a forbidding one.
                Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES) => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// Adds a route. Answers whether it is new.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn add_route(&mut self, route: &Route) -> Result<bool, NetlinkError> {
        created(self.perform(message(route, Action::Create)))
    }

    /// Sets a route, replacing one to the same destination with the same metric.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn ensure_route(&mut self, route: &Route) -> Result<(), NetlinkError> {
        self.perform(route_message(route))
    }

    /// Deletes a route. Answers whether it was there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn delete_route(&mut self, route: &Route) -> Result<bool, NetlinkError> {
        existed(self.perform(message(route, Action::Delete)))
    }
}
