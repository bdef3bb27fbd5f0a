//! Clients that endpoints see as the node.

use std::net::SocketAddr;

use keelson_ebpf_abi::{
    DROP_NO_ADDRESS, DROP_NO_PORT, ENDPOINT_HERE, FLOW_UNMASQUERADE, Flow, Interface,
    MASQUERADE_ALWAYS, MASQUERADE_NEVER, MASQUERADE_UNLESS_POD, MEMBER_SERVING, STATE_ANSWERED,
    STATE_RESET, Tuple,
};

use crate::bytes::{ACK, SYN, Sent, tcp, udp};
use crate::kernel::{DROP, INTERFACE, Kernel, NODE4, NODE6, ip, to_pool, tuple};

fn kernel(masquerade: u8) -> Kernel {
    serving(Kernel::new(), masquerade)
}

fn serving(mut kernel: Kernel, masquerade: u8) -> Kernel {
    for (pool, service, endpoint) in
        [(1, "10.96.0.10:80", "10.1.0.5:8080"), (2, "[fd96::10]:80", "[fd01::5]:8080")]
    {
        kernel.pool(pool, &[(endpoint, ENDPOINT_HERE, MEMBER_SERVING)]);
        for protocol in [6, 17] {
            kernel.frontend(service, protocol, to_pool(pool, pool, masquerade));
        }
    }
    kernel
}

/// The source that a packet got which is as `expected` beside that.
#[track_caller]
fn hidden_as(kernel: &mut Kernel, packet: &Sent, node: &str) -> SocketAddr {
    let (verdict, bytes) = kernel.leaves(packet);
    assert_eq!(verdict, -1);
    let transport = if packet.is_v4() { 34 } else { 54 };
    let port = u16::from_be_bytes([bytes[transport], bytes[transport + 1]]);
    let source = SocketAddr::new(ip(node), port);
    assert_eq!(bytes, packet.clone().from(&source.to_string()).bytes());
    source
}

#[track_caller]
fn goes_there_and_back(
    kernel: &mut Kernel,
    [packet, answer]: [Sent; 2],
    [service, endpoint, node]: [&str; 3],
) {
    let client = packet.source.to_string();
    let forwarded = packet.clone().to(endpoint);
    kernel.arrives_as(&packet, &forwarded);
    let hidden = hidden_as(kernel, &forwarded, node);
    assert_ne!(hidden.port(), packet.source.port());
    kernel.arrives_as(&packet, &forwarded);
    assert_eq!(hidden_as(kernel, &forwarded, node), hidden, "the choice is kept");
    let answer = answer.from(endpoint).to(&hidden.to_string());
    let revealed = answer.clone().to(&client);
    kernel.arrives_as(&answer, &revealed);
    kernel.leaves_as(&revealed, &revealed.clone().from(service));
}

#[test]
fn clients_from_outside_are_hidden_and_pods_are_not() {
    let mut kernel = kernel(MASQUERADE_UNLESS_POD);
    let way = ["10.96.0.10:80", "10.1.0.5:8080", NODE4];
    let (a, b) = ("198.51.100.7:40001", "10.96.0.10:80");
    goes_there_and_back(&mut kernel, [tcp(SYN, a, b), tcp(SYN | ACK, a, b)], way);
    goes_there_and_back(&mut kernel, [udp(a, b), udp(a, b)], way);
    let way = ["[fd96::10]:80", "[fd01::5]:8080", NODE6];
    let (a, b) = ("[2001:db8:9::7]:40001", "[fd96::10]:80");
    goes_there_and_back(&mut kernel, [tcp(SYN, a, b), tcp(SYN | ACK, a, b)], way);
    goes_there_and_back(&mut kernel, [udp(a, b), udp(a, b)], way);
    let pod = tcp(SYN, "10.1.2.3:1234", "10.96.0.10:80");
    let forwarded = pod.clone().to("10.1.0.5:8080");
    kernel.arrives_as(&pod, &forwarded);
    kernel.leaves_as(&forwarded, &forwarded);
}

#[test]
fn pods_are_hidden_where_everybody_is() {
    let mut kernel = kernel(MASQUERADE_ALWAYS);
    let (a, b) = ("10.1.2.3:40001", "10.96.0.10:80");
    let way = ["10.96.0.10:80", "10.1.0.5:8080", NODE4];
    goes_there_and_back(&mut kernel, [tcp(SYN, a, b), tcp(SYN | ACK, a, b)], way);
}

#[test]
fn a_pod_meets_itself() {
    let mut kernel = kernel(MASQUERADE_NEVER);
    let (a, b) = ("10.1.0.5:40001", "10.96.0.10:80");
    let way = ["10.96.0.10:80", "10.1.0.5:8080", NODE4];
    goes_there_and_back(&mut kernel, [tcp(SYN, a, b), tcp(SYN | ACK, a, b)], way);
    let (a, b) = ("[fd01::5]:40001", "[fd96::10]:80");
    let way = ["[fd96::10]:80", "[fd01::5]:8080", NODE6];
    goes_there_and_back(&mut kernel, [udp(a, b), udp(a, b)], way);
}

#[test]
fn clients_with_the_same_port_get_different_ones() {
    let mut kernel = kernel(MASQUERADE_ALWAYS);
    let mut seen = std::collections::BTreeSet::new();
    for host in 1..=200 {
        let packet = tcp(SYN, &format!("198.51.100.{host}:40001"), "10.96.0.10:80");
        let forwarded = packet.clone().to("10.1.0.5:8080");
        kernel.arrives_as(&packet, &forwarded);
        let source = hidden_as(&mut kernel, &forwarded, NODE4);
        assert!(seen.insert(source.port()));
        assert!(!(30_000..61_000).contains(&source.port()) && source.port() >= 1024);
    }
}

#[test]
fn privileged_ports_are_kept() {
    let mut kernel = kernel(MASQUERADE_ALWAYS);
    let packet = tcp(SYN, "198.51.100.7:700", "10.96.0.10:80");
    let forwarded = packet.clone().to("10.1.0.5:8080");
    kernel.arrives_as(&packet, &forwarded);
    assert_eq!(hidden_as(&mut kernel, &forwarded, NODE4).port(), 700);
    let packet = packet.from("198.51.100.8:700");
    let forwarded = packet.clone().to("10.1.0.5:8080");
    kernel.arrives_as(&packet, &forwarded);
    assert_ne!(hidden_as(&mut kernel, &forwarded, NODE4).port(), 700);
}

#[test]
fn without_an_address_to_hide_behind_a_packet_is_dropped() {
    let mut kernel = kernel(MASQUERADE_ALWAYS);
    kernel.hash("interfaces").insert(INTERFACE, Interface::default(), 0).unwrap();
    let packet = tcp(SYN, "198.51.100.7:40001", "10.96.0.10:80");
    let forwarded = packet.clone().to("10.1.0.5:8080");
    kernel.arrives_as(&packet, &forwarded);
    assert_eq!(kernel.leaves(&forwarded).0, DROP);
    assert_eq!(kernel.drops()[DROP_NO_ADDRESS as usize], 1);
}

#[test]
fn answers_for_nobody_are_left_to_the_node() {
    let mut kernel = kernel(MASQUERADE_ALWAYS);
    let spoofed = tcp(ACK, "10.1.0.5:8080", "192.0.2.1:5000");
    kernel.arrives_as(&spoofed, &spoofed);
    kernel.leaves_as(&spoofed, &spoofed);
}

/// More clients than ports, all at one endpoint.
#[test]
fn when_all_ports_are_taken_new_clients_of_that_endpoint_wait_and_nobody_else() {
    const PORTS: u32 = 33_512;
    let mut kernel = serving(Kernel::with_flows(4 * PORTS).prepared(), MASQUERADE_ALWAYS);
    kernel.pool(3, &[("10.1.0.6:8080", ENDPOINT_HERE, MEMBER_SERVING)]);
    kernel.frontend("10.96.0.11:80", 6, to_pool(3, 3, MASQUERADE_ALWAYS));
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    let last_seen_ns = u64::try_from(std::time::Duration::from(now).as_nanos()).unwrap();
    let answer = |port: u16| {
        let answer = tcp(ACK, "10.1.0.5:8080", &format!("{NODE4}:{port}"));
        let to = tcp(ACK, "10.1.0.5:8080", &format!("198.51.100.1:{port}"));
        let (role, state) = (FLOW_UNMASQUERADE, STATE_ANSWERED);
        (tuple(&answer), Flow { to: tuple(&to), role, state, last_seen_ns, ..Flow::default() })
    };
    let taken: Vec<(Tuple, Flow)> = (1024..30_000).chain(61_000..=65_535).map(answer).collect();
    assert_eq!(taken.len(), PORTS as usize);
    let mut flows = kernel.hash::<Tuple, Flow>("flows_in");
    taken.iter().for_each(|(key, flow)| flows.insert(key, flow, 0).unwrap());

    let late = tcp(SYN, "198.51.100.7:40001", "10.96.0.10:80");
    let forwarded = late.clone().to("10.1.0.5:8080");
    for attempt in 1..=3 {
        kernel.arrives_as(&late, &forwarded);
        assert_eq!(kernel.leaves(&forwarded).0, DROP);
        assert_eq!(kernel.drops()[DROP_NO_PORT as usize], attempt);
    }
    // Whoever has a port goes on.
    let (key, flow) = &taken[20_000];
    assert_eq!(kernel.hash::<Tuple, Flow>("flows_in").get(key, 0).unwrap(), *flow);
    // Another endpoint, another protocol, another family.
    let others = [
        (tcp(SYN, "198.51.100.7:40002", "10.96.0.11:80"), "10.1.0.6:8080", NODE4),
        (udp("198.51.100.7:40003", "10.96.0.10:80"), "10.1.0.5:8080", NODE4),
        (tcp(SYN, "[2001:db8:9::7]:40004", "[fd96::10]:80"), "[fd01::5]:8080", NODE6),
    ];
    for (packet, endpoint, node) in others {
        let forwarded = packet.clone().to(endpoint);
        kernel.arrives_as(&packet, &forwarded);
        hidden_as(&mut kernel, &forwarded, node);
    }
    // Ports become free, some of them because their connections end: the client's next attempt succeeds.
    for (at, (key, _)) in taken.iter().enumerate() {
        match at % 4 {
            0 => kernel.hash::<Tuple, Flow>("flows_in").remove(key).unwrap(),
            1 | 2 => kernel.change_flow("flows_in", key, |flow| flow.state |= STATE_RESET),
            _ => {}
        }
    }
    kernel.arrives_as(&late, &forwarded);
    hidden_as(&mut kernel, &forwarded, NODE4);
    assert_eq!(kernel.drops()[DROP_NO_PORT as usize], 3);
}
