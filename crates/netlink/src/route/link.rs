//! Links: veth pairs, changes, dumps.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{
    IFLA_ADDRESS, IFLA_AF_SPEC, IFLA_IFALIAS, IFLA_IFNAME, IFLA_INFO_DATA, IFLA_INFO_KIND,
    IFLA_LINK, IFLA_LINK_NETNSID, IFLA_LINKINFO, IFLA_MASTER, IFLA_MTU, IFLA_NET_NS_FD,
    NLM_F_CREATE, NLM_F_EXCL, RTM_DELLINK, RTM_GETLINK, RTM_NEWLINK,
};

use super::{AF_INET, AF_INET6, Rtnl, existed};
use crate::message::{Message, Reply, u32_at};
use crate::socket::NetlinkError;

/// The length of `struct ifinfomsg`.
const HEADER: usize = 16;
const VETH_INFO_PEER: u16 = 1;
const IFLA_INET_CONF: u16 = 1;
/// 0 makes an address from the hardware address, 1 makes none.
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const CREATE: u16 = (NLM_F_CREATE | NLM_F_EXCL) as u16;
const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
const IFF_RUNNING: u32 = 0x40;

/// A hardware address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a hardware address such as 02:00:00:00:00:01");
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

/// A link as the kernel describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// The interface index.
    pub index: u32,
    /// The name.
    pub name: String,
    /// The hardware address, if it has one of six bytes.
    pub mac: Option<Mac>,
    /// Largest packet.
    pub mtu: u32,
    /// Set up by someone.
    pub up: bool,
    /// Up and with a carrier.
    pub running: bool,
    /// Whether this is `lo`.
    pub loopback: bool,
    /// `veth`, `bridge` and so on; `None` for hardware and `lo`.
    pub kind: Option<String>,
    /// The alias text.
    pub alias: Option<String>,
    /// The other end of a veth pair, or the lower device: an index in the namespace of `peer_netns`.
    pub peer: Option<u32>,
    /// The number by which our namespace knows the other end's; `None` when it is the same one.
    pub peer_netns: Option<i32>,
    /// The bridge or bond that it is a port of.
    pub master: Option<u32>,
}

impl Link {
    pub(crate) fn parse(reply: &Reply<'_>) -> Option<Self> {
        let index = u32_at(&reply.payload, 4)?;
        let flags = u32_at(&reply.payload, 8)?;
        let attrs = reply.attrs(HEADER);
        let mac = attrs.find(IFLA_ADDRESS).and_then(|bytes| bytes.try_into().ok()).map(Mac);
        Some(Self {
            index,
            name: attrs.text(IFLA_IFNAME)?,
            mac,
            mtu: attrs.u32(IFLA_MTU).unwrap_or_default(),
            up: flags & IFF_UP != 0,
            running: flags & IFF_RUNNING != 0,
            loopback: flags & IFF_LOOPBACK != 0,
            kind: attrs.nested(IFLA_LINKINFO).and_then(|info| info.text(IFLA_INFO_KIND)),
            alias: attrs.text(IFLA_IFALIAS),
            peer: attrs.u32(IFLA_LINK),
            peer_netns: attrs.u32(IFLA_LINK_NETNSID).map(u32::cast_signed),
            master: attrs.u32(IFLA_MASTER),
        })
    }

    pub(super) fn from_event(reply: &Reply<'_>) -> Option<(Self, bool)> {
        match reply.kind {
            RTM_NEWLINK => Some((Self::parse(reply)?, true)),
            RTM_DELLINK => Some((Self::parse(reply)?, false)),
            _ => None,
        }
    }
}

/// How a request names a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkRef<'a> {
    /// By index.
    Index(u32),
    /// By name.
    Name(&'a str),
}

impl LinkRef<'_> {
    fn index(self) -> u32 {
        match self {
            Self::Index(index) => index,
            Self::Name(_) => 0,
        }
    }

    fn put_name(self, message: &mut Message) {
        if let Self::Name(name) = self {
            message.attr_text(IFLA_IFNAME, name);
        }
    }
}

impl From<u32> for LinkRef<'_> {
    fn from(index: u32) -> Self {
        Self::Index(index)
    }
}

impl<'a> From<&'a str> for LinkRef<'a> {
    fn from(name: &'a str) -> Self {
        Self::Name(name)
    }
}

/// One end of a veth pair to make.
#[derive(Debug, Clone, Copy)]
pub struct VethEnd<'a> {
    /// The name, which must be free in its namespace.
    pub name: &'a str,
    /// The hardware address; random if `None`.
    pub mac: Option<Mac>,
    /// The namespace to be made in; the socket's own if `None`.
    pub netns: Option<BorrowedFd<'a>>,
}

/// A veth pair to make, both ends straight in their namespaces under their final names.
#[derive(Debug, Clone, Copy)]
pub struct VethPair<'a> {
    /// The end that the request names. It may be set up at once.
    pub near: VethEnd<'a>,
    /// The other end. The kernel cannot set it up while it makes it.
    pub far: VethEnd<'a>,
    /// Largest packet, for both.
    pub mtu: Option<u32>,
}

impl VethEnd<'_> {
    fn put(&self, message: &mut Message, mtu: Option<u32>) {
        message.attr_text(IFLA_IFNAME, self.name);
        if let Some(mac) = self.mac {
            message.attr(IFLA_ADDRESS, &mac.0);
        }
        if let Some(mtu) = mtu {
            message.attr_u32(IFLA_MTU, mtu);
        }
        if let Some(netns) = self.netns {
            message.attr(IFLA_NET_NS_FD, &netns.as_raw_fd().to_ne_bytes());
        }
    }
}

/// An IPv4 setting of one link (`/proc/sys/net/ipv4/conf/LINK/...`), which rtnetlink sets without a file.
/// The numbers are the kernel's `IPV4_DEVCONF_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum InetSetting {
    /// Forward packets that arrive here.
    Forwarding = 1,
    /// Answer ARP for addresses that we route elsewhere.
    ProxyArp = 3,
    /// Obey redirects.
    AcceptRedirects = 4,
    /// Send redirects.
    SendRedirects = 6,
    /// 0 off, 1 strict, 2 loose.
    RpFilter = 8,
    /// Route packets from and to 127/8 here.
    RouteLocalnet = 26,
}

/// What to change on a link; `None` leaves a field alone.
#[derive(Debug, Clone, Default)]
pub struct LinkChange<'a> {
    /// Up or down.
    pub up: Option<bool>,
    /// New name (only while down on old kernels).
    pub name: Option<&'a str>,
    /// Hardware address.
    pub mac: Option<Mac>,
    /// Largest packet.
    pub mtu: Option<u32>,
    /// Alias text.
    pub alias: Option<&'a str>,
    /// Bridge to join; `Some(0)` leaves it.
    pub master: Option<u32>,
    /// IPv4 settings.
    pub inet: &'a [(InetSetting, u32)],
    /// Give the link an IPv6 link-local address of its own when it comes up (the kernel's default) or not.
    pub link_local: Option<bool>,
}

pub(super) fn header(index: u32, flags: u32, mask: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&mask.to_ne_bytes());
    bytes
}

/// Makes a veth pair whose near end is up at once.
#[must_use]
pub fn veth_message(pair: &VethPair<'_>) -> Message {
    let mut message = Message::new(RTM_NEWLINK, CREATE, &header(0, IFF_UP, IFF_UP));
    pair.near.put(&mut message, pair.mtu);
    message.nest(IFLA_LINKINFO, |info| {
        info.attr(IFLA_INFO_KIND, b"veth");
        info.nest(IFLA_INFO_DATA, |data| {
            data.nest(VETH_INFO_PEER, |peer| {
                peer.raw(&header(0, 0, 0));
                pair.far.put(peer, pair.mtu);
            });
        });
    });
    message
}

/// Changes a link.
#[must_use]
pub fn link_change_message<'a>(link: impl Into<LinkRef<'a>>, change: &LinkChange<'_>) -> Message {
    let link = link.into();
    let (flags, mask) = match change.up {
        None => (0, 0),
        Some(up) => (if up { IFF_UP } else { 0 }, IFF_UP),
    };
    let mut message = Message::new(RTM_NEWLINK, 0, &header(link.index(), flags, mask));
    match (link, change.name) {
        (_, Some(name)) => drop(message.attr_text(IFLA_IFNAME, name)),
        (by_name, None) => by_name.put_name(&mut message),
    }
    if let Some(mac) = change.mac {
        message.attr(IFLA_ADDRESS, &mac.0);
    }
    if let Some(mtu) = change.mtu {
        message.attr_u32(IFLA_MTU, mtu);
    }
    if let Some(alias) = change.alias {
        message.attr(IFLA_IFALIAS, alias.as_bytes());
    }
    if let Some(master) = change.master {
        message.attr_u32(IFLA_MASTER, master);
    }
    if !change.inet.is_empty() || change.link_local.is_some() {
        message.nest(IFLA_AF_SPEC, |families| put_families(families, change));
    }
    message
}

fn put_families(families: &mut Message, change: &LinkChange<'_>) {
    if !change.inet.is_empty() {
        families.nest(u16::from(AF_INET), |inet| {
            inet.nest(IFLA_INET_CONF, |settings| {
                for (setting, value) in change.inet {
                    settings.attr_u32(*setting as u16, *value);
                }
            });
        });
    }
    if let Some(wanted) = change.link_local {
        families.nest(u16::from(AF_INET6), |inet6| {
            inet6.attr(IFLA_INET6_ADDR_GEN_MODE, &[u8::from(!wanted)]);
        });
    }
}

impl Rtnl {
    /// All links.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let replies = self.socket.dump(&Message::new(RTM_GETLINK, 0, &header(0, 0, 0)))?;
        Ok(replies.iter().filter_map(Link::parse).collect())
    }

    /// One link, `None` if there is none of that name or index.
    ///
    /// # Errors
    /// When the kernel refuses the question.
    pub fn link<'a>(&mut self, link: impl Into<LinkRef<'a>>) -> Result<Option<Link>, NetlinkError> {
        let link = link.into();
        let mut message = Message::new(RTM_GETLINK, 0, &header(link.index(), 0, 0));
        link.put_name(&mut message);
        match self.socket.ask(message) {
            Ok(reply) => Ok(Link::parse(&reply)),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a veth pair; the near end is up at once, the far end is not.
    ///
    /// # Errors
    /// `EEXIST` when a name is taken.
    pub fn create_veth(&mut self, pair: &VethPair<'_>) -> Result<(), NetlinkError> {
        self.perform(veth_message(pair))
    }

    /// Makes a bridge and sets it up.
    ///
    /// # Errors
    /// `EEXIST` when the name is taken.
    pub fn create_bridge(&mut self, name: &str) -> Result<(), NetlinkError> {
        let mut message = Message::new(RTM_NEWLINK, CREATE, &header(0, IFF_UP, IFF_UP));
        message.attr_text(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
            info.attr(IFLA_INFO_KIND, b"bridge");
        });
        self.perform(message)
    }

    /// Changes a link.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn change_link<'a>(
        &mut self,
        link: impl Into<LinkRef<'a>>,
        change: &LinkChange<'_>,
    ) -> Result<(), NetlinkError> {
        self.perform(link_change_message(link, change))
    }

    /// Sets a link up.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn set_up<'a>(&mut self, link: impl Into<LinkRef<'a>>) -> Result<(), NetlinkError> {
        self.change_link(link, &LinkChange { up: Some(true), ..LinkChange::default() })
    }

    /// Deletes a link (a veth takes its other end along). Answers whether it was there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn delete_link<'a>(&mut self, link: impl Into<LinkRef<'a>>) -> Result<bool, NetlinkError> {
        let link = link.into();
        let mut message = Message::new(RTM_DELLINK, 0, &header(link.index(), 0, 0));
        link.put_name(&mut message);
        existed(self.perform(message))
    }
}
