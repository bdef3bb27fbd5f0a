//! A node with four pods and a client outside, in network namespaces, and the programs on its interfaces. Two of the pods
//! are on a bridge.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use aya::programs::{SchedClassifier, TcAttachType, tc};
use keelson_ebpf_abi::{ADDRESS_NODE, ADDRESS_NODE_PORTS, Interface};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::{LinkChange, Route, Rtnl, VethEnd, VethPair};
use keelson_netlink::sysctl;

use crate::kernel::{Kernel, ip};

/// A namespace beside the node, and the addresses on the line between them.
struct Neighbour {
    name: &'static str,
    addresses: [&'static str; 2],
    node: [&'static str; 2],
    is_on_bridge: bool,
}

const BRIDGE: &str = "bridge";
const ON_BRIDGE: [&str; 2] = ["10.1.3.1", "fd01:0:0:3::1"];

const NEIGHBOURS: [Neighbour; 5] = [
    Neighbour {
        name: "outside",
        addresses: ["198.51.100.7", "2001:db8:9::7"],
        node: ["198.51.100.1", "2001:db8:9::1"],
        is_on_bridge: false,
    },
    Neighbour {
        name: "pod-a",
        addresses: ["10.1.1.5", "fd01:0:0:1::5"],
        node: ["10.1.1.1", "fd01:0:0:1::1"],
        is_on_bridge: false,
    },
    Neighbour {
        name: "pod-b",
        addresses: ["10.1.2.5", "fd01:0:0:2::5"],
        node: ["10.1.2.1", "fd01:0:0:2::1"],
        is_on_bridge: false,
    },
    Neighbour {
        name: "pod-c",
        addresses: ["10.1.3.5", "fd01:0:0:3::5"],
        node: ON_BRIDGE,
        is_on_bridge: true,
    },
    Neighbour {
        name: "pod-d",
        addresses: ["10.1.3.6", "fd01:0:0:3::6"],
        node: ON_BRIDGE,
        is_on_bridge: true,
    },
];

pub(crate) const OUTSIDE: usize = 0;
pub(crate) const POD_A: usize = 1;
pub(crate) const POD_B: usize = 2;
pub(crate) const POD_C: usize = 3;
pub(crate) const POD_D: usize = 4;
pub(crate) const NODE: usize = NEIGHBOURS.len();

pub(crate) struct Node {
    pub(crate) kernel: Kernel,
    pub(crate) netns: Netns,
    neighbours: Vec<Netns>,
}

impl Node {
    pub(crate) fn new() -> Self {
        let mut kernel = Kernel::new();
        let netns = Netns::anonymous().unwrap();
        netns.run(forward).unwrap();
        let mut rtnl = Rtnl::open_in(&netns).unwrap();
        rtnl.create_bridge(BRIDGE).unwrap();
        let neighbours = NEIGHBOURS.iter().map(|n| line(&netns, n)).collect();
        rtnl.set_up("lo").unwrap();
        // What the node knows no other way for leaves to the outside.
        let outside = rtnl.link(NEIGHBOURS[OUTSIDE].name).unwrap().unwrap().index;
        for gateway in NEIGHBOURS[OUTSIDE].addresses {
            rtnl.ensure_route(&Route::default_via(ip(gateway), outside)).unwrap();
        }
        let lines = NEIGHBOURS.iter().map(|n| (n.name, n.node));
        for (name, addresses) in lines.chain([(BRIDGE, ON_BRIDGE)]) {
            let [address4, address6] = addresses.map(|address| {
                kernel.address(address, ADDRESS_NODE | ADDRESS_NODE_PORTS);
                ip(address).into()
            });
            let index = rtnl.link(name).unwrap().unwrap().index;
            let interface = Interface { address4, address6, flags: 0 };
            kernel.interface(index, interface);
        }
        let mut node = Node { kernel, netns, neighbours };
        node.attach();
        node
    }

    fn attach(&mut self) {
        let Node { kernel, netns, .. } = self;
        netns
            .run(|| {
                for name in NEIGHBOURS.iter().map(|n| n.name).chain([BRIDGE]) {
                    // Without tcx (Linux 6.6) only this has a place for programs.
                    tc::qdisc_add_clsact(name).unwrap();
                    for (program, kind) in
                        [("ingress", TcAttachType::Ingress), ("egress", TcAttachType::Egress)]
                    {
                        let program: &mut SchedClassifier = kernel.program_mut(program);
                        program.attach(name, kind).unwrap();
                    }
                }
            })
            .unwrap();
    }

    /// Runs in a neighbour's namespace, or in the node's ([`NODE`]).
    pub(crate) fn inside<T: Send>(&self, place: usize, work: impl FnOnce() -> T + Send) -> T {
        self.neighbours.get(place).unwrap_or(&self.netns).run(work).unwrap()
    }
}

/// A neighbour's address, with a port.
pub(crate) fn of(neighbour: usize, v6: bool, port: u16) -> SocketAddr {
    SocketAddr::new(ip(NEIGHBOURS[neighbour].addresses[usize::from(v6)]), port)
}

/// The node's address that a neighbour is connected to.
pub(crate) fn node_at(neighbour: usize, v6: bool) -> IpAddr {
    ip(NEIGHBOURS[neighbour].node[usize::from(v6)])
}

fn forward() {
    sysctl::write("net/ipv4/ip_forward", "1").unwrap();
    sysctl::write("net/ipv6/conf/all/forwarding", "1").unwrap();
    // As strict as a distribution may set it.
    sysctl::write("net/ipv4/conf/all/rp_filter", "1").unwrap();
}

fn line(node: &Netns, neighbour: &Neighbour) -> Netns {
    let netns = Netns::anonymous().unwrap();
    let mut here = Rtnl::open_in(node).unwrap();
    let mut there = Rtnl::open_in(&netns).unwrap();
    here.create_veth(&VethPair {
        near: VethEnd { name: neighbour.name, mac: None, netns: None },
        far: VethEnd { name: "eth0", mac: None, netns: Some(netns.as_fd()) },
        mtu: None,
    })
    .unwrap();
    there.set_up("lo").unwrap();
    there.set_up("eth0").unwrap();
    let near = here.link(neighbour.name).unwrap().unwrap().index;
    let far = there.link("eth0").unwrap().unwrap().index;
    let mut with_address = near;
    if neighbour.is_on_bridge {
        let bridge = here.link(BRIDGE).unwrap().unwrap().index;
        here.change_link(near, &LinkChange { master: Some(bridge), ..LinkChange::default() })
            .unwrap();
        with_address = bridge;
    }
    for (address, gateway) in neighbour.addresses.into_iter().zip(neighbour.node) {
        let bits = if ip(address).is_ipv4() { 24 } else { 64 };
        here.ensure_address(with_address, format!("{gateway}/{bits}").parse().unwrap()).unwrap();
        there.ensure_address(far, format!("{address}/{bits}").parse().unwrap()).unwrap();
        there.ensure_route(&Route::default_via(ip(gateway), far)).unwrap();
    }
    netns
}
