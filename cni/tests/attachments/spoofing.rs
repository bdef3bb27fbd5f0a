//! A pod that claims to be another.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use ipnetwork::IpNetwork;
use keelson_netlink::route::Rtnl;
use keelson_netlink::sysctl;
use serde_json::json;

use super::stage::{DEADLINE, Namespace, Node, Pod, is_root};

/// Gives the pod's interface another address, as a process with NET_ADMIN in the pod can.
fn claim(pod: &Namespace, address: IpAddr) {
    pod.run(|| {
        let mut rtnl = Rtnl::open().unwrap();
        let eth0 = rtnl.link("eth0").unwrap().unwrap().index;
        rtnl.ensure_address(eth0, IpNetwork::from(address)).unwrap();
    });
}

fn say(from: &Namespace, source: IpAddr, to: SocketAddr, what: &str) {
    from.run(|| {
        let socket = UdpSocket::bind((source, 0)).unwrap();
        socket.send_to(what.as_bytes(), to).unwrap();
    });
}

fn server(pod: &Pod, family: usize) -> (UdpSocket, SocketAddr) {
    let ip = pod.ips[family];
    let socket = pod.namespace.run(|| UdpSocket::bind((ip, 0)).unwrap());
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// The next datagram's text and source.
fn heard(socket: &UdpSocket) -> (String, IpAddr) {
    let mut bytes = [0; 64];
    let (length, source) = socket.recv_from(&mut bytes).unwrap();
    (String::from_utf8_lossy(&bytes[..length]).into_owned(), source.ip())
}

#[test]
fn a_pod_is_not_heard_from_an_address_that_is_not_its_own() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let [attacker, victim, server_pod] = ["a", "b", "c"].map(|id| node.pod(id));
    // Many distributions set 2 (loose) for all links, and the kernel takes the larger one.
    node.namespace.run(|| sysctl::write("net/ipv4/conf/all/rp_filter", "2").unwrap());
    let free: [IpAddr; 2] = ["10.99.0.200".parse().unwrap(), "fd00:99::200".parse().unwrap()];
    for (family, free) in free.into_iter().enumerate() {
        let (socket, to) = server(&server_pod, family);
        for claimed in [free, victim.ips[family]] {
            claim(&attacker.namespace, claimed);
            say(&attacker.namespace, claimed, to, "forged");
        }
        say(&attacker.namespace, attacker.ips[family], to, "honest");
        assert_eq!(heard(&socket), ("honest".to_owned(), attacker.ips[family]));
        say(&victim.namespace, victim.ips[family], to, "victim");
        assert_eq!(heard(&socket), ("victim".to_owned(), victim.ips[family]));
    }
}

#[test]
fn the_node_does_not_hear_a_pod_under_a_foreign_address() {
    if !is_root() {
        return;
    }
    let node = Node::dual();
    let attacker = node.pod("a");
    for (family, own) in [(0, "192.0.2.1"), (1, "2001:db8::1")] {
        let own: IpAddr = own.parse().unwrap();
        let socket = node.namespace.run(|| UdpSocket::bind((own, 0)).unwrap());
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let to = socket.local_addr().unwrap();
        let forger: IpAddr =
            if family == 0 { "198.51.100.7" } else { "2001:db8:7::7" }.parse().unwrap();
        claim(&attacker.namespace, forger);
        say(&attacker.namespace, forger, to, "forged");
        say(&attacker.namespace, attacker.ips[family], to, "honest");
        assert_eq!(heard(&socket).0, "honest");
    }
}

#[test]
fn a_network_without_masquerade_guards_sources_as_well() {
    if !is_root() {
        return;
    }
    let mut node = Node::dual();
    node.config = node.with(json!({ "masquerade": false }));
    let [attacker, server_pod] = ["a", "b"].map(|id| node.pod(id));
    let (socket, to) = server(&server_pod, 1);
    let claimed = "fd00:99::200".parse().unwrap();
    claim(&attacker.namespace, claimed);
    say(&attacker.namespace, claimed, to, "forged");
    say(&attacker.namespace, attacker.ips[1], to, "honest");
    assert_eq!(heard(&socket).0, "honest");
    node.call("CHECK", "a", Some(&attacker.namespace), &node.config).unwrap();
}
