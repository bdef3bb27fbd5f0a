//! Packets in pieces.

use keelson_ebpf_abi::{
    ADDRESS_CLUSTER_IP, DROP_FRAGMENT, MASQUERADE_ALWAYS, MASQUERADE_NEVER, MEMBER_SERVING,
};

use crate::bytes::{Sent, framed, udp, v4, v6};
use crate::kernel::{DROP, Kernel, PASS, hex, to_pool};

const WAYS: [[&str; 3]; 2] = [
    ["198.51.100.7:40001", "10.96.0.10:80", "10.1.0.5:8080"],
    ["[2001:db8:9::7]:40001", "[fd96::10]:80", "[fd01::5]:8080"],
];

fn kernel(masquerade: u8) -> Kernel {
    let mut kernel = Kernel::new();
    for (pool, [_, service, endpoint]) in (1..).zip(WAYS) {
        kernel.pool(pool, &[(endpoint, 0, MEMBER_SERVING)]);
        kernel.frontend(service, 17, to_pool(pool, pool, masquerade));
    }
    kernel.address("10.96.0.10", ADDRESS_CLUSTER_IP);
    kernel.address("fd96::10", ADDRESS_CLUSTER_IP);
    kernel
}

/// The pieces that a packet is cut into.
fn pieces(packet: &Sent, id: u16) -> Vec<Vec<u8>> {
    const SIZE: usize = 64;
    let whole = packet.packet();
    let body = &whole[if packet.is_v4() { 20 } else { 40 }..];
    let (source, destination) = (packet.source.ip(), packet.destination.ip());
    let count = body.chunks(SIZE).len();
    let piece = |(i, chunk): (usize, &[u8])| {
        let more = i + 1 < count;
        let offset = u16::try_from(i * SIZE).unwrap();
        let bytes = if packet.is_v4() {
            let mut bytes = v4(source, destination, 17, &[], chunk);
            bytes[4..6].copy_from_slice(&id.to_be_bytes());
            bytes[6..8].copy_from_slice(&((offset / 8) | (u16::from(more) << 13)).to_be_bytes());
            bytes[10..12].copy_from_slice(&[0, 0]);
            let sum = crate::bytes::checksum(&bytes[..20]);
            bytes[10..12].copy_from_slice(&sum.to_be_bytes());
            bytes
        } else {
            let mut body = vec![17, 0];
            body.extend((offset | u16::from(more)).to_be_bytes());
            body.extend([0, 0]);
            body.extend(id.to_be_bytes());
            body.extend(chunk);
            v6(source, destination, 44, &body)
        };
        framed(&bytes)
    };
    body.chunks(SIZE).enumerate().map(piece).collect()
}

fn large(from: &str, to: &str) -> Sent {
    let mut packet = udp(from, to);
    packet.payload = (0..=255).collect();
    packet
}

#[track_caller]
fn become_(kernel: &mut Kernel, hook: &str, packet: &Sent, expected: &Sent, id: u16) {
    for (piece, expected) in pieces(packet, id).iter().zip(pieces(expected, id)) {
        let (verdict, bytes) = kernel.run(hook, piece);
        assert_eq!(verdict, PASS);
        assert_eq!(hex(&bytes), hex(&expected));
    }
}

#[test]
fn all_pieces_go_the_way_of_the_first() {
    let mut kernel = kernel(MASQUERADE_NEVER);
    for [client, service, endpoint] in WAYS {
        for id in [1, 2] {
            let packet = large(client, service);
            let forwarded = packet.clone().to(endpoint);
            become_(&mut kernel, "ingress", &packet, &forwarded, id);
            become_(&mut kernel, "egress", &forwarded, &forwarded, id);
            let answer = large(endpoint, client);
            become_(&mut kernel, "ingress", &answer, &answer, id);
            become_(&mut kernel, "egress", &answer, &answer.clone().from(service), id);
        }
    }
}

#[test]
fn pieces_are_masqueraded() {
    let mut kernel = kernel(MASQUERADE_ALWAYS);
    let [client, service, endpoint] = WAYS[0];
    let packet = large(client, service);
    let forwarded = packet.clone().to(endpoint);
    become_(&mut kernel, "ingress", &packet, &forwarded, 1);
    let first = &pieces(&forwarded, 1)[0];
    let (_, bytes) = kernel.run("egress", first);
    let port = u16::from_be_bytes([bytes[34], bytes[35]]);
    let hidden = forwarded.clone().from(&format!("192.0.2.1:{port}"));
    become_(&mut kernel, "egress", &forwarded, &hidden, 1);
}

#[test]
fn a_piece_without_its_first_is_dropped_if_only_a_service_could_want_it() {
    let mut kernel = kernel(MASQUERADE_NEVER);
    for [client, service, endpoint] in WAYS {
        let piece = &pieces(&large(client, service), 9)[1];
        assert_eq!(kernel.run("ingress", piece).0, DROP);
        let piece = &pieces(&large(client, endpoint), 9)[1];
        assert_eq!(kernel.run("ingress", piece), (PASS, piece.clone()));
    }
    assert_eq!(kernel.drops()[DROP_FRAGMENT as usize], 2);
}

#[test]
fn pieces_of_others_are_not_remembered() {
    let mut kernel = kernel(MASQUERADE_NEVER);
    let packet = large("198.51.100.7:40001", "203.0.113.9:53");
    become_(&mut kernel, "ingress", &packet, &packet, 1);
    become_(&mut kernel, "egress", &packet, &packet, 1);
    let fragments = kernel
        .hash::<keelson_ebpf_abi::FragmentKey, keelson_ebpf_abi::FragmentPorts>("fragments")
        .iter()
        .count();
    assert_eq!(fragments, 0);
}
