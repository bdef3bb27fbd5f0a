//! Destinations of what arrives, sources of what leaves.

use keelson_ebpf_abi::{
    ADDRESS_NODE, ADDRESS_NODE_PORTS, Address, DROP_NO_SUCH_ADDRESS, DROP_POLICY, DROP_SOURCE,
    FRONTEND_HAS_SOURCES, Frontend, MASQUERADE_NEVER, MEMBER_DRAINING, MEMBER_SERVING, Route,
    VERDICT_DROP,
};

use crate::bytes::{ACK, Body, SYN, Sent, sent, tcp, udp};
use crate::kernel::{DROP, Kernel, NODE4, PASS, same, to_pool};

const TCP: u8 = 6;
const UDP: u8 = 17;
/// A family's client, Service, and endpoint.
const WAYS: [[&str; 3]; 2] = [
    ["198.51.100.7:40001", "10.96.0.10:80", "10.1.0.5:8080"],
    ["[2001:db8:9::7]:40001", "[fd96::10]:80", "[fd01::5]:8080"],
];

fn kernel() -> Kernel {
    let mut kernel = Kernel::new();
    for (pool, [_, service, endpoint]) in (1..).zip(WAYS) {
        kernel.pool(pool, &[(endpoint, 0, MEMBER_SERVING)]);
        for protocol in [TCP, UDP] {
            kernel.frontend(service, protocol, to_pool(pool, pool, MASQUERADE_NEVER));
        }
    }
    kernel
}

/// There and back, first and further packets.
#[track_caller]
fn goes_there_and_back(
    kernel: &mut Kernel,
    packets: [Sent; 3],
    [client, service, endpoint]: [&str; 3],
) {
    let [first, answer, further] = packets;
    for packet in [first, further] {
        let packet = packet.from(client).to(service);
        kernel.arrives_as(&packet, &packet.clone().to(endpoint));
        let answer = answer.clone().from(endpoint).to(client);
        // The answer is the client's, whom nothing at ingress concerns.
        kernel.arrives_as(&answer, &answer);
        kernel.leaves_as(&answer, &answer.clone().from(service));
        let forwarded = packet.to(endpoint);
        kernel.leaves_as(&forwarded, &forwarded);
    }
}

#[test]
fn a_connection_goes_to_the_endpoint_and_its_answers_come_from_the_service() {
    let mut kernel = kernel();
    for way in WAYS {
        let [a, b, _] = way;
        let packets = [tcp(SYN, a, b), tcp(SYN | ACK, a, b), tcp(ACK, a, b)];
        goes_there_and_back(&mut kernel, packets, way);
    }
}

#[test]
fn datagrams_go_there_and_back_with_checksum_and_without() {
    let mut kernel = kernel();
    for way in WAYS {
        let [a, b, _] = way;
        for body in [Body::Udp, Body::UdpWithoutChecksum] {
            goes_there_and_back(&mut kernel, [(); 3].map(|()| sent(body, a, b)), way);
        }
    }
}

#[test]
fn sctp_goes_there_and_back() {
    const INIT: u8 = 1;
    const INIT_ACK: u8 = 2;
    const DATA: u8 = 0;
    let mut kernel = kernel();
    for way in WAYS {
        kernel.frontend(way[1], 132, to_pool(9, 1 + u32::from(way[1].starts_with('[')), 0));
        let [a, b, _] = way;
        for body in [Body::Sctp, Body::SctpWithoutChecksum] {
            let packets = [INIT, INIT_ACK, DATA].map(|chunk| sent(body(chunk), a, b));
            goes_there_and_back(&mut kernel, packets, way);
        }
    }
}

#[test]
fn options_and_extension_headers_are_skipped() {
    let mut kernel = kernel();
    for (way, is_v4) in WAYS.into_iter().zip([true, false]) {
        let [a, b, _] = way;
        let dressed = |flags| {
            let mut packet = tcp(flags, a, b);
            if is_v4 {
                packet.options = vec![0x94, 4, 0, 0, 1, 1, 1, 0];
            } else {
                packet.extensions = vec![
                    (0, vec![0, 1, 4, 0, 0, 0, 0]),
                    (60, [vec![1], vec![0; 14]].concat()),
                    (51, [vec![1], vec![0; 10]].concat()),
                ];
            }
            packet
        };
        goes_there_and_back(&mut kernel, [SYN, SYN | ACK, ACK].map(dressed), way);
    }
}

#[test]
fn what_no_service_concerns_is_not_touched() {
    let mut kernel = kernel();
    for packet in [
        tcp(SYN, "198.51.100.7:40001", "10.96.0.11:80"),
        tcp(SYN, "198.51.100.7:40001", "10.96.0.10:81"),
        udp("[2001:db8:9::7]:40001", "[fd96::11]:80"),
        udp("10.1.0.5:8080", "198.51.100.7:40001"),
    ] {
        kernel.arrives_as(&packet, &packet);
        kernel.leaves_as(&packet, &packet);
    }
    assert!(kernel.flows("flows_in").is_empty());
    assert!(kernel.flows("flows_out").is_empty());
}

#[test]
fn truncated_at_every_byte_nothing_is_harmed() {
    let mut kernel = kernel();
    for [client, service, endpoint] in WAYS {
        for packet in [tcp(SYN, client, service), udp(client, service)] {
            let whole = packet.bytes();
            // The kernel runs no program on less.
            let least = 14 + if packet.is_v4() { 20 } else { 40 };
            let translated = packet.to(endpoint).bytes();
            for length in least..whole.len() {
                let (verdict, out) = kernel.run("ingress", &whole[..length]);
                assert_eq!(verdict, PASS);
                let is_either = out == whole[..length] || out == translated[..length];
                assert!(is_either, "{length} bytes: {out:02x?}");
            }
        }
    }
}

#[test]
fn node_ports_answer_at_the_nodes_addresses_only() {
    let mut kernel = kernel();
    kernel.frontend_at(Address::ANY4, 30080, TCP, to_pool(7, 1, MASQUERADE_NEVER));
    kernel.address(NODE4, ADDRESS_NODE | ADDRESS_NODE_PORTS);
    kernel.address("192.0.2.2", ADDRESS_NODE);
    let packet = tcp(SYN, "198.51.100.7:40001", "192.0.2.1:30080");
    kernel.arrives_as(&packet, &packet.clone().to("10.1.0.5:8080"));
    for other in ["192.0.2.2:30080", "192.0.2.3:30080", "192.0.2.1:30081"] {
        let packet = packet.clone().to(other);
        kernel.arrives_as(&packet, &packet);
    }
}

#[test]
fn pods_and_others_go_different_ways() {
    let mut kernel = kernel();
    let inside = to_pool(1, 1, MASQUERADE_NEVER).inside;
    let outside = Route { verdict: VERDICT_DROP, ..inside };
    kernel.frontend("10.96.0.20:80", TCP, Frontend { inside, outside, number: 9, flags: 0 });
    let pod = tcp(SYN, "10.1.2.3:1234", "10.96.0.20:80");
    kernel.arrives_as(&pod, &pod.clone().to("10.1.0.5:8080"));
    assert_eq!(kernel.arrives(&pod.clone().from("198.51.100.7:1234")).0, DROP);
    assert_eq!(kernel.drops()[DROP_POLICY as usize], 1);
    let counters = kernel.counters(9);
    assert_eq!((counters.connections, counters.refused), (1, 1));
    kernel.settings(0);
    assert_eq!(kernel.arrives(&pod.from("10.1.2.3:4321")).0, DROP, "pods are not known now");
}

#[test]
fn only_given_sources_get_in() {
    let mut kernel = kernel();
    let frontend = Frontend { flags: FRONTEND_HAS_SOURCES, ..to_pool(9, 1, MASQUERADE_NEVER) };
    kernel.frontend("10.96.0.20:80", TCP, frontend);
    kernel.source(9, "198.51.100.0", 28);
    let packet = tcp(SYN, "198.51.100.7:40001", "10.96.0.20:80");
    kernel.arrives_as(&packet, &packet.clone().to("10.1.0.5:8080"));
    assert_eq!(kernel.arrives(&packet.from("198.51.100.17:40001")).0, DROP);
    assert_eq!(kernel.drops()[DROP_SOURCE as usize], 1);
}

#[test]
fn an_address_of_a_service_range_that_nobody_has_leads_nowhere() {
    let mut kernel = kernel();
    kernel.range("service_ranges", "10.96.0.0", 16);
    kernel.range("service_ranges", "fd96::", 112);
    for packet in [
        tcp(SYN, "198.51.100.7:40001", "10.96.0.11:80"),
        udp("[2001:db8:9::7]:40001", "[fd96::11]:80"),
    ] {
        assert_eq!(kernel.arrives(&packet).0, DROP);
    }
    assert_eq!(kernel.drops()[DROP_NO_SUCH_ADDRESS as usize], 2);
}

#[test]
fn datagrams_leave_an_endpoint_that_is_gone_and_stay_with_one_that_drains() {
    let mut kernel = kernel();
    let packet = udp("198.51.100.7:40001", "10.96.0.10:80");
    kernel.arrives_as(&packet, &packet.clone().to("10.1.0.5:8080"));
    // A new pod serves and the old one drains: it keeps the flow.
    kernel.pool(1, &[("10.1.0.6:8080", 0, MEMBER_SERVING), ("10.1.0.5:8080", 0, MEMBER_DRAINING)]);
    kernel
        .hash("pools")
        .insert(1u32, keelson_ebpf_abi::Pool { count: 1, affinity_secs: 0 }, 0)
        .unwrap();
    kernel.arrives_as(&packet, &packet.clone().to("10.1.0.5:8080"));
    // It is gone.
    kernel.pool(1, &[("10.1.0.6:8080", 0, MEMBER_SERVING), ("10.1.0.5:8080", 0, 0)]);
    kernel
        .hash("pools")
        .insert(1u32, keelson_ebpf_abi::Pool { count: 1, affinity_secs: 0 }, 0)
        .unwrap();
    kernel.arrives_as(&packet, &packet.clone().to("10.1.0.6:8080"));
    let answer = udp("10.1.0.6:8080", "198.51.100.7:40001");
    kernel.leaves_as(&answer, &answer.clone().from("10.96.0.10:80"));
    // What the old one still says is understood.
    let late = udp("10.1.0.5:8080", "198.51.100.7:40001");
    kernel.leaves_as(&late, &late.clone().from("10.96.0.10:80"));
}

#[test]
fn connections_stay_with_an_endpoint_that_is_gone() {
    let mut kernel = kernel();
    let packet = tcp(SYN, "198.51.100.7:40001", "10.96.0.10:80");
    kernel.arrives_as(&packet, &packet.clone().to("10.1.0.5:8080"));
    kernel.pool(1, &[("10.1.0.6:8080", 0, MEMBER_SERVING)]);
    for flags in [SYN, ACK] {
        let packet = tcp(flags, "198.51.100.7:40001", "10.96.0.10:80");
        kernel.arrives_as(&packet, &packet.clone().to("10.1.0.5:8080"));
    }
    let other = packet.from("198.51.100.7:40002");
    same(&kernel.arrives(&other), &other.clone().to("10.1.0.6:8080"));
}

#[test]
fn packets_and_bytes_are_counted_both_ways() {
    let mut kernel = kernel();
    let packet = tcp(SYN, "198.51.100.7:40001", "10.96.0.10:80");
    kernel.arrives(&packet);
    kernel.leaves(&tcp(SYN | ACK, "10.1.0.5:8080", "198.51.100.7:40001"));
    let counters = kernel.counters(1);
    let length = packet.packet().len() as u64;
    assert_eq!(
        (counters.connections, counters.packets, counters.bytes, counters.refused),
        (1, 2, 2 * length, 0)
    );
}
