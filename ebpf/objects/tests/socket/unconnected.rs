//! sendto(2) and recvfrom(2) of UDP sockets that are not connected.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::SocketAddr;

use keelson_ebpf_abi::{CONVERSATIONS, MEMBER_DRAINING};

use super::families::{ALL, Family, Servers, sender};
use super::world::{UDP, World, forward};

const FAMILY: Family = Family::V4;

#[test]
fn datagrams_of_one_socket_go_to_one_endpoint_and_answers_come_from_the_service() {
    let mut world = World::new();
    for (port, family) in (100..).zip(ALL) {
        let endpoints = [1, 2, 3].map(|n| family.endpoint(n, 8000 + port));
        let (frontend, _) = world.service(family.vip(port), UDP, &endpoints);
        let reached: HashSet<usize> = world.in_pod(|| {
            let servers = Servers::start(&endpoints);
            (0..60).map(|_| ask_often(family, &servers, family.vip(port))).collect()
        });
        assert_eq!(reached.len(), 3, "{family:?}: {reached:?}");
        assert_eq!(world.counters(frontend).connections, 60);
    }
}

/// Who answered all of it.
fn ask_often(family: Family, servers: &Servers, vip: SocketAddr) -> usize {
    let client = family.udp();
    let ask = || {
        client.send_to(b"question", family.written(vip)).unwrap();
        let who = servers.answered();
        assert_eq!(sender(&client), family.written(vip), "{family:?}");
        who
    };
    let first = ask();
    for _ in 0..5 {
        assert_eq!(ask(), first);
    }
    first
}

#[test]
fn a_removed_endpoint_is_left_at_once_and_a_draining_one_is_not() {
    let mut world = World::new();
    let (vip, endpoints) = (FAMILY.vip(53), [1, 2].map(|n| FAMILY.endpoint(n, 8053)));
    let (frontend, pool) = world.service(vip, UDP, &endpoints);
    let servers = world.in_pod(|| Servers::start(&endpoints));
    let client = world.in_pod(|| FAMILY.udp());
    let ask = |world: &World| {
        world.in_pod(|| {
            client.send_to(b"question", vip).unwrap();
            let who = servers.answered();
            assert_eq!(sender(&client), vip);
            who
        })
    };
    let first = ask(&world);
    world.set_member(pool, endpoints[first], MEMBER_DRAINING);
    // New conversations go to the other one, this one stays.
    let other = world.pool(&[endpoints[1 - first]], 0);
    assert_eq!(ask(&world), first);
    world.set_member(pool, endpoints[first], 0);
    let key = super::world::frontend_key(vip, UDP);
    let mut changed: keelson_ebpf_abi::Frontend = world.map("frontends").get(&key, 0).unwrap();
    (changed.inside, changed.outside) = (forward(other), forward(other));
    world.set_frontend(vip, UDP, changed);
    assert_eq!(ask(&world), 1 - first);
    assert_eq!(world.counters(frontend).connections, 2);
}

#[test]
fn an_endpoint_that_is_asked_itself_answers_itself() {
    let mut world = World::new();
    for (port, family) in (100..).zip(ALL) {
        let endpoints = [family.endpoint(1, 8000 + port)];
        let vip = family.vip(port);
        world.service(vip, UDP, &endpoints);
        world.in_pod(|| {
            let servers = Servers::start(&endpoints);
            let client = family.udp();
            for to in [vip, endpoints[0], vip] {
                client.send_to(b"question", family.written(to)).unwrap();
                servers.answered();
                assert_eq!(sender(&client), family.written(to), "{family:?}");
            }
        });
    }
}

/// Case 56 of the reference.
#[test]
fn a_late_answer_is_never_taken_for_one_of_the_address_new_owner() {
    let mut world = World::new();
    let (vip, endpoint) = (FAMILY.vip(53), FAMILY.endpoint(1, 8053));
    world.service(vip, UDP, &[endpoint]);
    let (servers, client, from) = world.in_pod(|| {
        let (servers, client) = (Servers::start(&[endpoint]), FAMILY.udp());
        client.send_to(b"question", vip).unwrap();
        let from = servers.received().1;
        (servers, client, from)
    });
    world.service(vip, UDP, &[FAMILY.endpoint(2, 8053)]);
    world.in_pod(|| {
        servers.send(0, from);
        assert_eq!(sender(&client), endpoint);
    });
    world.remove_frontend(vip, UDP);
    world.in_pod(|| {
        servers.send(0, from);
        assert_eq!(sender(&client), endpoint);
    });
}

#[test]
fn the_address_new_owner_gets_the_next_datagram() {
    let mut world = World::new();
    let (vip, endpoints) = (FAMILY.vip(53), [1, 2].map(|n| FAMILY.endpoint(n, 8053)));
    world.service(vip, UDP, &endpoints[..1]);
    let (servers, client) = world.in_pod(|| (Servers::start(&endpoints), FAMILY.udp()));
    let ask = || {
        client.send_to(b"question", vip).unwrap();
        servers.answered()
    };
    assert_eq!(world.in_pod(ask), 0);
    // The old pool and its member stay, as if another frontend still led there.
    world.service(vip, UDP, &endpoints[1..]);
    assert_eq!(world.in_pod(ask), 1);
}

#[test]
fn of_two_services_with_one_endpoint_the_one_asked_last_answers() {
    let mut world = World::new();
    let (vips, endpoint) = ([FAMILY.vip(53), FAMILY.other_vip(53)], FAMILY.endpoint(1, 8053));
    for vip in vips {
        world.service(vip, UDP, &[endpoint]);
    }
    world.in_pod(|| {
        let (servers, client) = (Servers::start(&[endpoint]), FAMILY.udp());
        for vip in [vips[0], vips[1], vips[0], vips[1], vips[1]] {
            client.send_to(b"question", vip).unwrap();
            servers.answered();
            assert_eq!(sender(&client), vip);
        }
    });
}

#[test]
fn more_services_than_a_socket_has_room_for_are_left_to_the_packets() {
    let mut world = World::new();
    let endpoint = FAMILY.endpoint(1, 8053);
    let count = u16::try_from(CONVERSATIONS).unwrap();
    for port in 0..=count {
        world.service(FAMILY.vip(100 + port), UDP, &[endpoint]);
    }
    world.in_pod(|| {
        let (servers, client) = (Servers::start(&[endpoint]), FAMILY.udp());
        for port in (100..100 + count).chain(100..100 + count) {
            client.send_to(b"question", FAMILY.vip(port)).unwrap();
            servers.answered();
            assert_eq!(sender(&client), FAMILY.vip(port));
        }
        let error = client.send_to(b"question", FAMILY.vip(100 + count)).unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::NetworkUnreachable,
            "there are no packet programs here"
        );
    });
}

#[test]
fn a_connected_socket_can_ask_somebody_else_too() {
    let mut world = World::new();
    let (vips, endpoints) =
        ([FAMILY.vip(53), FAMILY.other_vip(53)], [1, 2].map(|n| FAMILY.endpoint(n, 8053)));
    world.service(vips[0], UDP, &endpoints[..1]);
    world.service(vips[1], UDP, &endpoints[1..]);
    world.in_pod(|| {
        let (servers, client) = (Servers::start(&endpoints), FAMILY.udp());
        client.connect(vips[0]).unwrap();
        client.send_to(b"question", vips[1]).unwrap();
        assert_eq!(servers.received().0, 1);
        client.send(b"question").unwrap();
        assert_eq!(servers.answered(), 0);
        assert_eq!(sender(&client), vips[0]);
    });
}
