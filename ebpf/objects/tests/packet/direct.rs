//! Direct server return: one node is asked, another one has the endpoint and answers.

use keelson_ebpf_abi::{
    ADDRESS_CLUSTER_IP, ADDRESS_NODE, ADDRESS_NODE_PORTS, Address, DROP_NO_PORT, DROP_OWN_CLIENT,
    DROP_REASONS, DROP_UNKNOWN_SERVICE, ENDPOINT_HERE, ENDPOINT_STRANGER, EVENT_CONNECTED,
    MASQUERADE_ALWAYS, MEMBER_SERVING, SETTING_DIRECT, SETTING_DIRECT_UDP, SETTING_KNOWS_PODS,
    STATE_TELLS, STATE_TOLD, WATCH_ALL,
};

use crate::bytes::{ACK, Body, FIN, SYN, Sent, at, octets, sent, tcp, udp};
use crate::errors::{becomes, too_long};
use crate::kernel::{DROP, Kernel, NODE4, NODE6, PASS, REDIRECT, ip, to_pool};
use crate::model::differing;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// A family's client, node port of the node that is asked, and endpoint elsewhere.
const WAYS: [[&str; 3]; 2] = [
    ["198.51.100.7:40001", "192.0.2.1:30080", "10.1.0.5:8080"],
    ["[2001:db8:9::7]:40001", "[2001:db8::1]:30080", "[fd01::5]:8080"],
];
const INIT: u8 = 1;

fn node(own: [&str; 2], endpoint_flags: u32) -> Kernel {
    let mut kernel = Kernel::new();
    kernel.settings(SETTING_KNOWS_PODS | SETTING_DIRECT | SETTING_DIRECT_UDP);
    let any = [Address::ANY4, Address::ANY6];
    for (number, (([.., endpoint], any), own)) in (1..).zip(WAYS.into_iter().zip(any).zip(own)) {
        kernel.pool(number, &[(endpoint, endpoint_flags.try_into().unwrap(), MEMBER_SERVING)]);
        kernel.address(own, ADDRESS_NODE | ADDRESS_NODE_PORTS);
        for protocol in [6, 17, 132] {
            kernel.frontend_at(any, 30080, protocol, to_pool(number, number, MASQUERADE_ALWAYS));
        }
    }
    kernel
}

/// The node that clients ask.
fn asked() -> Kernel {
    node([NODE4, NODE6], 0)
}

/// The endpoint's.
fn other() -> Kernel {
    node(["192.0.2.2", "2001:db8::2"], u32::from(ENDPOINT_HERE))
}

/// A packet that tells of the Service.
pub(crate) fn telling(mut packet: Sent, service: &str) -> Sent {
    let service = at(service);
    let (port, address) = (service.port().to_be_bytes(), octets(service.ip()));
    if packet.is_v4() {
        let told = [&[0x9e, 8], &port[..], &address].concat();
        packet.options.splice(0..0, told);
    } else {
        let told = [&[2, 0x1e, 20], &address[..], &port, &[0, 0]].concat();
        packet.extensions.insert(0, (60, told));
    }
    packet
}

/// A packet that begins something, of each kind.
fn beginnings([client, service, _]: [&str; 3]) -> [Sent; 4] {
    [Body::Tcp(SYN), Body::Udp, Body::UdpWithoutChecksum, Body::Sctp(INIT)]
        .map(|body| sent(body, client, service))
}

#[test]
fn the_first_packet_tells_whom_the_client_asked_and_the_endpoint_answers_for_it() {
    let (mut asked, mut other) = (asked(), other());
    for way in WAYS {
        let [client, service, endpoint] = way;
        for packet in beginnings(way) {
            let plain = packet.clone().to(endpoint);
            let told = telling(plain.clone(), service);
            // The first time, and again.
            for _ in 0..2 {
                asked.arrives_as(&packet, &told);
                asked.leaves_as(&told, &told);
                other.arrives_as(&told, &plain);
                other.leaves_as(&plain, &plain);
            }
            let answer = Sent { source: plain.destination, destination: plain.source, ..plain };
            other.arrives_as(&answer, &answer);
            other.leaves_as(&answer, &answer.clone().from(service));
        }
        // The rest of a connection tells nothing.
        for flags in [ACK, FIN | ACK] {
            let packet = tcp(flags, client, service);
            let plain = packet.clone().to(endpoint);
            asked.arrives_as(&packet, &plain);
            asked.leaves_as(&plain, &plain);
            other.arrives_as(&plain, &plain);
        }
    }
    assert_eq!(asked.drops(), [0; DROP_REASONS]);
    assert_eq!(other.drops(), [0; DROP_REASONS]);
    let states = |kernel: &mut Kernel| -> Vec<u8> {
        kernel.flows("flows_in").iter().map(|(_, flow)| flow.state).collect()
    };
    assert!(states(&mut asked).iter().all(|state| state & STATE_TELLS != 0));
    assert!(states(&mut other).iter().all(|state| state & STATE_TOLD != 0));
}

#[test]
fn a_connection_is_counted_where_it_is_asked() {
    let (mut asked, mut other) = (asked(), other());
    let [client, service, endpoint] = WAYS[0];
    let packet = tcp(SYN, client, service);
    asked.arrives(&packet);
    other.arrives(&telling(packet.to(endpoint), service));
    other.leaves(&tcp(SYN | ACK, endpoint, client));
    let counted = |kernel: &Kernel| {
        let counters = kernel.counters(1);
        (counters.connections, counters.packets)
    };
    assert_eq!((counted(&asked), counted(&other)), ((1, 1), (0, 1)));
}

#[test]
fn a_monitor_is_told_at_both_nodes() {
    let (mut asked, mut other) = (asked(), other());
    let [client, service, endpoint] = WAYS[1];
    let packet = udp(client, service);
    let told = telling(packet.clone().to(endpoint), service);
    for (kernel, packet) in [(&mut asked, &packet), (&mut other, &told)] {
        kernel.watch(WATCH_ALL);
        kernel.arrives(packet);
        kernel.arrives(packet);
        let events = kernel.events();
        let [event] = events.as_slice() else { panic!("{events:?}") };
        assert_eq!((event.what, event.frontend), (EVENT_CONNECTED, 2));
        assert_eq!(event.tuple.destination, at(service).ip().into());
        assert_eq!(event.to.destination, at(endpoint).ip().into());
    }
}

#[test]
fn what_a_packet_carries_already_stays() {
    let (mut asked, mut other) = (asked(), other());
    for way in WAYS {
        let [_, service, endpoint] = way;
        for mut packet in beginnings(way) {
            if packet.is_v4() {
                packet.options = vec![0x94, 4, 0, 0, 1, 1, 1, 0];
            } else {
                packet.extensions = vec![(60, vec![0, 1, 4, 0, 0, 0, 0])];
            }
            let plain = packet.clone().to(endpoint);
            let told = telling(plain.clone(), service);
            asked.arrives_as(&packet, &told);
            other.arrives_as(&told, &plain);
        }
    }
}

/// What is told twice is believed once.
#[test]
fn clients_that_tell_something_themselves_gain_nothing() {
    let (mut asked, mut other) = (asked(), other());
    for (way, lie) in WAYS.into_iter().zip(["203.0.113.9:1", "[2001:db8:66::]:1"]) {
        let [_, service, endpoint] = way;
        for packet in beginnings(way) {
            let packet = telling(packet, lie);
            let plain = packet.clone().to(endpoint);
            let told = telling(plain.clone(), service);
            asked.arrives_as(&packet, &told);
            other.arrives_as(&told, &plain);
        }
    }
}

#[test]
fn the_client_is_hidden_where_its_packet_has_no_room() {
    let mut asked = asked();
    let [client, service, endpoint] = WAYS[0];
    let mut packet = tcp(SYN, client, service);
    packet.options = vec![1; 36];
    let plain = packet.clone().to(endpoint);
    asked.arrives_as(&packet, &plain);
    assert_ne!(asked.leaves(&plain).1, plain.bytes());
}

#[track_caller]
fn is_hidden(kernel: &mut Kernel, packet: &Sent, endpoint: &str, hidden: bool) {
    let plain = packet.clone().to(endpoint);
    kernel.arrives_as(packet, &plain);
    let (verdict, bytes) = kernel.leaves(&plain);
    assert_eq!(verdict, PASS);
    assert_eq!(bytes != plain.bytes(), hidden);
}

#[test]
fn only_clients_outside_of_endpoints_of_the_cluster_keep_their_address() {
    for ([client, service, endpoint], pod) in WAYS.into_iter().zip(["10.1.2.3:9", "[fd01::9]:9"]) {
        let packet = tcp(SYN, client, service);
        // An endpoint here needs nobody to be told.
        is_hidden(&mut node([NODE4, NODE6], ENDPOINT_HERE.into()), &packet, endpoint, false);
        let stranger = ENDPOINT_STRANGER.into();
        is_hidden(&mut node([NODE4, NODE6], stranger), &packet, endpoint, true);
        is_hidden(&mut asked(), &tcp(SYN, pod, service), endpoint, true);
        // Off, or for TCP alone.
        let mut kernel = asked();
        kernel.settings(SETTING_KNOWS_PODS);
        is_hidden(&mut kernel, &packet, endpoint, true);
        kernel.settings(SETTING_KNOWS_PODS | SETTING_DIRECT);
        is_hidden(&mut kernel, &udp(client, service), endpoint, true);
        let packet = tcp(SYN, client, service).from(&client.replace("40001", "40002"));
        kernel.arrives_as(&packet, &telling(packet.clone().to(endpoint), service));
    }
    let mut kernel = asked();
    kernel.frontend("10.96.0.10:80", 6, to_pool(9, 1, MASQUERADE_ALWAYS));
    kernel.address("10.96.0.10", ADDRESS_CLUSTER_IP);
    is_hidden(&mut kernel, &tcp(SYN, WAYS[0][0], "10.96.0.10:80"), WAYS[0][2], true);
}

/// A bridge with the uplink, or a bond: both ends of it run the program.
#[test]
fn a_second_interface_of_the_node_that_is_asked_changes_nothing() {
    let mut asked = asked();
    for way in WAYS {
        let [_, service, endpoint] = way;
        for packet in beginnings(way) {
            let told = telling(packet.clone().to(endpoint), service);
            asked.arrives_as(&packet, &told);
            asked.arrives_as(&told, &told);
            asked.arrives_as(&packet, &told);
        }
    }
}

#[test]
fn a_service_that_nobody_knows_is_not_told_of() {
    let mut other = other();
    for way in WAYS {
        let [_, service, endpoint] = way;
        for packet in beginnings(way) {
            let before = other.drops()[DROP_UNKNOWN_SERVICE as usize];
            let told = telling(packet.to(endpoint), &service.replace("30080", "30081"));
            assert_eq!(other.arrives(&told).0, DROP);
            assert_eq!(other.drops()[DROP_UNKNOWN_SERVICE as usize], before + 1);
        }
    }
    assert!(other.flows("flows_in").is_empty() && other.flows("flows_out").is_empty());
}

#[test]
fn a_node_that_asks_another_one_for_its_own_endpoint_is_told_why_not() {
    let mut other = other();
    let [_, service, endpoint] = WAYS[0];
    let told = telling(tcp(SYN, "192.0.2.2:40001", endpoint), service);
    assert_eq!(other.arrives(&told).0, DROP);
    assert_eq!(other.drops()[DROP_OWN_CLIENT as usize], 1);
}

#[test]
fn a_node_that_takes_no_part_does_not_look() {
    let mut other = other();
    other.settings(SETTING_KNOWS_PODS);
    for way in WAYS {
        let [_, service, endpoint] = way;
        for packet in beginnings(way) {
            let told = telling(packet.to(endpoint), service);
            other.arrives_as(&told, &told);
        }
    }
    assert!(other.flows("flows_in").is_empty());
}

#[test]
fn what_only_looks_like_it_passes() {
    let mut other = other();
    for ([client, service, endpoint], first) in WAYS.into_iter().zip([34, 54]) {
        // No beginning of anything.
        for flags in [ACK, SYN | ACK, FIN | ACK] {
            let packet = telling(tcp(flags, client, endpoint), service);
            other.arrives_as(&packet, &packet);
        }
        // Another kind or length, in an otherwise right packet.
        let whole = telling(udp(client, endpoint), service).bytes();
        let of_option = if first == 34 { 0..2 } else { 1..4 };
        for place in of_option {
            let mut bytes = whole.clone();
            bytes[first + place] ^= 1;
            assert_eq!(other.run("ingress", &bytes).1, bytes, "{place}");
        }
        // Behind another option.
        let mut packet = telling(udp(client, endpoint), service);
        if packet.is_v4() {
            packet.options.splice(0..0, [1, 1, 1, 1]);
        } else {
            packet.extensions.insert(0, (60, vec![0, 1, 4, 0, 0, 0, 0]));
        }
        other.arrives_as(&packet, &packet);
        // Cut off anywhere. The kernel runs no program on less.
        for length in first..whole.len() {
            let (verdict, out) = other.run("ingress", &whole[..length]);
            let removed = if first == 34 { 8 } else { 24 };
            assert!(verdict == DROP || [length, length - removed].contains(&out.len()), "{length}");
        }
    }
}

#[test]
fn an_endpoint_that_is_itself_a_services_address_is_not_believed() {
    let mut other = other();
    let [client, service, _] = WAYS[0];
    let mine = telling(tcp(SYN, client, "192.0.2.2:30080"), service);
    other.arrives_as(&mine, &mine.clone().to(WAYS[0][2]));
}

#[test]
fn a_port_that_the_endpoint_knows_already_is_hidden_or_refused() {
    let (mut asked, mut other) = (asked(), other());
    for ([client, service, endpoint], external) in
        WAYS.into_iter().zip(["203.0.113.80:80", "[2001:db8:80::]:80"])
    {
        let number = if service.starts_with('[') { 2 } else { 1 };
        for kernel in [&mut asked, &mut other] {
            kernel.frontend(external, 6, to_pool(7, number, MASQUERADE_ALWAYS));
        }
        let (first, second) = (tcp(SYN, client, service), tcp(SYN, client, external));
        let told = telling(first.clone().to(endpoint), service);
        asked.arrives_as(&first, &told);
        let (verdict, bytes) = asked.arrives(&second);
        assert_eq!(verdict, PASS);
        assert_eq!(bytes.len(), second.bytes().len(), "it tells something");
        // Asked at another node, which does not know.
        other.arrives(&told);
        let before = other.drops()[DROP_NO_PORT as usize];
        assert_eq!(other.arrives(&telling(second.to(endpoint), external)).0, DROP);
        assert_eq!(other.drops()[DROP_NO_PORT as usize], before + 1);
    }
}

/// What the other side did is not seen: who has closed one side does not begin again with its ports otherwise.
#[test]
fn the_next_connection_with_the_same_ports_begins_anew() {
    let (mut asked, mut other) = (asked(), other());
    let [client, service, old] = WAYS[0];
    let new = "10.1.0.6:8080";
    let begin = tcp(SYN, client, service);
    asked.arrives_as(&begin, &telling(begin.clone().to(old), service));
    other.arrives(&telling(begin.clone().to(old), service));
    let answer = tcp(SYN | ACK, old, client);
    other.leaves_as(&answer, &answer.clone().from(service));
    let end = tcp(FIN | ACK, client, service);
    asked.arrives_as(&end, &end.clone().to(old));
    other.leaves(&tcp(FIN | ACK, old, client));
    asked.pool(1, &[(new, 0, MEMBER_SERVING)]);
    // What is left of it goes where it went.
    let late = tcp(ACK, client, service);
    asked.arrives_as(&late, &late.clone().to(old));
    asked.arrives_as(&begin, &telling(begin.clone().to(new), service));
    // Nobody takes an answer of the old endpoint to a connection past the Service for one of the old connection.
    other.leaves_as(&answer, &answer);
    other.arrives(&telling(begin.clone().to(old), service));
    other.leaves_as(&answer, &answer.clone().from(service));
    let flows = other.flows("flows_out");
    assert!(flows.iter().all(|(_, flow)| !flow.is_half_closed()), "{flows:?}");
}

#[test]
fn datagrams_leave_an_endpoint_that_is_gone() {
    let mut asked = asked();
    let [client, service, old] = WAYS[0];
    let new = "10.1.0.6:8080";
    let packet = udp(client, service);
    asked.arrives_as(&packet, &telling(packet.clone().to(old), service));
    asked.pool(1, &[(new, 0, MEMBER_SERVING)]);
    let key =
        keelson_ebpf_abi::MemberKey { pool: 1, endpoint: crate::kernel::endpoint_of(at(old)) };
    asked.hash::<_, u32>("members").remove(&key).unwrap();
    asked.arrives_as(&packet, &telling(packet.clone().to(new), service));
}

/// The first piece tells; another one needs nothing at the endpoint's node.
#[test]
fn the_first_piece_tells() {
    let (mut asked, mut other) = (asked(), other());
    for [client, service, endpoint] in WAYS {
        let packet = udp(client, service);
        let plain = packet.clone().to(endpoint);
        let told = telling(plain.clone(), service);
        let first = |packet: &Sent| {
            let mut packet = packet.clone();
            if packet.is_v4() {
                let mut bytes = packet.packet();
                bytes[6] = 0x20;
                bytes[10..12].fill(0);
                let header = usize::from(bytes[0] & 15) * 4;
                let sum = crate::bytes::checksum(&bytes[..header]);
                bytes[10..12].copy_from_slice(&sum.to_be_bytes());
                return crate::bytes::framed(&bytes);
            }
            packet.extensions.push((44, vec![0, 0, 1, 0, 0, 0, 7]));
            packet.bytes()
        };
        assert_eq!(asked.run("ingress", &first(&packet)), (PASS, first(&told)));
        assert_eq!(other.run("ingress", &first(&told)), (PASS, first(&plain)));
    }
}

/// Errors to the client are about what it sent; what was told made the packet longer than that.
#[test]
fn the_client_hears_how_long_its_own_packets_may_be() {
    let (mut asked, mut other) = (asked(), other());
    for ([client, service, endpoint], router) in
        WAYS.into_iter().zip(["203.0.113.1", "2001:db8:77::1"])
    {
        let (packet, router) = (udp(client, service), ip(router));
        let longer = if packet.is_v4() { 8 } else { 24 };
        let plain = packet.clone().to(endpoint);
        let told = telling(plain.clone(), service);
        asked.arrives_as(&packet, &told);
        let to = packet.source.ip();
        let sent = too_long(router, to, &told, &told, 1300);
        // What was told is still quoted.
        let heard = too_long(router, to, &telling(packet.clone(), service), &told, 1300 - longer);
        becomes(&mut asked, "egress", &sent, &heard);
        // Of others that tell nothing (the rest of a TCP connection) the size is right.
        let tcp = tcp(SYN, client, service);
        asked.arrives(&tcp);
        let forwarded = tcp.clone().to(endpoint);
        let sent = too_long(router, to, &forwarded, &forwarded, 1300);
        becomes(&mut asked, "egress", &sent, &too_long(router, to, &tcp, &forwarded, 1300));
        // The endpoint's own come from the Service.
        other.arrives_as(&told, &plain);
        let sent = too_long(plain.destination.ip(), to, &plain, &plain, 1300);
        let seen = too_long(packet.destination.ip(), to, &packet, &plain, 1300);
        becomes(&mut other, "egress", &sent, &seen);
        // About answers, the node hears whose address they carry.
        let answer = Sent { source: plain.destination, destination: plain.source, ..plain.clone() };
        let seen = answer.clone().from(service);
        let sent = too_long(router, seen.source.ip(), &seen, &seen, 1300);
        let heard = too_long(router, answer.source.ip(), &answer, &seen, 1300);
        becomes(&mut asked, "ingress", &sent, &heard);
    }
}

/// Whatever another node sends, what goes on is either whole or as it was.
#[test]
fn broken_packets_that_tell_something_harm_nothing() {
    let config = Config { cases: 1500, failure_persistence: None, ..Config::default() };
    let kernel = std::cell::RefCell::new(other());
    let packets: Vec<Sent> = WAYS
        .into_iter()
        .flat_map(|way| beginnings(way).map(|packet| telling(packet.to(way[2]), way[1])))
        .collect();
    let changes = prop::collection::vec((0usize..100, any::<u8>()), 0..5);
    let broken = (prop::sample::select(packets), changes, 0usize..60);
    TestRunner::new(config)
        .run(&broken, |(packet, changes, cut)| {
            let bytes = packet.damaged(&changes, cut);
            let (verdict, out) = kernel.borrow_mut().run("ingress", &bytes);
            prop_assert!([PASS, DROP, REDIRECT].contains(&verdict));
            if verdict == PASS {
                let shorter = bytes.len() - out.len();
                prop_assert!([0, 8, 24].contains(&shorter), "{shorter}");
                prop_assert_eq!(differing(&bytes), differing(&out));
            }
            Ok(())
        })
        .unwrap();
}
