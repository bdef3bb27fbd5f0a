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
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// Says it until something is heard, which is told with its source: a link that was just made may lose the first packets.
fn heard(socket: &UdpSocket, say: impl Fn()) -> (String, IpAddr) {
    socket.set_read_timeout(Some(DEADLINE / 25)).unwrap();
    let mut bytes = [0; 64];
    let received = (0..50).find_map(|_| {
        say();
        socket.recv_from(&mut bytes).ok()
    });
    let (length, source) = received.unwrap();
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
        let (mut socket, mut to) = server(&server_pod, family);
        heard(&socket, || say(&attacker.namespace, attacker.ips[family], to, "the link is up"));
        (socket, to) = server(&server_pod, family);
        for claimed in [free, victim.ips[family]] {
            claim(&attacker.namespace, claimed);
            say(&attacker.namespace, claimed, to, "forged");
        }
        for honest in [&attacker, &victim] {
            let own = honest.ips[family];
            let (text, source) = heard(&socket, || say(&honest.namespace, own, to, "honest"));
            assert_eq!((&*text, source), ("honest", own));
            (socket, to) = server(&server_pod, family);
        }
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
        let to = socket.local_addr().unwrap();
        let forger: IpAddr =
            if family == 0 { "198.51.100.7" } else { "2001:db8:7::7" }.parse().unwrap();
        claim(&attacker.namespace, forger);
        say(&attacker.namespace, forger, to, "forged");
        let own = attacker.ips[family];
        assert_eq!(heard(&socket, || say(&attacker.namespace, own, to, "honest")).0, "honest");
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
    let own = attacker.ips[1];
    assert_eq!(heard(&socket, || say(&attacker.namespace, own, to, "honest")).0, "honest");
    node.call("CHECK", "a", Some(&attacker.namespace), &node.config).unwrap();
}
