//! Who may use what, and what is left to the packet layer: there is none here, so a Service's address
//! leads nowhere then.

use std::io::{Error, ErrorKind};
use std::net::SocketAddr;

use keelson_ebpf_abi::{
    ADDRESS_NODE_PORTS, Affinity, AffinityKey, FRONTEND_HAS_SOURCES, Frontend, MASQUERADE_ALWAYS,
    MASQUERADE_UNLESS_POD, Route, SETTING_EXEMPTS_NAMESPACES, SETTING_KNOWS_PODS,
    SETTING_NODE_SOCKETS_ONLY, VERDICT_DROP, VERDICT_REJECT, client_of_namespace,
};

use super::families::{ALL, Family, Servers};
use super::world::{TCP, UDP, World, cookie_of, forward, has_set_retval};

const FAMILY: Family = Family::V4;
const LEFT: ErrorKind = ErrorKind::NetworkUnreachable;
const REFUSED: ErrorKind = ErrorKind::ConnectionRefused;

/// How a TCP connect fails, and how a datagram does.
fn tcp(to: SocketAddr) -> Result<(), ErrorKind> {
    FAMILY.connect(to).map(drop).map_err(kind)
}

fn udp(to: SocketAddr) -> Result<(), ErrorKind> {
    FAMILY.udp().send_to(b"question", to).map(drop).map_err(kind)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn kind(error: Error) -> ErrorKind {
    error.kind()
}

fn verdict(verdict: u8) -> Route {
    Route { verdict, ..Route::default() }
}

/// How a call ends that this layer refuses, where the kernel lets it.
fn refused() -> ErrorKind {
    if has_set_retval() { REFUSED } else { LEFT }
}

#[test]
fn a_service_without_endpoints_refuses() {
    let mut world = World::new();
    // What packets refuse they count.
    let counted = u64::from(has_set_retval());
    for (port, family) in (100..).zip(ALL) {
        let vip = family.vip(port);
        let numbers = [TCP, UDP].map(|p| world.frontend(vip, p, verdict(VERDICT_REJECT)));
        world.in_pod(|| {
            assert_eq!(family.connect(vip).unwrap_err().kind(), refused(), "{family:?}");
            let vip = family.written(vip);
            let client = family.udp();
            let error = client.send_to(b"question", vip).unwrap_err().kind();
            assert_eq!(error, refused(), "{family:?}");
            // Its packets will be answered; only the route is missing here.
            assert_eq!(client.connect(vip).unwrap_err().kind(), LEFT, "{family:?}");
        });
        assert_eq!(
            numbers.map(|n| world.counters_if_any(n).map_or(0, |c| c.refused)),
            [counted; 2]
        );
    }
}

#[test]
fn a_port_that_a_cluster_ip_does_not_have_refuses() {
    let mut world = World::new();
    world.service(FAMILY.vip(80), TCP, &[FAMILY.endpoint(1, 8080)]);
    world.in_pod(|| {
        assert_eq!(tcp(FAMILY.vip(81)), Err(refused()));
        assert_eq!(udp(FAMILY.vip(80)), Err(refused()));
        // Resolvers ask so for their own address; only the route is missing here.
        assert_eq!(FAMILY.udp().connect(FAMILY.vip(9)).unwrap_err().kind(), LEFT);
    });
}

#[test]
fn old_kernels_leave_refusals_to_the_packets() {
    let mut world = World::with_set_retval(0);
    world.service(FAMILY.vip(80), TCP, &[FAMILY.endpoint(1, 8080)]);
    let empty = world.frontend(FAMILY.other_vip(80), TCP, verdict(VERDICT_REJECT));
    world.in_pod(|| {
        assert_eq!(tcp(FAMILY.vip(81)), Err(LEFT));
        assert_eq!(tcp(FAMILY.other_vip(80)), Err(LEFT));
    });
    // They count there.
    assert_eq!(world.counters_if_any(empty), None);
}

#[test]
fn what_only_packets_can_show_is_left_to_them() {
    let mut world = World::new();
    let pool = world.pool(&[FAMILY.endpoint(1, 8080)], 0);
    world.frontend(FAMILY.vip(1), TCP, verdict(VERDICT_DROP));
    let masqueraded = Route { masquerade: MASQUERADE_ALWAYS, ..forward(pool) };
    world.frontend(FAMILY.vip(2), TCP, masqueraded);
    let filtered = Frontend {
        inside: forward(pool),
        outside: forward(pool),
        number: world.number(),
        flags: FRONTEND_HAS_SOURCES,
    };
    world.set_frontend(FAMILY.vip(3), TCP, filtered);
    world.in_pod(|| {
        let _servers = Servers::start(&[FAMILY.endpoint(1, 8080)]);
        for port in 1..=3 {
            assert_eq!(tcp(FAMILY.vip(port)), Err(LEFT), "{port}");
        }
    });
    world.on_node(|| {
        let _servers = Servers::start(&[FAMILY.endpoint(1, 8080)]);
        assert_eq!(tcp(FAMILY.vip(1)), Err(LEFT));
        assert_eq!(tcp(FAMILY.vip(2)), Ok(()), "the source is the node's anyway");
        assert_eq!(tcp(FAMILY.vip(3)), Err(LEFT));
    });
}

#[test]
fn pods_that_cannot_be_told_take_the_way_from_outside() {
    let mut world = World::new();
    let pool = world.pool(&[FAMILY.endpoint(1, 8080)], 0);
    let frontend = |number, inside, outside| Frontend { inside, outside, number, flags: 0 };
    let local = frontend(world.number(), forward(pool), verdict(VERDICT_REJECT));
    world.set_frontend(FAMILY.vip(1), TCP, local);
    let unless_pod = Route { masquerade: MASQUERADE_UNLESS_POD, ..forward(pool) };
    world.frontend(FAMILY.vip(2), TCP, unless_pod);
    let outcome = || {
        let _servers = Servers::start(&[FAMILY.endpoint(1, 8080)]);
        [1, 2].map(|port| tcp(FAMILY.vip(port)))
    };
    assert_eq!(world.in_pod(outcome), [Ok(()), Ok(())]);
    assert_eq!(world.on_node(outcome), [Ok(()), Ok(())]);
    world.set_settings(0);
    assert_eq!(world.in_pod(outcome), [Err(refused()), Err(LEFT)]);
    assert_eq!(world.on_node(outcome), [Ok(()), Ok(())]);
}

#[test]
fn node_ports_answer_at_the_nodes_addresses() {
    let mut world = World::new();
    for (port, family) in (30_000..).zip(ALL) {
        let endpoint = family.endpoint(1, 8000);
        world.set_address(family.endpoint(3, 0).ip(), ADDRESS_NODE_PORTS);
        world.set_address(family.loopback(0).ip(), ADDRESS_NODE_PORTS);
        let pool = world.pool(&[endpoint], 0);
        world.frontend(family.any(port), TCP, forward(pool));
        let reach = |at: SocketAddr| {
            let stream = family.connect(at).map_err(kind)?;
            Ok(stream.peer_addr().unwrap())
        };
        let written = |at: SocketAddr| Ok(family.written(at));
        world.on_node(|| {
            let _servers = Servers::start(&[endpoint]);
            for at in [family.endpoint(3, port), family.loopback(port)] {
                assert_eq!(reach(at), written(at), "{family:?}");
            }
            let any = family.any(port);
            assert_eq!(reach(any), written(family.loopback(port)), "{family:?}");
            assert_eq!(reach(family.endpoint(2, port)), Err(REFUSED), "not one of the node's");
        });
        world.in_pod(|| {
            let _servers = Servers::start(&[endpoint]);
            let own = family.endpoint(3, port);
            assert_eq!(reach(own), written(own), "{family:?}");
            for at in [family.loopback(port), family.any(port)] {
                assert_eq!(reach(at), Err(REFUSED), "a pod's loopback is its own");
            }
        });
    }
}

#[test]
fn a_socket_bound_to_the_loopback_is_left_alone() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage};
    use std::os::fd::AsRawFd;
    let mut world = World::new();
    for family in [Family::V4, Family::V6] {
        let endpoint = family.endpoint(1, 8000);
        world.set_address(family.loopback(0).ip(), ADDRESS_NODE_PORTS);
        let pool = world.pool(&[endpoint], 0);
        world.frontend(family.any(30_000), TCP, forward(pool));
        world.on_node(|| {
            let _servers = Servers::start(&[endpoint]);
            let number =
                if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
            let flags = SockFlag::empty();
            let socket = nix::sys::socket::socket(number, SockType::Stream, flags, None).unwrap();
            let at = |port| SockaddrStorage::from(family.loopback(port));
            nix::sys::socket::bind(socket.as_raw_fd(), &at(0)).unwrap();
            let error = nix::sys::socket::connect(socket.as_raw_fd(), &at(30_000)).unwrap_err();
            assert_eq!(error, nix::errno::Errno::ECONNREFUSED, "nobody listens there");
        });
    }
}

#[test]
fn clients_of_one_namespace_stick_to_one_endpoint() {
    let mut world = World::new();
    let endpoints = [1, 2, 3, 4].map(|n| FAMILY.endpoint(n, 8080));
    let pool = world.pool(&endpoints, 10_800);
    world.frontend(FAMILY.vip(80), TCP, forward(pool));
    let reached = |count: usize| {
        let servers = Servers::start(&endpoints);
        let reach = |_| {
            FAMILY.connect(FAMILY.vip(80)).unwrap();
            servers.accepted()
        };
        let all: std::collections::HashSet<usize> = (0..count).map(reach).collect();
        assert_eq!(all.len(), 1);
        all.into_iter().next().unwrap()
    };
    let first = world.in_pod(|| reached(10));
    world.on_node(|| reached(10));
    // It is kept for its namespace, with the time of the last connection.
    let key = AffinityKey { pool, client: client_of_namespace(cookie_of(&world.pod)) };
    let mut kept: Affinity = world.map("affinity").get(&key, 0).unwrap();
    assert_eq!(kept.endpoint.address, endpoints[first].ip().into());
    // Case 42: one that is no member any more does not hold.
    world.set_member(pool, endpoints[first], 0);
    let others: std::collections::HashSet<usize> = (0..40)
        .map(|_| {
            world.map("affinity").insert(key, kept, 0).unwrap();
            world.in_pod(|| reached(1))
        })
        .collect();
    assert!(others.len() > 1, "{others:?}");
    // Nor does one that is too old.
    world.set_member(pool, endpoints[first], 1);
    kept.last_used_ns = 0;
    world
        .map("pools")
        .insert(pool, keelson_ebpf_abi::Pool { count: 4, affinity_secs: 1 }, 0)
        .unwrap();
    let others: std::collections::HashSet<usize> = (0..40)
        .map(|_| {
            world.map("affinity").insert(key, kept, 0).unwrap();
            world.in_pod(|| reached(1))
        })
        .collect();
    assert!(others.len() > 1, "{others:?}");
}

/// Case 59: a virtual machine, or a sidecar that must see the Service's address in packets.
#[test]
fn an_exempt_namespace_is_left_alone() {
    let mut world = World::new();
    let endpoint = FAMILY.endpoint(1, 8080);
    world.service(FAMILY.vip(80), TCP, &[endpoint]);
    world.service(FAMILY.vip(80), UDP, &[endpoint]);
    let pod = cookie_of(&world.pod);
    world.map("exempt").insert(pod, 0_u32, 0).unwrap();
    world.set_settings(SETTING_KNOWS_PODS | SETTING_EXEMPTS_NAMESPACES);
    let outcome = || {
        let _servers = Servers::start(&[endpoint]);
        [tcp(FAMILY.vip(80)), tcp(FAMILY.vip(81)), udp(FAMILY.vip(80))]
    };
    assert_eq!(world.in_pod(outcome), [Err(LEFT); 3]);
    assert_eq!(world.on_node(outcome), [Ok(()), Err(refused()), Ok(())]);
    world.set_settings(SETTING_KNOWS_PODS);
    assert_eq!(world.in_pod(outcome), [Ok(()), Err(refused()), Ok(())]);
}

/// Case 59, for all pods.
#[test]
fn sockets_of_pods_can_all_be_left_alone() {
    let mut world = World::new();
    let endpoint = FAMILY.endpoint(1, 8080);
    world.service(FAMILY.vip(80), TCP, &[endpoint]);
    world.set_settings(SETTING_KNOWS_PODS | SETTING_NODE_SOCKETS_ONLY);
    let outcome = || {
        let _servers = Servers::start(&[endpoint]);
        [tcp(FAMILY.vip(80)), tcp(FAMILY.vip(81))]
    };
    assert_eq!(world.in_pod(outcome), [Err(LEFT); 2]);
    assert_eq!(world.on_node(outcome), [Ok(()), Err(refused())]);
}
