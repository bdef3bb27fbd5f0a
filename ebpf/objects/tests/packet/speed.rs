//! What the programs cost: `cargo test -p keelson-ebpf-objects --test packet -- --ignored --nocapture speed`.

use keelson_ebpf_abi::{
    FILTER_ADDRESS, FLOW_FROM_ENDPOINT, FLOW_TO_ENDPOINT, FilterPlace, Flow, MASQUERADE_NEVER,
    Tuple, WATCH_ALL,
};

use crate::bytes::{ACK, SYN, Sent, tcp, udp};
use crate::kernel::{Kernel, to_pool, tuple};

const RUNS: u32 = 1_000_000;
const WAYS: [[&str; 4]; 2] = [
    ["198.51.100.7:40001", "10.96.0.10:80", "10.1.0.5:8080", "10.1.0.6:8080"],
    ["[2001:db8:9::7]:40001", "[fd96::10]:80", "[fd01::5]:8080", "[fd01::6]:8080"],
];

/// The kernel runs a program again on what the run before made of the packet: so each of these leads to the other.
fn turning(kernel: &mut Kernel, map: &str, role: u8, [one, other]: [&Sent; 2]) {
    for (key, to) in [(one, other), (other, one)] {
        let flow = Flow { to: tuple(to), role, last_seen_ns: u64::MAX, ..Flow::default() };
        kernel.hash::<Tuple, Flow>(map).insert(tuple(key), flow, 0).unwrap();
    }
}

#[test]
#[ignore = "prints figures"]
fn speed() {
    println!("| packet | family | hook | ns |\n|---|---|---|---|");
    for (family, [client, service, endpoint, other]) in ["IPv4", "IPv6"].into_iter().zip(WAYS) {
        let mut kernel = Kernel::new();
        kernel.range("service_ranges", "10.96.0.0", 16);
        kernel.range("service_ranges", "fd96::", 112);
        // Two Services that lead to each other, and have no members: each datagram is sent anew.
        for (pool, at, to) in [(1, service, endpoint), (2, endpoint, service)] {
            kernel.pool(pool, &[(to, 0, 0)]);
            kernel.frontend(at, 17, to_pool(pool, pool, MASQUERADE_NEVER));
        }
        let stranger = tcp(ACK, client, other);
        let begins = tcp(SYN, client, other);
        let asks = udp(client, endpoint);
        let known = [&tcp(ACK, client, service), &tcp(ACK, client, endpoint)];
        let answers = [&tcp(ACK, endpoint, client), &tcp(ACK, service, client)];
        let print =
            |what: &str, hook: &str, ns: u128| println!("| {what} | {family} | {hook} | {ns} |");
        for hook in ["ingress", "egress"] {
            print("of no Service, established", hook, kernel.time(hook, &stranger, RUNS));
            print("of no Service, first", hook, kernel.time(hook, &begins, RUNS));
        }
        let place = FilterPlace::of_address(&tuple(&asks).source);
        kernel.know("clients", place, FILTER_ADDRESS);
        turning(&mut kernel, "flows_in", FLOW_TO_ENDPOINT, known);
        turning(&mut kernel, "flows_out", FLOW_FROM_ENDPOINT, answers);
        print("of a known connection", "ingress", kernel.time("ingress", known[0], RUNS));
        print("of a known connection", "egress", kernel.time("egress", answers[0], RUNS));
        print("first of a connection", "ingress", kernel.time("ingress", &asks, RUNS));
        kernel.watch(WATCH_ALL);
        // As many as have room.
        let told = kernel.time("ingress", &asks, 2_000);
        print("first of a connection, monitor told", "ingress", told);
        let lost = kernel.time("ingress", &asks, RUNS);
        print("first of a connection, monitor too slow", "ingress", lost);
    }
}
