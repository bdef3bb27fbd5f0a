//! The programs against a model of what they are for, under random packets.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use keelson_ebpf_abi::{MASQUERADE_NEVER, MEMBER_SERVING};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::bytes::{ACK, FIN, RST, SYN, Sent, at, checksum, tcp, udp};
use crate::kernel::{DROP, Kernel, PASS, REDIRECT, ip, to_pool};

/// Services and the pods behind each: one pod serves both, with the same port.
const SERVICES: [(&str, &[&str]); 2] =
    [("10.96.0.10:80", &["10.1.0.5:8080", "10.1.0.6:8080"]), ("10.96.0.11:80", &["10.1.0.5:8080"])];
const CLIENTS: [&str; 3] = ["198.51.100.7:40001", "198.51.100.7:40002", "10.1.2.3:40001"];

#[derive(Clone, Debug)]
struct Step {
    client: usize,
    service: usize,
    from_client: bool,
    flags: u8,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let flags = prop_oneof![
        3 => Just(SYN),
        3 => Just(SYN | ACK),
        6 => Just(ACK),
        2 => Just(FIN | ACK),
        1 => Just(RST),
    ];
    let step = (0..CLIENTS.len(), 0..SERVICES.len(), any::<bool>(), flags).prop_map(
        |(client, service, from_client, flags)| Step { client, service, from_client, flags },
    );
    prop::collection::vec(step, 1..200)
}

/// What is known of a connection of a client to a Service.
#[derive(Clone, Copy, Debug)]
struct Connection {
    /// Whom the endpoint sees.
    client: SocketAddr,
    endpoint: SocketAddr,
    client_done: bool,
    endpoint_done: bool,
    reset: bool,
}

impl Connection {
    /// From whom to whom answers go.
    fn way(&self) -> (SocketAddr, SocketAddr) {
        (self.endpoint, self.client)
    }

    fn is_over(&self) -> bool {
        self.reset || self.client_done && self.endpoint_done
    }

    fn note(&mut self, is_client: bool, flags: u8) {
        self.reset |= flags & RST != 0;
        if flags & FIN != 0 {
            *(if is_client { &mut self.client_done } else { &mut self.endpoint_done }) = true;
        }
    }
}

#[derive(Default)]
struct Model {
    connections: BTreeMap<(usize, usize), Connection>,
    /// Which Service's connection the answers of an endpoint to a port belong to.
    answers: BTreeMap<(SocketAddr, SocketAddr), (usize, usize)>,
}

impl Model {
    fn step(&mut self, kernel: &mut Kernel, step: &Step) {
        let id = (step.client, step.service);
        let packet = tcp(step.flags, CLIENTS[step.client], SERVICES[step.service].0);
        if step.from_client {
            self.client_sends(kernel, id, &packet, step.flags);
        } else if let Some(connection) = self.connections.get(&id).copied() {
            self.endpoint_sends(kernel, connection, step.flags);
        }
    }

    fn client_sends(&mut self, kernel: &mut Kernel, id: (usize, usize), packet: &Sent, flags: u8) {
        let (verdict, bytes) = kernel.arrives(packet);
        let known = self.connections.get(&id).copied();
        let begins = flags == SYN && known.is_none_or(|known| known.is_over());
        if begins {
            assert_eq!(verdict, PASS);
            let connection = self.begun(id, packet, &bytes);
            self.answers.insert((connection.endpoint, connection.client), id);
            self.connections.insert(id, connection);
            return;
        }
        // Nobody is reset by a reset; an answer to nothing is.
        let is_strange = |known: &Connection| flags == SYN | ACK && known.is_over();
        let Some(known) = known.filter(|known| !is_strange(known)) else {
            assert_eq!(verdict, if flags & RST != 0 { DROP } else { REDIRECT });
            return;
        };
        let expected =
            packet.clone().from(&known.client.to_string()).to(&known.endpoint.to_string());
        assert_eq!((verdict, bytes), (PASS, expected.bytes()));
        self.noted(id, true, flags);
    }

    fn noted(&mut self, id: (usize, usize), is_client: bool, flags: u8) {
        if let Some(connection) = self.connections.get_mut(&id) {
            // Its answers may be another connection's by now, which then does not hear of it, nor it of them.
            connection.note(is_client, flags);
        }
    }

    /// Reads from the packet what was chosen, and checks that it could be.
    fn begun(&self, id: (usize, usize), packet: &Sent, bytes: &[u8]) -> Connection {
        let port = |i: usize| u16::from_be_bytes([bytes[i], bytes[i + 1]]);
        let address = ip(&format!("{}.{}.{}.{}", bytes[30], bytes[31], bytes[32], bytes[33]));
        let endpoint = SocketAddr::new(address, port(36));
        let client = SocketAddr::new(packet.source.ip(), port(34));
        let expected = packet.clone().from(&client.to_string()).to(&endpoint.to_string());
        assert_eq!(bytes, expected.bytes());
        assert!(SERVICES[id.1].1.iter().any(|pod| at(pod) == endpoint));
        // A connection may have begun anew at another endpoint.
        let taken = |client: SocketAddr| {
            let owner = self.answers.get(&(endpoint, client)).filter(|owner| **owner != id);
            owner.is_some_and(|owner| {
                let owner = &self.connections[owner];
                owner.way() == (endpoint, client) && !owner.is_over()
            })
        };
        assert!(!taken(client), "two connections share a port");
        assert!(client == packet.source || taken(packet.source), "the port was changed in vain");
        Connection { client, endpoint, client_done: false, endpoint_done: false, reset: false }
    }

    fn endpoint_sends(&mut self, kernel: &mut Kernel, connection: Connection, flags: u8) {
        let way = connection.way();
        let answer = tcp(flags, &way.0.to_string(), &way.1.to_string());
        let Some(owner) = self.answers.get(&way).copied() else {
            return kernel.leaves_as(&answer, &answer);
        };
        // The owner may have begun anew at another endpoint; then this is what is left of its old connection.
        let has_it = self.connections[&owner].way() == way;
        let is_over = !has_it || self.connections[&owner].is_over();
        if flags & (SYN | RST) == SYN && is_over {
            self.answers.remove(&way);
            return kernel.leaves_as(&answer, &answer);
        }
        kernel.leaves_as(&answer, &answer.clone().from(SERVICES[owner.1].0).to(CLIENTS[owner.0]));
        if has_it {
            self.noted(owner, false, flags);
        }
    }
}

#[test]
fn random_connections_do_as_the_model() {
    let mut runner =
        TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
    runner
        .run(&steps(), |steps| {
            let mut kernel = Kernel::new();
            for (number, (service, pods)) in (1..).zip(SERVICES) {
                let pods: Vec<_> = pods.iter().map(|pod| (*pod, 0, MEMBER_SERVING)).collect();
                kernel.pool(number, &pods);
                kernel.frontend(service, 6, to_pool(number, number, MASQUERADE_NEVER));
            }
            let mut model = Model::default();
            for step in &steps {
                model.step(&mut kernel, step);
            }
            Ok(())
        })
        .unwrap();
}

/// Bytes are changed at random: nothing may go on that was half changed, and what is translated is translated right.
#[test]
fn broken_packets_pass_as_they_are_or_are_translated_whole() {
    let mut runner =
        TestRunner::new(Config { cases: 1500, failure_persistence: None, ..Config::default() });
    let mut kernel = Kernel::new();
    kernel.pool(1, &[("10.1.0.5:8080", 0, MEMBER_SERVING)]);
    kernel.pool(2, &[("[fd01::5]:8080", 0, MEMBER_SERVING)]);
    for protocol in [6, 17, 132] {
        kernel.frontend("10.96.0.10:80", protocol, to_pool(1, 1, MASQUERADE_NEVER));
        kernel.frontend("[fd96::10]:80", protocol, to_pool(2, 2, MASQUERADE_NEVER));
    }
    let kernel = std::cell::RefCell::new(kernel);
    let changes = prop::collection::vec((0usize..120, any::<u8>()), 0..6);
    let packets = prop::sample::select(vec![
        tcp(SYN, "198.51.100.7:40001", "10.96.0.10:80"),
        udp("198.51.100.7:40001", "10.96.0.10:80"),
        tcp(SYN, "[2001:db8:9::7]:40001", "[fd96::10]:80"),
        udp("[2001:db8:9::7]:40001", "[fd96::10]:80"),
    ]);
    runner
        .run(&(packets, changes, 0usize..40), |(packet, changes, cut)| {
            let bytes = packet.damaged(&changes, cut);
            for hook in ["ingress", "egress"] {
                let (verdict, out) = kernel.borrow_mut().run(hook, &bytes);
                prop_assert!([PASS, DROP, REDIRECT].contains(&verdict));
                if verdict == PASS {
                    prop_assert_eq!(out.len(), bytes.len());
                    prop_assert_eq!(differing(&bytes), differing(&out));
                }
            }
            Ok(())
        })
        .unwrap();
}

/// By how much an IPv4 header's checksum is wrong.
pub(crate) fn differing(frame: &[u8]) -> u16 {
    let packet = &frame[14..];
    if packet[0] >> 4 != 4 {
        return 0;
    }
    let length = usize::from(packet[0] & 15) * 4;
    let sum = checksum(&packet[..length.clamp(20, packet.len())]);
    if sum == 0xffff { 0 } else { sum }
}
