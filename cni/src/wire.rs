//! One pod's link: a veth pair with a route on each side and no bridge.
//!
//! ```text
//!   pod                                     node
//!   eth0  10.244.0.7/32, fd44::7/128        keel3f9a...  fe80::1/128
//!         default via 169.254.1.1 onlink         10.244.0.7/32  dev keel3f9a...
//!         default via fe80::1                    fd44::7/128    dev keel3f9a...
//!         169.254.1.1, fe80::1 -> host MAC       both           -> pod MAC
//! ```
//!
//! The neighbours are permanent, so neither side ever asks; the node answers for the gateways all the same (proxy ARP and
//! the address fe80::1), for pods that clear their tables. The alias of the host side is set last: a link without it was
//! left by a process that died.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use ipnetwork::IpNetwork;
use keelson_netlink::message::Message;
use keelson_netlink::netns::Netns;
use keelson_netlink::route::{
    InetSetting, Link, LinkChange, OpenError, Route, Rtnl, Scope, VethEnd, VethPair,
    address_message, link_change_message, neighbour_message, new_route_message, route_message,
    veth_message,
};
use keelson_netlink::socket::NetlinkError;

use crate::names::Names;

/// The IPv4 gateway that pods see.
pub const GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
/// The IPv6 gateway that pods see.
pub const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
/// The protocol number of our routes (`ip route` shows it as a number; 107 is "k" and unassigned in rt_protos).
pub const ROUTE_PROTOCOL: u8 = 107;

/// Position of the interface in the pod.
const LOOPBACK: u32 = 1;

/// Why a link could not be made, unmade or looked at.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The pod has an interface of that name.
    #[error("interface {ifname} exists already in the pod's network namespace")]
    InterfaceExists {
        /// Its name.
        ifname: String,
    },
    /// The name that our side must have is taken by something that is not ours.
    #[error("interface {name} exists on this node and is not keelson's")]
    HostNameTaken {
        /// The name.
        name: String,
    },
    /// The kernel refused.
    #[error("cannot {step}")]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// Why.
        #[source]
        source: NetlinkError,
    },
    /// The pod's namespace cannot be used.
    #[error(transparent)]
    Pod(#[from] OpenError),
    /// The link went away while it was being set up.
    #[error("interface {name} vanished while it was set up")]
    Vanished {
        /// The name.
        name: String,
    },
}

fn refused(step: &'static str) -> impl Fn(NetlinkError) -> WireError {
    move |source| WireError::Kernel { step, source }
}

/// A link to make or to check.
#[derive(Debug)]
pub struct Wire<'a> {
    /// Names and hardware addresses.
    pub names: &'a Names,
    /// The interface's name in the pod.
    pub ifname: &'a str,
    /// The pod's addresses, at most one of each family.
    pub ips: &'a [IpAddr],
    /// Largest packet.
    pub mtu: u32,
    /// Where pods are; reached through this link even when another one holds the default route.
    pub cluster: &'a [IpNetwork],
    /// The node may call the pod's ports on 127.0.0.1.
    pub from_loopback: bool,
}

/// Where a pod's interface leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leads {
    /// Everywhere: it holds the default routes.
    Everywhere,
    /// To the ranges of the cluster only: another interface was first.
    ToCluster,
}

impl Wire<'_> {
    /// Makes the pair and everything on it. On failure the caller deletes the host side, which takes all along.
    ///
    /// # Errors
    /// What was refused.
    pub fn attach(&self, node: &mut Rtnl, pod: &Netns) -> Result<Leads, WireError> {
        let mut inside = Rtnl::open_in(pod)?;
        self.make_pair(node, &mut inside, pod)?;
        let host = self.host_link(node)?;
        let pod_index = host.peer.unwrap_or_default();
        let leads = self.set_up_pod(&mut inside, pod_index)?;
        node.perform_all(self.host_messages(host.index))
            .map_err(refused("set up the host side"))?;
        let done = LinkChange { alias: Some(&self.names.alias), ..LinkChange::default() };
        node.change_link(host.index, &done).map_err(refused("mark the host side as done"))?;
        Ok(leads)
    }

    fn make_pair(&self, node: &mut Rtnl, inside: &mut Rtnl, pod: &Netns) -> Result<(), WireError> {
        let host = self.names.host.as_str();
        let pair = VethPair {
            near: VethEnd { name: host, mac: Some(self.names.host_mac), netns: None },
            far: VethEnd {
                name: self.ifname,
                mac: Some(self.names.pod_mac),
                netns: Some(pod.as_fd()),
            },
            mtu: Some(self.mtu),
        };
        let prepare = LinkChange {
            up: Some(true),
            inet: &[
                // The pod may send from its own addresses only. The source guard sees to it for both families and
                // whatever net.ipv4.conf.all says; this holds if that table is deleted.
                (InetSetting::RpFilter, 1),
                (InetSetting::ProxyArp, 1),
                // Packets that come back out of the same link (a pod calling its own Service) are no mistake.
                (InetSetting::SendRedirects, 0),
                (InetSetting::Forwarding, 1),
                (InetSetting::RouteLocalnet, u32::from(self.from_loopback)),
            ],
            link_local: Some(false),
            ..LinkChange::default()
        };
        let messages = vec![veth_message(&pair), link_change_message(host, &prepare)];
        node.perform_all(messages).map_err(|error| match inside.link(self.ifname) {
            Ok(Some(_)) if error.is_exists() => {
                WireError::InterfaceExists { ifname: self.ifname.to_owned() }
            }
            _ if error.is_exists() => WireError::HostNameTaken { name: host.to_owned() },
            _ => refused("make a veth pair")(error),
        })
    }

    fn host_link(&self, node: &mut Rtnl) -> Result<Link, WireError> {
        let found =
            node.link(self.names.host.as_str()).map_err(refused("look at the host side"))?;
        found.ok_or_else(|| WireError::Vanished { name: self.names.host.clone() })
    }

    fn set_up_pod(&self, inside: &mut Rtnl, index: u32) -> Result<Leads, WireError> {
        let up = LinkChange { up: Some(true), ..LinkChange::default() };
        let mut messages =
            vec![link_change_message(LOOPBACK, &up), link_change_message(index, &up)];
        for ip in self.ips {
            messages.push(address_message(index, IpNetwork::from(*ip)));
            messages.push(neighbour_message(index, gateway(*ip), self.names.host_mac));
        }
        for ip in self.ips {
            messages.push(new_route_message(&default_route(*ip, index)));
        }
        match inside.perform_all(messages) {
            Ok(()) => Ok(Leads::Everywhere),
            // Another interface holds the default route: this one leads to the pods only.
            Err(error) if error.is_exists() => {
                let routes = self.cluster_messages(index);
                inside.perform_all(routes).map_err(refused("set the pod's routes"))?;
                Ok(Leads::ToCluster)
            }
            Err(error) => Err(refused("set up the pod's interface")(error)),
        }
    }

    fn cluster_messages(&self, index: u32) -> Vec<Message> {
        let mut messages = Vec::new();
        for ip in self.ips {
            for cidr in self.cluster.iter().filter(|cidr| cidr.is_ipv4() == ip.is_ipv4()) {
                let route = Route { destination: *cidr, ..default_route(*ip, index) };
                messages.push(route_message(&route));
            }
        }
        messages
    }

    fn host_messages(&self, index: u32) -> Vec<Message> {
        let mut messages = Vec::new();
        if self.ips.iter().any(IpAddr::is_ipv6) {
            messages.push(address_message(index, IpNetwork::from(GATEWAY_V6)));
        }
        for ip in self.ips {
            messages.push(neighbour_message(index, *ip, self.names.pod_mac));
            messages.push(route_message(&host_route(*ip, index)));
        }
        messages
    }

    /// Names the first thing that is not as [`Wire::attach`] made it; additions by others are no damage.
    ///
    /// # Errors
    /// When the tables cannot be read.
    pub fn damage(&self, node: &mut Rtnl, pod: &Netns) -> Result<Option<String>, WireError> {
        let name = &self.names.host;
        let Some(host) = node.link(name.as_str()).map_err(refused("look at the host side"))? else {
            return Ok(Some(format!("the host side {name} is missing")));
        };
        if host.alias.as_deref() != Some(&self.names.alias) {
            return Ok(Some(format!("the host side {name} does not belong to this attachment")));
        }
        if !host.up {
            return Ok(Some(format!("the host side {name} is down")));
        }
        for ip in self.ips {
            let route = node.route_to(*ip).map_err(refused("look at the node's routes"))?;
            let right = route.is_some_and(|route| {
                route.destination == IpNetwork::from(*ip) && route.link == Some(host.index)
            });
            if !right {
                return Ok(Some(format!("the node's route to {ip} over {name} is missing")));
            }
        }
        self.pod_damage(&mut Rtnl::open_in(pod)?)
    }

    fn pod_damage(&self, inside: &mut Rtnl) -> Result<Option<String>, WireError> {
        let ifname = self.ifname;
        let look = refused("look at the pod's interface");
        let Some(link) = inside.link(ifname).map_err(&look)? else {
            return Ok(Some(format!("the pod's interface {ifname} is missing")));
        };
        if !link.up {
            return Ok(Some(format!("the pod's interface {ifname} is down")));
        }
        if link.mac != Some(self.names.pod_mac) {
            return Ok(Some(format!("the pod's interface {ifname} has another hardware address")));
        }
        let addresses = inside.addresses(Some(link.index)).map_err(&look)?;
        let routes = inside.routes().map_err(&look)?;
        let neighbours = inside.neighbours().map_err(&look)?;
        for ip in self.ips {
            if !addresses.iter().any(|address| address.network.ip() == *ip) {
                return Ok(Some(format!("the pod's address {ip} is missing")));
            }
            let gateway = gateway(*ip);
            let leads = |r: &Route| r.gateway == Some(gateway) && r.link == Some(link.index);
            if !routes.iter().any(leads) {
                return Ok(Some(format!("the pod's route via {gateway} is missing")));
            }
            let known = |n: &keelson_netlink::route::Neighbour| {
                n.address == gateway && n.link == link.index && n.mac == Some(self.names.host_mac)
            };
            if !neighbours.iter().any(known) {
                return Ok(Some(format!("the pod's neighbour entry for {gateway} is missing")));
            }
        }
        Ok(None)
    }
}

/// Deletes our side of an attachment, and with it the pod's side and all routes. Answers whether it was there.
/// A link of that name with another owner's alias is left alone. All is gone on return; a child waits some 20 ms longer
/// until the kernel has cleared up, see [`Rtnl::delete_link_at_once`].
///
/// # Errors
/// What was refused.
pub fn detach(node: &mut Rtnl, names: &Names) -> Result<bool, WireError> {
    let look = refused("look at the host side");
    let Some(link) = node.link(names.host.as_str()).map_err(look)? else { return Ok(false) };
    let ours = link.kind.as_deref() == Some("veth")
        && link.alias.as_ref().is_none_or(|alias| *alias == names.alias);
    if !ours {
        return Ok(false);
    }
    node.delete_link_at_once(link.index).map_err(|error| match error {
        OpenError::Netlink(source) => refused("delete the veth pair")(source),
        OpenError::Netns(_) => error.into(),
    })
}

/// Whether the attachment's link is there and finished.
///
/// # Errors
/// When the kernel does not say.
pub fn is_attached(node: &mut Rtnl, names: &Names) -> Result<bool, WireError> {
    let link = node.link(names.host.as_str()).map_err(refused("look at the host side"))?;
    Ok(link.is_some_and(|link| link.alias.as_deref() == Some(&names.alias)))
}

/// Whether a host route to the address exists, ours or another's: somebody has it, whatever our records say.
///
/// # Errors
/// When the kernel does not say.
pub fn in_use(node: &mut Rtnl, ip: IpAddr) -> Result<bool, WireError> {
    let route = node.route_to(ip).map_err(refused("look at the node's routes"))?;
    Ok(route.is_some_and(|route| route.destination == IpNetwork::from(ip)))
}

/// The packet size of the link that leads outside, 1500 if none does.
///
/// # Errors
/// When the kernel does not say.
pub fn uplink_mtu(node: &mut Rtnl) -> Result<u32, WireError> {
    // Addresses for documentation: only the default route leads there.
    let outside: [IpAddr; 2] =
        [Ipv4Addr::new(192, 0, 2, 1).into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()];
    for address in outside {
        let route = node.route_to(address).map_err(refused("look for the uplink"))?;
        let Some(index) = route.and_then(|route| route.link) else { continue };
        let link = node.link(index).map_err(refused("look at the uplink"))?;
        if let Some(link) = link.filter(|link| !link.loopback) {
            return Ok(link.mtu);
        }
    }
    Ok(1500)
}

/// The gateway for an address's family.
#[must_use]
pub fn gateway(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { GATEWAY_V4 } else { GATEWAY_V6 }
}

fn default_route(ip: IpAddr, index: u32) -> Route {
    Route { onlink: true, protocol: ROUTE_PROTOCOL, ..Route::default_via(gateway(ip), index) }
}

fn host_route(ip: IpAddr, index: u32) -> Route {
    Route { protocol: ROUTE_PROTOCOL, scope: Scope::Link, ..Route::host(ip, index) }
}
