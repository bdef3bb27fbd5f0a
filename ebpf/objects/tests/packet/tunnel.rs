//! An interface whose packets begin with the IP header.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpListener};
use std::os::fd::{AsFd, AsRawFd};

use aya::programs::{SchedClassifier, TcAttachType, tc};
use keelson_ebpf_abi::{
    ADDRESS_CLUSTER_IP, Address, ENDPOINT_HERE, INTERFACE_NO_LINK_HEADER, Interface,
    MASQUERADE_ALWAYS, MASQUERADE_NEVER, MEMBER_SERVING, SETTING_DIRECT, SETTING_KNOWS_PODS,
};
use keelson_netlink::route::{Route, Rtnl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bytes::{ACK, RST, SYN, checksum, tcp, transport_sum};
use crate::direct::telling;
use crate::kernel::to_pool;
use crate::node::{Node, POD_A, of};

const NAME: &str = "tunnel";
const CLIENT: &str = "203.0.113.7:40001";
/// Its packets to [`LIKE_TCP`] have, where an Ethernet frame has it, the head of an IPv4 packet with TCP.
const LIKE_A_FRAME: &str = "8.0.69.1:40001";
const LIKE_TCP: &str = "10.96.0.10:262";

/// The end of a tunnel that the node has, as the file that its packets come out of.
fn tunnel(node: &mut Node) -> File {
    let file = node
        .netns
        .run(|| {
            let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
            create(&file);
            file
        })
        .unwrap();
    let mut rtnl = Rtnl::open_in(&node.netns).unwrap();
    rtnl.set_up(NAME).unwrap();
    let link = rtnl.link(NAME).unwrap().unwrap().index;
    for clients in ["203.0.113.0/24", "8.0.69.0/24"] {
        let route = Route { link: Some(link), ..Route::to(clients.parse().unwrap()) };
        rtnl.ensure_route(&route).unwrap();
    }
    let interface = Interface { flags: INTERFACE_NO_LINK_HEADER, ..Interface::default() };
    node.kernel.interface(link, interface);
    let Node { kernel, netns, .. } = node;
    netns
        .run(|| {
            tc::qdisc_add_clsact(NAME).unwrap();
            for (program, kind) in
                [("ingress", TcAttachType::Ingress), ("egress", TcAttachType::Egress)]
            {
                let program: &mut SchedClassifier = kernel.program_mut(program);
                program.attach(NAME, kind).unwrap();
            }
        })
        .unwrap();
    file
}

fn create(file: &File) {
    const NO_PACKET_INFO: i16 = 0x1000;
    const TUN: i16 = 1;
    // SAFETY: integers and arrays of them.
    #[allow(unsafe_code, reason = "a kernel structure")]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = TUN | NO_PACKET_INFO;
    // SAFETY: the request lives for the call.
    #[allow(unsafe_code, reason = "no crate at hand makes tunnels")]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// The next TCP packet that comes out.
fn next(file: &mut File) -> Vec<u8> {
    let mut buffer = vec![0; 65536];
    loop {
        // Only a failure takes so long.
        let patience = PollTimeout::from(20_000u16);
        let ready = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], patience).unwrap();
        assert_eq!(ready, 1, "nothing comes out");
        let length = file.read(&mut buffer).unwrap();
        if buffer[0] >> 4 == 4 && buffer[9] == 6 {
            return buffer[..length].to_vec();
        }
    }
}

#[track_caller]
fn comes_from(packet: &[u8], service: &str, client: &str, flags: u8) {
    let [service, client] = [service, client].map(|at| at.parse::<SocketAddrV4>().unwrap());
    assert_eq!(packet[12..16], service.ip().octets());
    assert_eq!(packet[20..22], service.port().to_be_bytes());
    assert_eq!(packet[33], flags);
    assert_eq!(checksum(&packet[..20]), 0);
    let sum = transport_sum((*service.ip()).into(), (*client.ip()).into(), 6, &packet[20..]);
    assert_eq!(sum, 0);
}

#[test]
fn packets_without_a_link_header_are_translated_and_refused() {
    let mut node = Node::new();
    let endpoint = of(POD_A, false, 8080);
    node.kernel.pool(1, &[(&endpoint.to_string(), 0, MEMBER_SERVING)]);
    for service in ["10.96.0.10:80", LIKE_TCP] {
        node.kernel.frontend(service, 6, to_pool(1, 1, MASQUERADE_NEVER));
    }
    node.kernel.address("10.96.0.10", ADDRESS_CLUSTER_IP);
    let _listener = node.inside(POD_A, || TcpListener::bind(endpoint)).unwrap();
    let mut tunnel = tunnel(&mut node);
    for (client, service, flags) in [
        (CLIENT, "10.96.0.10:80", SYN | ACK),
        (CLIENT, "10.96.0.10:81", RST | ACK),
        (LIKE_A_FRAME, LIKE_TCP, SYN | ACK),
    ] {
        let mut packet = tcp(SYN, client, service);
        packet.payload.clear();
        tunnel.write_all(&packet.packet()).unwrap();
        comes_from(&next(&mut tunnel), service, client, flags);
    }
    assert_eq!(node.kernel.drops().iter().sum::<u64>(), 0);
}

/// Another node tells by the tunnel whom a client asked: the endpoint's kernel takes the packet, and the client its answer.
#[test]
fn what_another_node_tells_is_taken_out_of_packets_without_a_link_header() {
    const ASKED: &str = "192.0.2.99:30080";
    let mut node = Node::new();
    node.kernel.settings(SETTING_KNOWS_PODS | SETTING_DIRECT);
    let endpoint = of(POD_A, false, 8080);
    node.kernel.pool(1, &[(&endpoint.to_string(), ENDPOINT_HERE, MEMBER_SERVING)]);
    node.kernel.frontend_at(Address::ANY4, 30080, 6, to_pool(1, 1, MASQUERADE_ALWAYS));
    let _listener = node.inside(POD_A, || TcpListener::bind(endpoint)).unwrap();
    let mut tunnel = tunnel(&mut node);
    let mut packet = telling(tcp(SYN, CLIENT, &endpoint.to_string()), ASKED);
    packet.payload.clear();
    tunnel.write_all(&packet.packet()).unwrap();
    comes_from(&next(&mut tunnel), ASKED, CLIENT, SYN | ACK);
    assert_eq!(node.kernel.drops().iter().sum::<u64>(), 0);
}
