//! When a connection is over and another one begins, and what two connections may share.

use keelson_ebpf_abi::{
    DROP_HELD, FLOW_FROM_ENDPOINT, FLOW_TO_ENDPOINT, Flow, MASQUERADE_ALWAYS, MASQUERADE_NEVER,
    MEMBER_SERVING, STATE_ANSWERED, STATE_CLIENT_DONE, STATE_ENDPOINT_DONE, STATE_RESET, Tuple,
};

use crate::bytes::{ACK, FIN, RST, SYN, Sent, tcp, udp};
use crate::kernel::{DROP, Kernel, PASS, to_pool, tuple};

const CLIENT: &str = "198.51.100.7:40001";
const STRANGER: &str = "198.51.100.9:40009";
const SERVICE: &str = "10.96.0.10:80";
const OTHER_SERVICE: &str = "10.96.0.11:80";
const OLD: &str = "10.1.0.5:8080";
const NEW: &str = "10.1.0.6:8080";

fn kernel() -> Kernel {
    let mut kernel = Kernel::new();
    kernel.pool(1, &[(OLD, 0, MEMBER_SERVING)]);
    for protocol in [6, 17] {
        kernel.frontend(SERVICE, protocol, to_pool(1, 1, MASQUERADE_NEVER));
        kernel.frontend(OTHER_SERVICE, protocol, to_pool(2, 1, MASQUERADE_NEVER));
    }
    kernel
}

fn from_client(flags: u8) -> Sent {
    tcp(flags, CLIENT, SERVICE)
}

fn from_endpoint(flags: u8) -> Sent {
    tcp(flags, OLD, CLIENT)
}

/// A connection to the old endpoint, after which new ones go to another.
fn connected() -> Kernel {
    let mut kernel = kernel();
    kernel.arrives_as(&from_client(SYN), &from_client(SYN).to(OLD));
    kernel.leaves_as(&from_endpoint(SYN | ACK), &from_endpoint(SYN | ACK).from(SERVICE));
    kernel.arrives_as(&from_client(ACK), &from_client(ACK).to(OLD));
    kernel.pool(1, &[(NEW, 0, MEMBER_SERVING)]);
    kernel
}

fn flow(kernel: &mut Kernel, map: &str, packet: &Sent) -> Flow {
    kernel.hash::<Tuple, Flow>(map).get(&tuple(packet), 0).unwrap()
}

fn ago(kernel: &mut Kernel, packet: &Sent, secs: u64) {
    for (map, key) in
        [("flows_in", tuple(packet)), ("flows_out", tuple(&packet.clone().to(OLD)).reversed())]
    {
        kernel.change_flow(map, &key, |flow| {
            flow.last_seen_ns = flow.last_seen_ns.saturating_sub(secs * 1_000_000_000);
        });
    }
}

#[test]
fn both_directions_know_the_state() {
    let mut kernel = connected();
    let states = |kernel: &mut Kernel| {
        let there = flow(kernel, "flows_in", &from_client(ACK));
        let back = flow(kernel, "flows_out", &from_endpoint(ACK));
        assert_eq!((there.role, back.role), (FLOW_TO_ENDPOINT, FLOW_FROM_ENDPOINT));
        assert_eq!(there.state, back.state);
        there.state
    };
    assert_eq!(states(&mut kernel), STATE_ANSWERED);
    kernel.arrives(&from_client(FIN | ACK));
    assert_eq!(states(&mut kernel), STATE_ANSWERED | STATE_CLIENT_DONE);
    kernel.leaves(&from_endpoint(FIN | ACK));
    let done = STATE_ANSWERED | STATE_CLIENT_DONE | STATE_ENDPOINT_DONE;
    assert_eq!(states(&mut kernel), done);
    kernel.leaves(&from_endpoint(RST));
    assert_eq!(states(&mut kernel), done | STATE_RESET);
}

#[test]
fn a_connection_that_lives_cannot_be_begun_again() {
    let mut kernel = connected();
    kernel.arrives_as(&from_client(SYN), &from_client(SYN).to(OLD));
    // Half closed is not over.
    kernel.arrives_as(&from_client(FIN | ACK), &from_client(FIN | ACK).to(OLD));
    kernel.arrives_as(&from_client(SYN), &from_client(SYN).to(OLD));
    ago(&mut kernel, &from_client(SYN), 50);
    kernel.arrives_as(&from_client(SYN), &from_client(SYN).to(OLD));
}

#[test]
fn after_a_close_or_a_reset_a_new_connection_begins() {
    for (closing, last) in [
        (vec![from_client(FIN | ACK)], from_endpoint(FIN | ACK)),
        (vec![], from_endpoint(RST)),
        (vec![from_client(RST)], from_endpoint(ACK)),
    ] {
        let mut kernel = connected();
        for packet in closing {
            kernel.arrives_as(&packet, &packet.clone().to(OLD));
        }
        kernel.leaves_as(&last, &last.clone().from(SERVICE));
        // What still belongs to the old one goes there.
        kernel.arrives_as(&from_client(ACK), &from_client(ACK).to(OLD));
        kernel.arrives_as(&from_client(SYN), &from_client(SYN).to(NEW));
        kernel.arrives_as(&from_client(ACK), &from_client(ACK).to(NEW));
        assert_eq!(kernel.counters(1).connections, 2);
    }
}

#[test]
fn after_its_time_a_new_connection_begins() {
    // Half closed, never answered. A test of an idle one needs a machine that runs for a day: `Flow::is_over` is
    // tested without a kernel.
    for (is_half_closed, answers) in [(true, true), (false, false)] {
        let mut kernel = kernel();
        kernel.arrives(&from_client(SYN));
        if answers {
            kernel.leaves(&from_endpoint(SYN | ACK));
        }
        if is_half_closed {
            kernel.arrives(&from_client(FIN | ACK));
        }
        kernel.pool(1, &[(NEW, 0, MEMBER_SERVING)]);
        kernel.arrives_as(&from_client(SYN), &from_client(SYN).to(OLD));
        ago(&mut kernel, &from_client(SYN), 70);
        kernel.arrives_as(&from_client(SYN), &from_client(SYN).to(NEW));
    }
}

#[test]
fn datagrams_after_a_pause_go_anywhere() {
    for (secs, answers) in [(40, false), (130, true)] {
        let mut kernel = kernel();
        let packet = udp(CLIENT, SERVICE);
        kernel.arrives(&packet);
        if answers {
            kernel.leaves(&udp(OLD, CLIENT));
        }
        kernel.pool(1, &[(OLD, 0, MEMBER_SERVING), (NEW, 0, MEMBER_SERVING)]);
        let mut seen = std::collections::BTreeSet::new();
        while seen.len() < 2 {
            ago_udp(&mut kernel, secs);
            seen.insert(kernel.arrives(&packet).1);
        }
    }
}

fn ago_udp(kernel: &mut Kernel, secs: u64) {
    let key = tuple(&udp(CLIENT, SERVICE));
    kernel.change_flow("flows_in", &key, |flow| {
        flow.last_seen_ns = flow.last_seen_ns.saturating_sub(secs * 1_000_000_000);
    });
}

/// Case 60.
#[test]
fn one_port_of_a_client_meets_the_same_endpoint_through_two_services() {
    let mut kernel = kernel();
    let first = tcp(SYN, CLIENT, SERVICE);
    kernel.arrives_as(&first, &first.clone().to(OLD));
    let second = tcp(SYN, CLIENT, OTHER_SERVICE);
    let (verdict, bytes) = kernel.arrives(&second);
    assert_eq!(verdict, PASS);
    let port = u16::from_be_bytes([bytes[34], bytes[35]]);
    assert_ne!(port, 40001);
    let source = format!("198.51.100.7:{port}");
    let translated = second.clone().from(&source).to(OLD);
    assert_eq!(bytes, translated.bytes());
    kernel.arrives_as(&second, &translated);
    let answer = tcp(SYN | ACK, OLD, &source);
    kernel.leaves_as(&answer, &answer.clone().from(OTHER_SERVICE).to(CLIENT));
    let answer = tcp(SYN | ACK, OLD, CLIENT);
    kernel.leaves_as(&answer, &answer.clone().from(SERVICE));
}

#[test]
fn the_port_of_a_connection_that_is_over_is_kept_for_another_service() {
    let mut kernel = kernel();
    kernel.arrives(&from_client(SYN));
    kernel.leaves(&from_endpoint(RST | ACK));
    let second = tcp(SYN, CLIENT, OTHER_SERVICE);
    kernel.arrives_as(&second, &second.clone().to(OLD));
    let answer = tcp(SYN | ACK, OLD, CLIENT);
    kernel.leaves_as(&answer, &answer.clone().from(OTHER_SERVICE));
}

#[test]
fn a_connection_past_the_service_is_not_mistaken_for_one_that_is_over() {
    let mut kernel = kernel();
    kernel.arrives(&from_client(SYN));
    kernel.leaves(&from_endpoint(RST | ACK));
    let direct = tcp(SYN, CLIENT, OLD);
    kernel.arrives_as(&direct, &direct);
    let answer = from_endpoint(SYN | ACK);
    kernel.leaves_as(&answer, &answer);
    kernel.leaves_as(&from_endpoint(ACK), &from_endpoint(ACK));
}

#[test]
fn what_is_evicted_on_one_side_comes_back_from_the_other() {
    let mut kernel = connected();
    let key = tuple(&from_endpoint(ACK));
    let before: Flow = kernel.hash("flows_out").get(&key, 0).unwrap();
    kernel.hash::<Tuple, Flow>("flows_out").remove(&key).unwrap();
    kernel.leaves_as(&from_endpoint(ACK), &from_endpoint(ACK));
    kernel.change_flow("flows_in", &tuple(&from_client(ACK)), |flow| flow.last_seen_ns = 0);
    kernel.arrives(&from_client(ACK));
    let after: Flow = kernel.hash("flows_out").get(&key, 0).unwrap();
    assert_eq!(after, Flow { last_seen_ns: after.last_seen_ns, ..before });
    kernel.leaves_as(&from_endpoint(ACK), &from_endpoint(ACK).from(SERVICE));
}

#[test]
fn a_flood_pushes_out_the_idle_and_not_who_talks() {
    let mut kernel = Kernel::with_flows(512);
    kernel.pool(1, &[(OLD, 0, MEMBER_SERVING)]);
    kernel.frontend(SERVICE, 6, to_pool(1, 1, MASQUERADE_NEVER));
    kernel.frontend(OTHER_SERVICE, 6, to_pool(2, 1, MASQUERADE_ALWAYS));
    kernel.arrives_as(&from_client(SYN), &from_client(SYN).to(OLD));
    for i in 0..3000u32 {
        let [_, _, c, d] = i.to_be_bytes();
        let service = if i % 2 == 0 { SERVICE } else { OTHER_SERVICE };
        let flood = tcp(SYN, &format!("203.0.{c}.{d}:{}", 1024 + i), service);
        kernel.arrives_as(&flood, &flood.clone().to(OLD));
        kernel.arrives_as(&from_client(ACK), &from_client(ACK).to(OLD));
        kernel.leaves_as(&from_endpoint(ACK), &from_endpoint(ACK).from(SERVICE));
    }
    assert_eq!(kernel.drops().iter().sum::<u64>(), 0);
}

#[test]
fn while_connections_are_moved_those_that_there_are_go_on_and_none_begins() {
    let mut kernel = connected();
    kernel.hold_until(u64::MAX);
    kernel.arrives_as(&from_client(ACK), &from_client(ACK).to(OLD));
    kernel.leaves_as(&from_endpoint(ACK), &from_endpoint(ACK).from(SERVICE));
    // Nobody is told anything: it may be known elsewhere.
    let begins = || tcp(SYN, STRANGER, SERVICE);
    for stranger in [begins(), tcp(ACK, STRANGER, SERVICE), udp(STRANGER, SERVICE)] {
        assert_eq!(kernel.arrives(&stranger).0, DROP, "{stranger:?}");
    }
    assert_eq!(kernel.drops()[DROP_HELD as usize], 3);
    // It ends by itself.
    kernel.hold_until(1);
    kernel.arrives_as(&begins(), &begins().to(NEW));
}
