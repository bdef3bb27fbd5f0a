//! Packets that nobody sends in good faith: they harm no connection that there is, and nothing that comes after.

use keelson_ebpf_abi::{DROP_REASONS, MASQUERADE_ALWAYS, MASQUERADE_NEVER, MEMBER_SERVING, Tuple};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::bytes::{ACK, FIN, RST, SYN, Sent, framed, tcp, udp, v4};
use crate::kernel::{DROP, Kernel, NODE4, PASS, REDIRECT, ip, to_pool, tuple};

const CLIENT: &str = "198.51.100.7:40001";
const SERVICE: &str = "10.96.0.10:80";
const HIDING: &str = "10.96.0.11:80";
const ENDPOINT: &str = "10.1.0.5:8080";

fn kernel_with(flows: u32) -> Kernel {
    let mut kernel = Kernel::with_flows(flows);
    kernel.pool(1, &[(ENDPOINT, 0, MEMBER_SERVING)]);
    for protocol in [6, 17, 132] {
        kernel.frontend(SERVICE, protocol, to_pool(1, 1, MASQUERADE_NEVER));
        kernel.frontend(HIDING, protocol, to_pool(2, 1, MASQUERADE_ALWAYS));
    }
    kernel
}

/// A connection whose client is masqueraded, and that it is still whole.
struct Hidden {
    /// Whom the endpoint sees.
    seen: String,
}

impl Hidden {
    fn begin(kernel: &mut Kernel) -> Self {
        let packet = tcp(SYN, CLIENT, HIDING);
        let forwarded = packet.clone().to(ENDPOINT);
        kernel.arrives_as(&packet, &forwarded);
        let (_, bytes) = kernel.leaves(&forwarded);
        let port = u16::from_be_bytes([bytes[34], bytes[35]]);
        let hidden = Hidden { seen: format!("{NODE4}:{port}") };
        hidden.check(kernel, SYN | ACK);
        hidden
    }

    #[track_caller]
    fn check(&self, kernel: &mut Kernel, answer: u8) {
        let packet = tcp(ACK, CLIENT, HIDING);
        let forwarded = packet.clone().to(ENDPOINT);
        kernel.arrives_as(&packet, &forwarded);
        kernel.leaves_as(&forwarded, &forwarded.clone().from(&self.seen));
        let answer = tcp(answer, ENDPOINT, &self.seen);
        let revealed = answer.clone().to(CLIENT);
        kernel.arrives_as(&answer, &revealed);
        kernel.leaves_as(&revealed, &revealed.clone().from(HIDING));
    }
}

#[test]
fn only_the_endpoint_reaches_a_client_that_is_masqueraded() {
    let mut kernel = Kernel::new();
    kernel.pool(1, &[(ENDPOINT, 0, MEMBER_SERVING)]);
    kernel.frontend(HIDING, 6, to_pool(1, 1, MASQUERADE_ALWAYS));
    let hidden = Hidden::begin(&mut kernel);
    for stranger in ["198.51.100.9:8080", "10.1.0.5:8081", "10.1.0.6:8080"] {
        for flags in [SYN, SYN | ACK, ACK, FIN | ACK, RST] {
            let spoofed = tcp(flags, stranger, &hidden.seen);
            kernel.arrives_as(&spoofed, &spoofed);
        }
        // Nor by another protocol.
        let spoofed = udp(ENDPOINT, &hidden.seen);
        kernel.arrives_as(&spoofed, &spoofed);
    }
    assert_eq!(kernel.flows("flows_in").len(), 2);
    hidden.check(&mut kernel, ACK);
}

/// Nobody checks its sequence numbers here: the ends of the connection do.
#[test]
fn a_spoofed_reset_stops_no_packet() {
    let mut kernel = Kernel::new();
    kernel.pool(1, &[(ENDPOINT, 0, MEMBER_SERVING)]);
    kernel.frontend(HIDING, 6, to_pool(1, 1, MASQUERADE_ALWAYS));
    let hidden = Hidden::begin(&mut kernel);
    let reset = tcp(RST, CLIENT, HIDING);
    kernel.arrives_as(&reset, &reset.clone().to(ENDPOINT));
    let reset = tcp(RST, ENDPOINT, &hidden.seen);
    kernel.arrives_as(&reset, &reset.clone().to(CLIENT));
    for _ in 0..3 {
        hidden.check(&mut kernel, ACK);
    }
}

#[test]
fn more_beginnings_than_there_is_room_for_cost_no_connection_that_talks() {
    const ROOM: u32 = 512;
    let mut kernel = kernel_with(ROOM);
    let interface = keelson_ebpf_abi::Interface {
        address4: ip(NODE4).into(),
        ..keelson_ebpf_abi::Interface::default()
    };
    kernel.interface(crate::kernel::INTERFACE, interface);
    let hidden = Hidden::begin(&mut kernel);
    for number in 0..8 * ROOM {
        let [_, b, c, d] = number.to_be_bytes();
        let from = format!("203.{b}.{c}.{d}:{}", 1024 + number);
        let flood = match number % 3 {
            0 => tcp(SYN, &from, SERVICE),
            1 => tcp(SYN, &from, HIDING),
            _ => udp(&from, SERVICE),
        };
        let forwarded = flood.clone().to(ENDPOINT);
        kernel.arrives_as(&flood, &forwarded);
        kernel.leaves(&forwarded);
        hidden.check(&mut kernel, ACK);
    }
    assert_eq!(kernel.drops(), [0; DROP_REASONS]);
    assert!(kernel.flows("flows_in").len() <= ROOM as usize);
}

/// First pieces push out others: what comes in one piece is not concerned, and later pieces find theirs.
#[test]
fn more_first_pieces_than_there_is_room_for_cost_only_pieces() {
    let mut kernel = kernel_with(1024);
    let piece = |id: u16, flags_and_offset: u16, from: &str| {
        let whole = udp(from, SERVICE).packet();
        let packet = udp(from, SERVICE);
        let (source, destination) = (packet.source.ip(), packet.destination.ip());
        let mut bytes = v4(source, destination, 17, &[], &whole[20..]);
        bytes[4..6].copy_from_slice(&id.to_be_bytes());
        bytes[6..8].copy_from_slice(&flags_and_offset.to_be_bytes());
        bytes[10..12].copy_from_slice(&[0, 0]);
        let sum = crate::bytes::checksum(&bytes[..20]);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        framed(&bytes)
    };
    const MORE: u16 = 0x2000;
    let mut remembered = 0;
    for id in 0..20_000 {
        assert_eq!(kernel.run("ingress", &piece(id, MORE, CLIENT)).0, PASS);
    }
    for id in 0..20_000 {
        let later = piece(id, 8, CLIENT);
        let (verdict, bytes) = kernel.run("ingress", &later);
        assert_eq!(verdict, PASS);
        remembered += u32::from(bytes != later);
    }
    // As many as there are places, or a little less: each CPU keeps some free.
    assert!(remembered > 0 && remembered <= 8192, "{remembered}");
    let whole = udp(CLIENT, SERVICE);
    kernel.arrives_as(&whole, &whole.clone().to(ENDPOINT));
    kernel.run("ingress", &piece(20_001, MORE, CLIENT));
    let later = piece(20_001, 8, CLIENT);
    assert_ne!(kernel.run("ingress", &later).1, later);
}

/// Any bytes behind a link header; the kernel itself passes on none that are too few for an IP header.
#[test]
fn garbage_harms_nothing() {
    let mut kernel = Kernel::new();
    kernel.pool(1, &[(ENDPOINT, 0, MEMBER_SERVING)]);
    for protocol in [6, 17, 132] {
        kernel.frontend(HIDING, protocol, to_pool(1, 1, MASQUERADE_ALWAYS));
    }
    let hidden = Hidden::begin(&mut kernel);
    let known: Vec<Tuple> = kernel.flows("flows_in").into_iter().map(|(key, _)| key).collect();
    let kernel = std::cell::RefCell::new(kernel);
    let kinds = prop::sample::select(vec![0x0800_u16, 0x86dd, 0x0806, 0x8100, 0x88a8, 0, 0xffff]);
    let garbage = (kinds, prop::collection::vec(any::<u8>(), 40..300), any::<bool>());
    let config = Config { cases: 3000, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&garbage, |(kind, mut bytes, looks_right)| {
            if looks_right && let Some(first) = bytes.first_mut() {
                // So that more of it is looked at.
                *first = if kind == 0x86dd { 0x60 } else { 0x45 };
            }
            let frame = [&[2; 12], &kind.to_be_bytes()[..], &bytes].concat();
            for hook in ["ingress", "egress"] {
                let (verdict, _) = kernel.borrow_mut().run(hook, &frame);
                prop_assert!([PASS, DROP, REDIRECT].contains(&verdict), "{verdict}");
            }
            Ok(())
        })
        .unwrap();
    let kernel = &mut *kernel.borrow_mut();
    let flows = kernel.flows("flows_in");
    assert!(known.iter().all(|key| flows.iter().any(|(found, _)| found == key)));
    hidden.check(kernel, ACK);
}

/// A client that says it is the endpoint, or the Service itself.
#[test]
fn strange_senders_break_nothing() {
    let mut kernel = kernel_with(1024);
    for from in [SERVICE, HIDING, ENDPOINT, "127.0.0.1:80", "0.0.0.0:0", "255.255.255.255:80"] {
        for to in [SERVICE, HIDING] {
            let packet: Sent = tcp(SYN, from, to);
            let (verdict, bytes) = kernel.arrives(&packet);
            assert!([PASS, DROP].contains(&verdict), "{from} {to}");
            assert_eq!(bytes.len(), packet.bytes().len());
            kernel.leaves(&tcp(SYN | ACK, ENDPOINT, from));
        }
    }
    let good = tcp(SYN, CLIENT, SERVICE);
    kernel.arrives_as(&good, &good.clone().to(ENDPOINT));
    assert!(kernel.flows("flows_in").iter().any(|(key, _)| *key == tuple(&good)));
}
