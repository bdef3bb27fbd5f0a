//! Answers to those who ask where nobody is.

use keelson_ebpf_abi::{
    ADDRESS_CLUSTER_IP, DROP_UNANSWERED, Frontend, MASQUERADE_NEVER, MEMBER_SERVING, Route,
    SETTING_PASSES_UNKNOWN, VERDICT_REJECT,
};

use crate::bytes::{ACK, Body, FIN, RST, SYN, Sent, framed, sent, tcp, transport_sum, udp, v4, v6};
use crate::kernel::{DROP, Kernel, REDIRECT, hex, to_pool};

const CLIENTS: [[&str; 2]; 2] =
    [["198.51.100.7:40001", "10.96.0.10:80"], ["[2001:db8:9::7]:40001", "[fd96::10]:80"]];

/// With Services that have no endpoint.
fn kernel() -> Kernel {
    let mut kernel = Kernel::new();
    let route = Route { verdict: VERDICT_REJECT, ..Route::default() };
    for (number, [_, service]) in (1..).zip(CLIENTS) {
        for protocol in [6, 17, 132] {
            let frontend = Frontend { inside: route, outside: route, number, flags: 0 };
            kernel.frontend(service, protocol, frontend);
        }
    }
    kernel
}

/// The answer that a packet gets, with the link header turned round.
#[track_caller]
fn is_answered(kernel: &mut Kernel, packet: &Sent, expected: &[u8]) {
    let (verdict, bytes) = kernel.arrives(packet);
    assert_eq!(verdict, REDIRECT, "{packet:?}");
    let mut frame = framed(expected);
    frame[..12].rotate_left(6);
    assert_eq!(hex(&bytes), hex(&frame), "{packet:?}");
}

fn reset(packet: &Sent, sequence: u32, acknowledged: u32, flags: u8) -> Vec<u8> {
    let (source, destination) = (packet.destination, packet.source);
    let mut body = Vec::new();
    body.extend(source.port().to_be_bytes());
    body.extend(destination.port().to_be_bytes());
    body.extend(sequence.to_be_bytes());
    body.extend(acknowledged.to_be_bytes());
    body.extend([5 << 4, flags, 0, 0, 0, 0, 0, 0]);
    let sum = transport_sum(source.ip(), destination.ip(), 6, &body);
    body[16..18].copy_from_slice(&sum.to_be_bytes());
    ours(packet, 6, &body)
}

fn unreachable(packet: &Sent) -> Vec<u8> {
    let original = packet.packet();
    let transport = original.len() - packet.payload.len() - packet.header();
    let (kind, code) = if packet.is_v4() { (3, 3) } else { (1, 4) };
    let mut body = vec![kind, code, 0, 0, 0, 0, 0, 0];
    body.extend(&original[..transport + 8]);
    let sum = if packet.is_v4() {
        crate::bytes::checksum(&body)
    } else {
        transport_sum(packet.destination.ip(), packet.source.ip(), 58, &body)
    };
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    ours(packet, if packet.is_v4() { 1 } else { 58 }, &body)
}

/// Wrapped as the programs do it: no identification, do not fragment.
fn ours(packet: &Sent, protocol: u8, body: &[u8]) -> Vec<u8> {
    let (source, destination) = (packet.destination.ip(), packet.source.ip());
    if !packet.is_v4() {
        return v6(source, destination, protocol, body);
    }
    let mut bytes = v4(source, destination, protocol, &[], body);
    bytes[4..8].copy_from_slice(&[0, 0, 0x40, 0]);
    bytes[10..12].copy_from_slice(&[0, 0]);
    let sum = crate::bytes::checksum(&bytes[..20]);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes
}

#[test]
fn connections_are_reset() {
    let mut kernel = kernel();
    for [client, service] in CLIENTS {
        let mut packet = tcp(SYN, client, service);
        let length = u32::try_from(packet.payload.len()).unwrap();
        is_answered(&mut kernel, &packet, &reset(&packet, 0, 0x0102_0305 + length, RST | ACK));
        packet.payload.clear();
        is_answered(&mut kernel, &packet, &reset(&packet, 0, 0x0102_0305, RST | ACK));
        packet.payload = vec![7; 1300];
        is_answered(&mut kernel, &packet, &reset(&packet, 0, 0x0102_0305 + 1300, RST | ACK));
        packet.body = Body::Tcp(FIN | ACK);
        is_answered(&mut kernel, &packet, &reset(&packet, 0x0506_0708, 0, RST));
    }
}

#[test]
fn datagrams_find_the_port_unreachable() {
    let mut kernel = kernel();
    for [client, service] in CLIENTS {
        for body in [Body::Udp, Body::UdpWithoutChecksum] {
            let mut packet = sent(body, client, service);
            for length in [0, 1, 19, 1200] {
                packet.payload = vec![9; length];
                is_answered(&mut kernel, &packet, &unreachable(&packet));
            }
        }
    }
}

#[test]
fn options_and_extension_headers_are_quoted() {
    let mut kernel = kernel();
    let [client, service] = CLIENTS[0];
    let mut packet = udp(client, service);
    packet.options = [vec![0x94, 4, 0, 0], vec![1; 36]].concat();
    is_answered(&mut kernel, &packet, &unreachable(&packet));
    packet.body = Body::Tcp(SYN | ACK);
    is_answered(&mut kernel, &packet, &reset(&packet, 0x0506_0708, 0, RST));
    let [client, service] = CLIENTS[1];
    let mut packet = udp(client, service);
    packet.extensions = vec![(0, vec![0, 1, 4, 0, 0, 0, 0]), (60, vec![0, 1, 4, 0, 0, 0, 0])];
    is_answered(&mut kernel, &packet, &unreachable(&packet));
    // Too much of them.
    packet.extensions = vec![(60, [vec![15], vec![0; 126]].concat())];
    assert_eq!(kernel.arrives(&packet).0, DROP);
}

#[test]
fn other_ports_of_a_cluster_ip_are_refused() {
    let mut kernel = Kernel::new();
    kernel.address("10.96.0.10", ADDRESS_CLUSTER_IP);
    kernel.address("fd96::10", ADDRESS_CLUSTER_IP);
    for [client, service] in CLIENTS {
        let packet = udp(client, service);
        is_answered(&mut kernel, &packet, &unreachable(&packet));
    }
}

#[test]
fn resets_and_strange_senders_get_no_answer() {
    let mut kernel = kernel();
    let [client, service] = CLIENTS[0];
    assert_eq!(kernel.arrives(&tcp(RST | ACK, client, service)).0, DROP);
    for source in ["0.0.0.0:1", "127.0.0.1:1", "224.0.0.1:1", "255.255.255.255:1"] {
        assert_eq!(kernel.arrives(&udp(source, service)).0, DROP);
    }
    for source in ["[::]:1", "[::1]:1", "[ff02::1]:1"] {
        assert_eq!(kernel.arrives(&udp(source, CLIENTS[1][1])).0, DROP);
    }
    assert_eq!(kernel.drops()[DROP_UNANSWERED as usize], 8);
}

#[test]
fn a_connection_that_was_forgotten_is_reset_or_left_to_netfilter() {
    let mut kernel = kernel();
    kernel.pool(1, &[("10.1.0.5:8080", 0, MEMBER_SERVING)]);
    kernel.frontend(CLIENTS[0][1], 6, to_pool(1, 1, MASQUERADE_NEVER));
    let [client, service] = CLIENTS[0];
    let packet = tcp(ACK, client, service);
    is_answered(&mut kernel, &packet, &reset(&packet, 0x0506_0708, 0, RST));
    assert!(kernel.flows("flows_in").is_empty());
    kernel.settings(SETTING_PASSES_UNKNOWN);
    kernel.arrives_as(&packet, &packet);
    let packet = tcp(SYN, client, service);
    kernel.arrives_as(&packet, &packet.clone().to("10.1.0.5:8080"));
}
