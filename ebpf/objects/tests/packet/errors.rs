//! ICMP errors about packets that were translated.

use std::net::{IpAddr, SocketAddr};

use keelson_ebpf_abi::{MASQUERADE_ALWAYS, MASQUERADE_NEVER, MEMBER_SERVING};

use crate::bytes::{ACK, SYN, Sent, checksum, framed, tcp, transport_sum, udp, v4, v6};
use crate::kernel::{Kernel, PASS, hex, ip, to_pool};

/// A family's client, Service, endpoint, router on the way, and node.
const WAYS: [[&str; 5]; 2] = [
    ["198.51.100.7:40001", "10.96.0.10:80", "10.1.0.5:8080", "203.0.113.1", "192.0.2.1"],
    ["[2001:db8:9::7]:40001", "[fd96::10]:80", "[fd01::5]:8080", "2001:db8:5::1", "2001:db8::1"],
];

fn kernel(masquerade: u8) -> Kernel {
    let mut kernel = Kernel::new();
    for (pool, [_, service, endpoint, ..]) in (1..).zip(WAYS) {
        kernel.pool(pool, &[(endpoint, 0, MEMBER_SERVING)]);
        for protocol in [6, 17] {
            kernel.frontend(service, protocol, to_pool(pool, pool, masquerade));
        }
    }
    kernel
}

/// An error from `source` to `destination` about a packet, which is quoted in full. The quoted transport's checksum is
/// that of `original`, since translation leaves it alone.
fn error(source: IpAddr, destination: IpAddr, about: &Sent, original: &Sent) -> Vec<u8> {
    too_long(source, destination, about, original, 0x0514)
}

/// The same, with the size that is possible.
pub(crate) fn too_long(
    source: IpAddr,
    destination: IpAddr,
    about: &Sent,
    original: &Sent,
    size: u16,
) -> Vec<u8> {
    let mut quoted = about.packet();
    let place =
        |packet: &[u8]| packet.len() - about.payload.len() - about.header() + about.checksum_at();
    let (at, kept) = (place(&quoted), original.packet());
    let from = place(&kept);
    quoted[at..at + 2].copy_from_slice(&kept[from..from + 2]);
    // Packet too big or fragmentation needed, with a size.
    let mut body = if about.is_v4() { vec![3, 4] } else { vec![2, 0] };
    body.extend([0, 0, 0, 0]);
    body.extend(size.to_be_bytes());
    body.extend(quoted);
    let is_v4 = about.is_v4();
    let sum = if is_v4 { checksum(&body) } else { transport_sum(source, destination, 58, &body) };
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    framed(&if is_v4 {
        v4(source, destination, 1, &[], &body)
    } else {
        v6(source, destination, 58, &body)
    })
}

#[track_caller]
pub(crate) fn becomes(kernel: &mut Kernel, hook: &str, error: &[u8], expected: &[u8]) {
    let (verdict, bytes) = kernel.run(hook, error);
    assert_eq!(verdict, PASS);
    assert_eq!(hex(&bytes), hex(expected));
}

#[test]
fn the_client_hears_of_its_own_packet() {
    let mut kernel = kernel(MASQUERADE_NEVER);
    for [client, service, endpoint, router, _] in WAYS {
        for packet in [tcp(SYN, client, service), udp(client, service)] {
            kernel.arrives(&packet);
            let forwarded = packet.clone().to(endpoint);
            let client = packet.source.ip();
            for (from, seen) in
                [(ip(router), ip(router)), (forwarded.destination.ip(), packet.destination.ip())]
            {
                let sent = error(from, client, &forwarded, &forwarded);
                becomes(&mut kernel, "ingress", &sent, &sent);
                let heard = error(seen, client, &packet, &forwarded);
                becomes(&mut kernel, "egress", &sent, &heard);
            }
        }
    }
}

#[test]
fn the_endpoint_hears_of_its_own_packet() {
    let mut kernel = kernel(MASQUERADE_NEVER);
    for [client, service, endpoint, router, _] in WAYS {
        kernel.arrives(&tcp(SYN, client, service));
        let answer = tcp(ACK, endpoint, client);
        let seen = answer.clone().from(service);
        kernel.leaves_as(&answer, &seen);
        for from in [ip(router), answer.destination.ip()] {
            let sent = error(from, seen.source.ip(), &seen, &seen);
            let heard = error(from, answer.source.ip(), &answer, &seen);
            becomes(&mut kernel, "ingress", &sent, &heard);
            becomes(&mut kernel, "egress", &heard, &heard);
        }
    }
}

#[test]
fn behind_a_masquerade_both_hear_of_their_own_packets() {
    let mut kernel = kernel(MASQUERADE_ALWAYS);
    for (way, transport) in WAYS.into_iter().zip([34, 54]) {
        let [client, service, endpoint, router, node] = way;
        let packet = tcp(SYN, client, service);
        let forwarded = packet.clone().to(endpoint);
        kernel.arrives_as(&packet, &forwarded);
        let (_, bytes) = kernel.leaves(&forwarded);
        let port = u16::from_be_bytes([bytes[transport], bytes[transport + 1]]);
        let node = SocketAddr::new(ip(node), port).to_string();
        let hidden = forwarded.clone().from(&node);
        // A router before the endpoint tells the node.
        let sent = error(ip(router), hidden.source.ip(), &hidden, &hidden);
        let between = error(ip(router), packet.source.ip(), &forwarded, &hidden);
        becomes(&mut kernel, "ingress", &sent, &between);
        becomes(
            &mut kernel,
            "egress",
            &between,
            &error(ip(router), packet.source.ip(), &packet, &hidden),
        );
        // A router before the client tells the Service.
        let answer = tcp(ACK, endpoint, &node);
        let revealed = answer.clone().to(client);
        kernel.arrives_as(&answer, &revealed);
        let seen = revealed.clone().from(service);
        kernel.leaves_as(&revealed, &seen);
        let sent = error(ip(router), seen.source.ip(), &seen, &seen);
        let between = error(ip(router), answer.source.ip(), &revealed, &seen);
        becomes(&mut kernel, "ingress", &sent, &between);
        becomes(
            &mut kernel,
            "egress",
            &between,
            &error(ip(router), answer.source.ip(), &answer, &seen),
        );
    }
}

#[test]
fn cut_off_quotes_and_strangers_do_no_harm() {
    let mut kernel = kernel(MASQUERADE_NEVER);
    for [client, service, endpoint, router, _] in WAYS {
        let packet = udp(client, service);
        kernel.arrives(&packet);
        let forwarded = packet.clone().to(endpoint);
        let whole = error(ip(router), packet.source.ip(), &forwarded, &forwarded);
        let least = if packet.is_v4() { 34 } else { 54 };
        for length in least..whole.len() {
            assert_eq!(kernel.run("egress", &whole[..length]).0, PASS);
        }
        let stranger = udp(client, endpoint).from(&format!("{}:9", bracketed(packet.source.ip())));
        let about = error(ip(router), packet.source.ip(), &stranger, &stranger);
        becomes(&mut kernel, "egress", &about, &about);
    }
}

fn bracketed(address: IpAddr) -> String {
    if address.is_ipv4() { address.to_string() } else { format!("[{address}]") }
}
