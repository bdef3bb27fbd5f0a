//! A node with the programs for packets and the one at XDP, which share their maps. One interface leads outside and to
//! another node, a second one to others, a third one to a pod.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};

use aya::Ebpf;
use aya::programs::{TestRun, TestRunOptions, Xdp};
use keelson_ebpf_abi::{
    ADDRESS_NODE, ADDRESS_NODE_PORTS, Address, Flow, MASQUERADE_ALWAYS, MEMBER_SERVING, Tuple,
    XDP_SENDS, XdpInterface,
};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::{Mac, Route, Rtnl, VethEnd, VethPair};
use keelson_netlink::sysctl;

use crate::bytes::{ACK, SYN, Sent, tcp, udp};
use crate::kernel::{Kernel, NODE4, NODE6, PASS, ip, to_pool};
use crate::objects::load;

pub(crate) const XDP_PASS: u32 = 2;
pub(crate) const XDP_TX: u32 = 3;
pub(crate) const XDP_REDIRECT: u32 = 4;

/// Client, Service, and an endpoint on another node.
pub(crate) const WAYS: [[&str; 3]; 2] = [
    ["198.51.100.7:40001", "192.0.2.1:30080", "10.2.0.5:8080"],
    ["[2001:db8:9::7]:40001", "[2001:db8::1]:30080", "[fd02::5]:8080"],
];
/// An interface of the node.
struct Line {
    name: &'static str,
    addresses: [&'static str; 2],
    /// A neighbour, and what is behind it.
    via: [&'static str; 2],
    behind: [&'static str; 2],
}

const LINES: [Line; 3] = [
    Line {
        name: "eth0",
        addresses: ["198.51.100.1/24", "2001:db8:9::1/64"],
        via: ["198.51.100.9", "2001:db8:9::9"],
        behind: ["10.2.0.0/16", "fd02::/32"],
    },
    Line {
        name: "eth1",
        addresses: ["203.0.113.1/24", "2001:db8:a::1/64"],
        via: ["203.0.113.9", "2001:db8:a::9"],
        behind: ["10.3.0.0/16", "fd03::/32"],
    },
    Line {
        name: "pod",
        addresses: ["10.1.0.1/24", "fd01::1/64"],
        via: ["10.1.0.5", "fd01::5"],
        behind: ["10.1.9.0/24", "fd01:9::/32"],
    },
];
pub(crate) const NEIGHBOUR: Mac = Mac([2, 0, 0, 0, 0, 9]);
const CLIENTS: [&str; 2] = ["198.51.100.7", "2001:db8:9::7"];

pub(crate) struct Stage {
    pub(crate) kernel: Kernel,
    pub(crate) xdp: Ebpf,
    pub(crate) netns: Netns,
    others: Netns,
    /// Index and link address of each interface.
    pub(crate) interfaces: Vec<(u32, Mac)>,
}

impl Stage {
    /// Node ports 30080 lead to the endpoints of [`WAYS`], behind the node's address.
    pub(crate) fn new() -> Self {
        let (kernel, xdp) = load();
        let mut kernel = kernel.prepared();
        for (pool, [_, _, endpoint]) in (1..).zip(WAYS) {
            kernel.pool(pool, &[(endpoint, 0, MEMBER_SERVING)]);
            let any = if pool == 1 { Address::ANY4 } else { Address::ANY6 };
            for protocol in [6, 17] {
                let frontend = to_pool(pool, pool, MASQUERADE_ALWAYS);
                kernel.frontend_at(any, 30080, protocol, frontend);
            }
        }
        for address in [NODE4, NODE6] {
            kernel.address(address, ADDRESS_NODE | ADDRESS_NODE_PORTS);
        }
        let (netns, others) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        netns.run(forward).unwrap();
        let interfaces = LINES.iter().map(|line| lay(&netns, &others, line)).collect();
        let mut stage = Stage { kernel, xdp, netns, others, interfaces };
        for (index, link) in stage.interfaces.clone().into_iter().take(2) {
            stage.serve(index, XdpInterface { link: link.0, flags: XDP_SENDS });
        }
        stage
    }

    pub(crate) fn serve(&mut self, index: u32, interface: XdpInterface) {
        let map = self.xdp.map_mut("xdp_interfaces").unwrap();
        let mut map: aya::maps::HashMap<_, u32, XdpInterface> = map.try_into().unwrap();
        map.insert(index, interface, 0).unwrap();
    }

    /// A frame to the node, as it arrives by its first interface.
    pub(crate) fn to_node(&self, packet: &Sent) -> Vec<u8> {
        let mut frame = packet.bytes();
        frame[..6].copy_from_slice(&self.interfaces[0].1.0);
        frame
    }

    /// What the program makes of a frame that arrives by the first interface.
    pub(crate) fn run(&self, frame: &[u8]) -> (u32, Vec<u8>) {
        let mut out = vec![0; frame.len() + 512];
        let mut context = [0u8; 24];
        let length = u32::try_from(frame.len()).unwrap();
        context[4..8].copy_from_slice(&length.to_ne_bytes());
        context[12..16].copy_from_slice(&self.interfaces[0].0.to_ne_bytes());
        let program: &Xdp = self.xdp.program("forward").unwrap().try_into().unwrap();
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let result = self.netns.run(|| program.test_run(options)).unwrap().unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }

    #[track_caller]
    pub(crate) fn passes(&self, frame: &[u8]) {
        let (action, out) = self.run(frame);
        assert_eq!(action, XDP_PASS);
        assert!(out == frame, "it must not be changed");
    }

    /// What the programs for packets, and the kernel between them, make of a frame. Nothing if it goes nowhere.
    pub(crate) fn by_packets(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        let Self { kernel, netns, interfaces, .. } = self;
        let next = |frame: &mut Vec<u8>| {
            frame[..6].copy_from_slice(&NEIGHBOUR.0);
            frame[6..12].copy_from_slice(&interfaces[0].1.0);
        };
        netns
            .run(|| {
                let (verdict, arrived) = kernel.run("ingress", frame);
                let mut routed = (verdict == PASS).then(|| routed(&arrived))??;
                next(&mut routed);
                let (verdict, left) = kernel.run("egress", &routed);
                (verdict == PASS).then_some(left)
            })
            .unwrap()
    }

    /// Lets the connection's first packets go the long way; returns what its packets carry behind the node.
    pub(crate) fn connect(&mut self, packet: &Sent) -> Sent {
        let [first, answer] = match packet.protocol() {
            6 => [SYN, SYN | ACK].map(|flags| tcp(flags, "0.0.0.0:0", "0.0.0.0:0")),
            _ => [(); 2].map(|()| udp("0.0.0.0:0", "0.0.0.0:0")),
        };
        let first = Sent { source: packet.source, destination: packet.destination, ..first };
        let left = self.by_packets(&self.to_node(&first)).unwrap();
        let hidden = carried(&left, packet);
        let answer = Sent { source: hidden.destination, destination: hidden.source, ..answer };
        self.by_packets(&self.to_node(&answer)).unwrap();
        hidden
    }

    /// Everything that is known of connections, without the times.
    pub(crate) fn flows(&mut self) -> [Vec<(Tuple, Flow)>; 2] {
        ["flows_in", "flows_out"].map(|map| {
            let mut flows = self.kernel.flows(map);
            flows.sort_unstable();
            flows
        })
    }

    pub(crate) fn set_flows(&mut self, all: &[Vec<(Tuple, Flow)>; 2]) {
        for (map, flows) in ["flows_in", "flows_out"].into_iter().zip(all) {
            for (key, _) in self.kernel.flows(map) {
                self.kernel.hash::<Tuple, Flow>(map).remove(&key).unwrap();
            }
            for (key, flow) in flows {
                self.kernel.hash(map).insert(*key, *flow, 0).unwrap();
            }
        }
    }
}

/// `like` with the addresses and ports of a plain frame.
pub(crate) fn carried(frame: &[u8], like: &Sent) -> Sent {
    let address = |at: usize| -> IpAddr {
        if like.is_v4() {
            <[u8; 4]>::try_from(&frame[at..at + 4]).unwrap().into()
        } else {
            <[u8; 16]>::try_from(&frame[at..at + 16]).unwrap().into()
        }
    };
    let (source, destination, ports) = if like.is_v4() { (26, 30, 34) } else { (22, 38, 54) };
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    Sent {
        source: (address(source), port(ports)).into(),
        destination: (address(destination), port(ports + 2)).into(),
        ..like.clone()
    }
}

/// What the kernel makes of a packet that it forwards, apart from link addresses.
fn routed(frame: &[u8]) -> Option<Vec<u8>> {
    let mut frame = frame.to_vec();
    let packet = &mut frame[14..];
    match packet.first()? >> 4 {
        4 => {
            let length = usize::from(packet[0] & 15) * 4;
            let whole = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
            let sane = length >= 20 && whole >= length && whole <= packet.len();
            if !sane || crate::bytes::checksum(&packet[..length]) != 0 || packet[8] <= 1 {
                return None;
            }
            packet[8] -= 1;
            packet[10..12].fill(0);
            let sum = crate::bytes::checksum(&packet[..length]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        6 => {
            let whole = 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
            if whole > packet.len() || packet[7] <= 1 {
                return None;
            }
            packet[7] -= 1;
        }
        _ => return None,
    }
    Some(frame)
}

fn forward() {
    sysctl::write("net/ipv4/ip_forward", "1").unwrap();
    sysctl::write("net/ipv6/conf/all/forwarding", "1").unwrap();
    sysctl::write("net/ipv6/conf/default/accept_dad", "0").unwrap();
}

fn lay(node: &Netns, others: &Netns, line: &Line) -> (u32, Mac) {
    let Line { name, addresses, via, behind } = *line;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let far = format!("line{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let mut rtnl = Rtnl::open_in(node).unwrap();
    rtnl.create_veth(&VethPair {
        near: VethEnd { name, mac: None, netns: None },
        far: VethEnd { name: &far, mac: None, netns: Some(others.as_fd()) },
        mtu: None,
    })
    .unwrap();
    Rtnl::open_in(others).unwrap().set_up(&*far).unwrap();
    let link = rtnl.link(name).unwrap().unwrap();
    for ((address, via), behind) in addresses.iter().zip(via).zip(behind) {
        rtnl.ensure_address(link.index, address.parse().unwrap()).unwrap();
        rtnl.ensure_neighbour(link.index, ip(via), NEIGHBOUR).unwrap();
        let route = Route {
            gateway: Some(ip(via)),
            link: Some(link.index),
            ..Route::to(behind.parse().unwrap())
        };
        rtnl.ensure_route(&route).unwrap();
    }
    if name == "eth0" {
        for client in CLIENTS {
            rtnl.ensure_neighbour(link.index, ip(client), NEIGHBOUR).unwrap();
        }
    }
    (link.index, link.mac.unwrap())
}
