//! Real packets of real sockets, with all that interfaces do to them: checksums that are still to be computed,
//! segments as large as memory allows.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use keelson_ebpf_abi::{
    ADDRESS_CLUSTER_IP, Address, ENDPOINT_HERE, MASQUERADE_ALWAYS, MASQUERADE_NEVER,
    MASQUERADE_UNLESS_POD, MEMBER_SERVING,
};

use crate::kernel::{ip, to_pool};
use crate::node::{NODE, Node, OUTSIDE, POD_A, POD_B, POD_C, POD_D, node_at, of};
use crate::transfer::both_ways;

/// Only a failure takes so long.
const PATIENCE: Duration = Duration::from_secs(60);
const BULK: usize = 8 << 20;
const SERVICES: [&str; 2] = ["10.96.0.10:80", "[fd96::10]:80"];

/// A node on which both families' Service leads to pod A, port 8080, as `masquerade` says, and node port 30080 always
/// masquerades.
fn node(masquerade: u8) -> Node {
    let mut node = Node::new();
    for (v6, service) in [false, true].into_iter().zip(SERVICES) {
        let pool = 1 + u32::from(v6);
        let endpoint = of(POD_A, v6, 8080).to_string();
        node.kernel.pool(pool, &[(&endpoint, ENDPOINT_HERE, MEMBER_SERVING)]);
        for protocol in [6, 17] {
            node.kernel.frontend(service, protocol, to_pool(pool, pool, masquerade));
            let any = if v6 { Address::ANY6 } else { Address::ANY4 };
            let frontend = to_pool(10 + pool, pool, MASQUERADE_ALWAYS);
            node.kernel.frontend_at(any, 30080, protocol, frontend);
        }
    }
    node
}

/// Sends much in both directions between a client somewhere and pod A; returns whom it saw.
fn transfer(node: &Node, from: usize, to: SocketAddr) -> IpAddr {
    transfer_with(node, from, to, (POD_A, of(POD_A, to.is_ipv6(), 8080)))
}

fn transfer_with(
    node: &Node,
    from: usize,
    to: SocketAddr,
    (place, listen): (usize, SocketAddr),
) -> IpAddr {
    let listener = node.inside(place, || TcpListener::bind(listen)).unwrap();
    let near = node.inside(from, || TcpStream::connect_timeout(&to, PATIENCE)).unwrap();
    let (far, peer) = listener.accept().unwrap();
    both_ways(near, far, BULK);
    peer.ip()
}

/// Asks pod A by UDP; returns whom it saw. The answer must come from where it was asked.
fn ask(node: &Node, from: usize, to: SocketAddr, size: usize) -> IpAddr {
    let listen = of(POD_A, to.is_ipv6(), 8080);
    let server = node.inside(POD_A, || UdpSocket::bind(listen)).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let any = SocketAddr::new(if to.is_ipv6() { ip("::") } else { ip("0.0.0.0") }, 0);
    let client = node.inside(from, || UdpSocket::bind(any)).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let question: Vec<u8> = (0..size).map(|i| (i % 253) as u8).collect();
    client.send_to(&question, to).unwrap();
    let mut buffer = vec![0; 65536];
    let (length, peer) = server.recv_from(&mut buffer).unwrap();
    assert!(buffer[..length] == question);
    server.send_to(&buffer[..length], peer).unwrap();
    let (length, answerer) = client.recv_from(&mut buffer).unwrap();
    assert!(buffer[..length] == question);
    assert_eq!(answerer, to);
    peer.ip()
}

#[test]
fn pods_reach_a_service_as_they_are() {
    let node = node(MASQUERADE_UNLESS_POD);
    for (v6, service) in [false, true].into_iter().zip(SERVICES) {
        let service = service.parse().unwrap();
        let pod = of(POD_B, v6, 0).ip();
        assert_eq!(transfer(&node, POD_B, service), pod);
        assert_eq!(ask(&node, POD_B, service, 100), pod);
        // In pieces.
        assert_eq!(ask(&node, POD_B, service, 20_000), pod);
    }
    assert_eq!(node.kernel.drops().iter().sum::<u64>(), 0);
}

#[test]
fn clients_from_outside_reach_a_node_port_behind_the_nodes_address() {
    let node = node(MASQUERADE_UNLESS_POD);
    for v6 in [false, true] {
        let port = SocketAddr::new(node_at(OUTSIDE, v6), 30080);
        assert_eq!(transfer(&node, OUTSIDE, port), node_at(POD_A, v6));
        assert_eq!(ask(&node, OUTSIDE, port, 100), node_at(POD_A, v6));
        assert_eq!(ask(&node, OUTSIDE, port, 20_000), node_at(POD_A, v6));
    }
    assert_eq!(node.kernel.drops().iter().sum::<u64>(), 0);
}

#[test]
fn clients_from_outside_reach_a_service_as_they_are() {
    let node = node(MASQUERADE_NEVER);
    for (v6, service) in [false, true].into_iter().zip(SERVICES) {
        let service = service.parse().unwrap();
        assert_eq!(transfer(&node, OUTSIDE, service), of(OUTSIDE, v6, 0).ip());
    }
}

#[test]
fn a_pod_reaches_itself() {
    let node = node(MASQUERADE_UNLESS_POD);
    for (v6, service) in [false, true].into_iter().zip(SERVICES) {
        let service = service.parse().unwrap();
        assert_eq!(transfer(&node, POD_A, service), node_at(POD_A, v6));
        assert_eq!(ask(&node, POD_A, service, 100), node_at(POD_A, v6));
    }
}

/// No program translates the node's sockets in these tests.
#[test]
fn the_node_reaches_a_service() {
    for (masquerade, seen) in [(MASQUERADE_UNLESS_POD, POD_A), (MASQUERADE_NEVER, OUTSIDE)] {
        let node = node(masquerade);
        for (v6, service) in [false, true].into_iter().zip(SERVICES) {
            let service = service.parse().unwrap();
            assert_eq!(transfer(&node, NODE, service), node_at(seen, v6));
            assert_eq!(ask(&node, NODE, service, 100), node_at(seen, v6));
        }
        assert_eq!(node.kernel.drops().iter().sum::<u64>(), 0);
    }
}

#[test]
fn an_endpoint_may_be_a_process_of_the_node() {
    let mut node = node(MASQUERADE_UNLESS_POD);
    for (v6, service) in [false, true].into_iter().zip(SERVICES) {
        let service = service.parse().unwrap();
        let endpoint = SocketAddr::new(node_at(POD_A, v6), 9090);
        node.kernel.pool(1 + u32::from(v6), &[(&endpoint.to_string(), 0, MEMBER_SERVING)]);
        for from in [POD_B, OUTSIDE] {
            // What does not leave the node is not masqueraded, as with netfilter.
            let seen = transfer_with(&node, from, service, (NODE, endpoint));
            assert_eq!(seen, of(from, v6, 0).ip());
        }
    }
}

/// Packets pass the programs twice, at the bridge and at its port. Answers between its pods do not even pass the node's
/// routing.
#[test]
fn pods_on_a_bridge_reach_each_other_and_themselves() {
    let mut node = node(MASQUERADE_UNLESS_POD);
    for (v6, service) in [false, true].into_iter().zip(SERVICES) {
        let service: SocketAddr = service.parse().unwrap();
        let endpoint = of(POD_C, v6, 8080);
        let slot = (&*endpoint.to_string(), ENDPOINT_HERE, MEMBER_SERVING);
        node.kernel.pool(1 + u32::from(v6), &[slot]);
        let port = SocketAddr::new(node_at(OUTSIDE, v6), 30080);
        for (from, to, seen) in [
            (POD_D, service, of(POD_D, v6, 0).ip()),
            (POD_A, service, of(POD_A, v6, 0).ip()),
            (POD_C, service, node_at(POD_C, v6)),
            (POD_D, port, node_at(POD_C, v6)),
            (OUTSIDE, port, node_at(POD_C, v6)),
        ] {
            assert_eq!(transfer_with(&node, from, to, (POD_C, endpoint)), seen);
        }
    }
    assert_eq!(node.kernel.drops().iter().sum::<u64>(), 0);
}

/// The pod's kernel answers with ICMP, which the client must recognise.
#[test]
fn a_client_hears_that_its_endpoint_has_no_such_port() {
    let node = node(MASQUERADE_ALWAYS);
    for service in SERVICES {
        for from in [POD_A, POD_B, OUTSIDE, NODE] {
            is_refused(&node, from, service.parse().unwrap());
        }
    }
}

/// A datagram is answered with an ICMP error.
#[track_caller]
fn is_refused(node: &Node, from: usize, to: SocketAddr) {
    let any = SocketAddr::new(if to.is_ipv6() { ip("::") } else { ip("0.0.0.0") }, 0);
    let socket = node.inside(from, || UdpSocket::bind(any)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(to).unwrap();
    socket.send(b"Is anybody there?").unwrap();
    let refused = socket.recv(&mut [0; 9]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "from {from} to {to}");
}

#[test]
fn where_nobody_is_sockets_are_told_so() {
    let mut node = node(MASQUERADE_NEVER);
    for service in SERVICES {
        let service: SocketAddr = service.parse().unwrap();
        node.kernel.address(&service.ip().to_string(), ADDRESS_CLUSTER_IP);
        let nowhere = SocketAddr::new(service.ip(), 81);
        for from in [POD_B, OUTSIDE, NODE] {
            let refused = node.inside(from, || TcpStream::connect_timeout(&nowhere, PATIENCE));
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
            is_refused(&node, from, nowhere);
        }
    }
    assert_eq!(node.kernel.drops().iter().sum::<u64>(), 0);
}
