//! What the programs must know of the node: its addresses and interfaces, and how pods are told from others.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use keelson_ebpf_abi::{
    ADDRESS_NODE, ADDRESS_NODE_PORTS, Address, INTERFACE_NO_LINK_HEADER, INTERFACE_PODS, Interface,
    RangeKey, RangePrefix, SETTING_EXEMPTS_NAMESPACES, SETTING_KNOWS_PODS,
    SETTING_NODE_SOCKETS_ONLY, SETTING_PASSES_UNKNOWN, SETTING_PODS_BY_INTERFACE,
};
use keelson_netlink::route::{Address as LinkAddress, Link, Route, Rtnl};
use keelson_netlink::socket::NetlinkError;

use super::config::Sockets;
use super::direct;
use super::item::prefix_len;
use crate::backend::{BackendConfig, PodSources};

/// What belongs into the maps that do not depend on Services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeState {
    pub(crate) addresses: BTreeMap<Address, u32>,
    pub(crate) interfaces: BTreeMap<u32, Interface>,
    pub(crate) pod_ranges: BTreeMap<RangePrefix, u32>,
    pub(crate) service_ranges: BTreeMap<RangePrefix, u32>,
    /// By cookie.
    pub(crate) exempt: BTreeMap<u64, u32>,
    /// `SETTING_*`.
    pub(crate) flags: u32,
    /// The node's first address of each family.
    pub(crate) address4: Address,
    pub(crate) address6: Address,
}

/// Reads links and addresses.
pub(crate) fn observe(rtnl: &mut Rtnl) -> Result<(Vec<Link>, Vec<LinkAddress>), NetlinkError> {
    Ok((rtnl.links()?, rtnl.addresses(None)?))
}

impl NodeState {
    pub(crate) fn new(
        config: &BackendConfig,
        links: &[Link],
        addresses: &[LinkAddress],
        exempt: BTreeMap<u64, u32>,
    ) -> Self {
        let pods = match config.pods {
            PodSources::Unknown => 0,
            PodSources::Ranges(_) => SETTING_KNOWS_PODS,
            PodSources::Bridge(_) | PodSources::InterfacePrefix(_) => {
                SETTING_KNOWS_PODS | SETTING_PODS_BY_INTERFACE
            }
        };
        let exempts = if exempt.is_empty() { 0 } else { SETTING_EXEMPTS_NAMESPACES };
        let only_node =
            if config.ebpf.sockets == Sockets::Node { SETTING_NODE_SOCKETS_ONLY } else { 0 };
        let packets = links.iter().filter(|link| !link.loopback);
        NodeState {
            addresses: own_addresses(config, addresses),
            interfaces: packets
                .map(|l| (l.index, interface(config, l, links, addresses)))
                .collect(),
            pod_ranges: ranges(config.pods.ranges()),
            service_ranges: ranges(&config.service_ranges),
            // Connections from the time of another mode are netfilter's.
            flags: pods | exempts | only_node | direct::flags(config) | SETTING_PASSES_UNKNOWN,
            exempt,
            address4: any_of_node(links, addresses, true).map_or(Address::ANY6, Address::from),
            address6: any_of_node(links, addresses, false).map_or(Address::ANY6, Address::from),
        }
    }
}

fn ranges(of: &[IpNetwork]) -> BTreeMap<RangePrefix, u32> {
    let prefix = |range: &IpNetwork| RangePrefix {
        prefix_len: prefix_len(range),
        key: RangeKey { address: range.network().into() },
    };
    of.iter().map(|range| (prefix(range), 1)).collect()
}

fn own_addresses(config: &BackendConfig, addresses: &[LinkAddress]) -> BTreeMap<Address, u32> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let own = addresses.iter().map(|address| address.network.ip()).chain(loopback);
    own.map(|address| {
        let ports = if serves_node_ports(config, address) { ADDRESS_NODE_PORTS } else { 0 };
        (address.into(), ADDRESS_NODE | ports)
    })
    .collect()
}

fn serves_node_ports(config: &BackendConfig, address: IpAddr) -> bool {
    match address.is_loopback() {
        true => config.localhost_node_ports,
        false => config.wants_node_ports_on(address),
    }
}

fn interface(
    config: &BackendConfig,
    link: &Link,
    links: &[Link],
    addresses: &[LinkAddress],
) -> Interface {
    let pods = match &config.pods {
        PodSources::Bridge(name) => {
            let bridge = links.iter().find(|link| link.name == *name).map(|bridge| bridge.index);
            Some(link.index) == bridge || (link.master.is_some() && link.master == bridge)
        }
        PodSources::InterfacePrefix(prefix) => link.name.starts_with(prefix.as_str()),
        PodSources::Unknown | PodSources::Ranges(_) => false,
    };
    let mut flags = if pods { INTERFACE_PODS } else { 0 };
    if link.mac.is_none() {
        flags |= INTERFACE_NO_LINK_HEADER;
    }
    let source =
        |v4| masquerade_address(link, links, addresses, v4).map_or(Address::ANY6, Address::from);
    Interface { address4: source(true), address6: source(false), flags }
}

/// The interface's own address, else one of the node's.
fn masquerade_address(
    link: &Link,
    links: &[Link],
    addresses: &[LinkAddress],
    v4: bool,
) -> Option<IpAddr> {
    address_on(link.index, addresses, v4).or_else(|| any_of_node(links, addresses, v4))
}

fn any_of_node(links: &[Link], addresses: &[LinkAddress], v4: bool) -> Option<IpAddr> {
    links.iter().find_map(|link| address_on(link.index, addresses, v4))
}

/// An address that others can answer to.
fn address_on(index: u32, addresses: &[LinkAddress], v4: bool) -> Option<IpAddr> {
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    };
    let on_link = addresses.iter().filter(|address| address.link == index);
    on_link.map(|address| address.network.ip()).find(|ip| ip.is_ipv4() == v4 && usable(ip))
}

/// Whether a default route leaves by that interface.
pub(crate) fn has_default_route(link: &Link, routes: &[Route]) -> bool {
    let leaves = |route: &Route| route.destination.prefix() == 0 && route.link == Some(link.index);
    routes.iter().any(leaves)
}
