//! Which frames are sent on, and which are left to the programs for packets.

use keelson_ebpf_abi::{MEMBER_SERVING, XdpInterface};

use crate::bytes::{ACK, Body, FIN, RST, SYN, Sent, sent, tcp, udp};
use crate::kernel::Kernel;
use crate::stage::{Stage, WAYS, XDP_REDIRECT, XDP_TX};

fn answer_to(hidden: &Sent) -> Sent {
    Sent { source: hidden.destination, destination: hidden.source, ..hidden.clone() }
}

/// The frame is sent on as the programs for packets would have it.
#[track_caller]
fn is_sent_on(stage: &mut Stage, packet: &Sent, action: u32) {
    let frame = stage.to_node(packet);
    let expected = stage.by_packets(&frame).unwrap();
    let (verdict, out) = stage.run(&frame);
    assert_eq!(verdict, action, "{packet:?}");
    assert_eq!(crate::kernel::hex(&out), crate::kernel::hex(&expected), "{packet:?}");
}

#[track_caller]
fn is_left(stage: &Stage, packet: &Sent) {
    stage.passes(&stage.to_node(packet));
}

#[test]
fn known_connections_are_forwarded_both_ways() {
    for [client, service, _] in WAYS {
        for body in [Body::Tcp(ACK), Body::Udp, Body::UdpWithoutChecksum] {
            let mut stage = Stage::new();
            let packet = sent(body, client, service);
            let hidden = stage.connect(&packet);
            is_sent_on(&mut stage, &packet, XDP_TX);
            is_sent_on(&mut stage, &answer_to(&hidden), XDP_TX);
        }
    }
}

#[test]
fn first_packets_are_left_to_others() {
    for [client, service, endpoint] in WAYS {
        let mut stage = Stage::new();
        for packet in [tcp(SYN, client, service), tcp(ACK, client, service), udp(client, service)] {
            is_left(&stage, &packet);
        }
        let hidden = stage.connect(&tcp(ACK, client, service));
        is_left(&stage, &tcp(SYN, client, service));
        is_left(&stage, &Sent { body: Body::Tcp(SYN | ACK), ..answer_to(&hidden) });
        is_left(&stage, &tcp(ACK, client, endpoint));
    }
}

/// Nothing was answered by way of the node yet, so filters in between may still say no.
#[test]
fn answers_are_sent_on_when_one_went_the_long_way() {
    for [client, service, _] in WAYS {
        let mut stage = Stage::new();
        let packet = udp(client, service);
        let left = stage.by_packets(&stage.to_node(&packet)).unwrap();
        let answer = answer_to(&crate::stage::carried(&left, &packet));
        is_left(&stage, &answer);
        is_sent_on(&mut stage, &packet, XDP_TX);
        stage.by_packets(&stage.to_node(&answer)).unwrap();
        is_sent_on(&mut stage, &answer, XDP_TX);
    }
}

#[test]
fn other_interfaces_are_sent_to_when_they_can_send() {
    for (pool, [client, service, _]) in (1..).zip(WAYS) {
        let mut stage = Stage::new();
        let endpoint = if pool == 1 { "10.3.0.5:8080" } else { "[fd03::5]:8080" };
        stage.kernel.pool(pool, &[(endpoint, 0, MEMBER_SERVING)]);
        let packet = tcp(ACK, client, service);
        stage.connect(&packet);
        let (index, link) = stage.interfaces[1];
        let frame = stage.to_node(&packet);
        let mut expected = stage.by_packets(&frame).unwrap();
        expected[6..12].copy_from_slice(&link.0);
        assert_eq!(stage.run(&frame), (XDP_REDIRECT, expected));
        stage.serve(index, XdpInterface { link: link.0, flags: 0 });
        is_left(&stage, &packet);
    }
}

/// Filters at a pod's interface must see what goes there.
#[test]
fn pods_of_the_node_are_left_to_others() {
    for (pool, [client, service, _]) in (1..).zip(WAYS) {
        let mut stage = Stage::new();
        let endpoint = if pool == 1 { "10.1.0.5:8080" } else { "[fd01::5]:8080" };
        stage.kernel.pool(pool, &[(endpoint, 0, MEMBER_SERVING)]);
        let packet = tcp(ACK, client, service);
        stage.connect(&packet);
        is_left(&stage, &packet);
    }
}

#[test]
fn what_is_not_plain_is_left_to_others() {
    for [client, service, _] in WAYS {
        let mut stage = Stage::new();
        let packet = tcp(ACK, client, service);
        stage.connect(&packet);
        let frame = stage.to_node(&packet);
        assert_eq!(stage.run(&frame).0, XDP_TX);
        let mut dressed = packet.clone();
        if packet.is_v4() {
            dressed.options = vec![1, 1, 1, 0];
        } else {
            dressed.extensions = vec![(0, vec![0, 1, 4, 0, 0, 0, 0])];
        }
        is_left(&stage, &dressed);
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut frame = frame.clone();
            change(&mut frame);
            if packet.is_v4() {
                frame[24..26].fill(0);
                let sum = crate::bytes::checksum(&frame[14..34]);
                frame[24..26].copy_from_slice(&sum.to_be_bytes());
            }
            frame
        };
        let hops = if packet.is_v4() { 22 } else { 21 };
        stage.passes(&changed(&|frame| frame[hops] = 1));
        stage.passes(&changed(&|frame| frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 77])));
        // A VLAN's.
        stage.passes(&changed(&|frame| {
            frame.splice(12..12, [0x81, 0, 0, 5]);
        }));
        if packet.is_v4() {
            // A piece.
            stage.passes(&changed(&|frame| frame[20] = 0x20));
            let mut broken = frame.clone();
            broken[24] ^= 1;
            stage.passes(&broken);
        }
    }
}

/// A sender on the same machine leaves the checksum to hardware that is not there.
#[test]
fn unfinished_checksums_are_left_to_others() {
    for [client, service, _] in WAYS {
        for packet in [tcp(ACK, client, service), udp(client, service)] {
            let mut stage = Stage::new();
            stage.connect(&packet);
            let mut frame = stage.to_node(&packet);
            let transport = if packet.is_v4() { 34 } else { 54 };
            let at = transport + packet.checksum_at();
            let length = u32::try_from(frame.len() - transport).unwrap();
            let mut pseudo = crate::bytes::octets(packet.source.ip());
            pseudo.extend(crate::bytes::octets(packet.destination.ip()));
            pseudo.extend(length.to_be_bytes());
            pseudo.extend(u32::from(packet.protocol()).to_be_bytes());
            let sum = !crate::bytes::checksum(&pseudo);
            frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            stage.passes(&frame);
        }
    }
}

#[test]
fn truncated_at_every_byte_it_is_left_to_others() {
    for [client, service, _] in WAYS {
        for packet in [tcp(ACK, client, service), udp(client, service)] {
            let mut stage = Stage::new();
            stage.connect(&packet);
            let frame = stage.to_node(&packet);
            for length in 14..frame.len() {
                stage.passes(&frame[..length]);
            }
            assert_eq!(stage.run(&frame).0, XDP_TX);
        }
    }
}

#[test]
fn too_long_frames_are_left_to_the_kernel() {
    for [client, service, _] in WAYS {
        let mut stage = Stage::new();
        let mut packet = tcp(ACK, client, service);
        stage.connect(&packet);
        let headers = if packet.is_v4() { 40 } else { 60 };
        packet.payload = vec![7; 1500 - headers];
        is_sent_on(&mut stage, &packet, XDP_TX);
        packet.payload.push(7);
        is_left(&stage, &packet);
    }
}

#[test]
fn unknown_neighbours_are_left_to_the_kernel() {
    for (pool, [client, service, _]) in (1..).zip(WAYS) {
        let mut stage = Stage::new();
        let endpoint = if pool == 1 { "198.51.100.50:8080" } else { "[2001:db8:9::50]:8080" };
        stage.kernel.pool(pool, &[(endpoint, 0, MEMBER_SERVING)]);
        let packet = tcp(ACK, client, service);
        stage.connect(&packet);
        is_left(&stage, &packet);
    }
}

#[test]
fn a_connections_end_is_noted() {
    for [client, service, _] in WAYS {
        let mut stage = Stage::new();
        let packet = |flags| tcp(flags, client, service);
        let hidden = stage.connect(&packet(ACK));
        let answer = |flags| Sent { body: Body::Tcp(flags), ..answer_to(&hidden) };
        assert_eq!(stage.run(&stage.to_node(&packet(FIN | ACK))).0, XDP_TX);
        assert_eq!(stage.run(&stage.to_node(&answer(FIN | ACK))).0, XDP_TX);
        assert_eq!(stage.run(&stage.to_node(&packet(ACK))).0, XDP_TX);
        assert!(
            stage.flows().into_iter().flatten().all(|(_, flow)| flow.is_over(flow.last_seen_ns))
        );
        assert_eq!(stage.run(&stage.to_node(&answer(RST))).0, XDP_TX);
    }
}

#[test]
fn datagrams_leave_an_endpoint_that_is_gone() {
    for (pool, [client, service, endpoint]) in (1..).zip(WAYS) {
        let mut stage = Stage::new();
        let packet = udp(client, service);
        stage.connect(&packet);
        assert_eq!(stage.run(&stage.to_node(&packet)).0, XDP_TX);
        stage.kernel.pool(pool, &[(endpoint, 0, 0)]);
        is_left(&stage, &packet);
    }
}

#[test]
fn frames_and_bytes_are_counted() {
    let mut stage = Stage::new();
    let [client, service, _] = WAYS[0];
    let packet = tcp(ACK, client, service);
    stage.connect(&packet);
    let counted = |kernel: &Kernel| (kernel.counters(1).packets, kernel.counters(1).bytes);
    let before = counted(&stage.kernel);
    assert_eq!(stage.run(&stage.to_node(&packet)).0, XDP_TX);
    let bytes = packet.packet().len() as u64;
    assert_eq!(counted(&stage.kernel), (before.0 + 1, before.1 + bytes));
}
