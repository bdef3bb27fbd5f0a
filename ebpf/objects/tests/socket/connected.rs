//! connect(2), getpeername(2), and what connected UDP sockets see.

use std::collections::HashSet;
use std::io::ErrorKind;

use super::families::{ALL, Family, Servers, sender};
use super::world::{TCP, UDP, World, frontend_key};

/// Case 59: programs that ask whom they speak with see the Service.
#[test]
fn a_tcp_connection_reaches_an_endpoint_and_its_peer_is_the_service() {
    let mut world = World::new();
    for (port, family) in (100..).zip(ALL) {
        let endpoints = [1, 2, 3].map(|n| family.endpoint(n, 8000 + port));
        let (frontend, _) = world.service(family.vip(port), TCP, &endpoints);
        let reached: HashSet<usize> = world.in_pod(|| {
            let servers = Servers::start(&endpoints);
            let reach = |_| {
                let client = family.connect(family.vip(port)).unwrap();
                assert_eq!(client.peer_addr().unwrap(), family.written(family.vip(port)));
                servers.accepted()
            };
            (0..60).map(reach).collect()
        });
        // Each is missed once in 10^10 runs.
        assert_eq!(reached.len(), 3, "{family:?}: {reached:?}");
        assert_eq!(world.counters(frontend).connections, 60);
    }
}

#[test]
fn a_connected_udp_socket_speaks_with_the_service() {
    let mut world = World::new();
    for (port, family) in (100..).zip(ALL) {
        let endpoints = [family.endpoint(1, 8000 + port)];
        world.service(family.vip(port), UDP, &endpoints);
        world.in_pod(|| {
            let servers = Servers::start(&endpoints);
            let client = family.udp();
            let vip = family.written(family.vip(port));
            client.connect(vip).unwrap();
            assert_eq!(client.peer_addr().unwrap(), vip);
            for _ in 0..3 {
                client.send(b"question").unwrap();
                servers.answered();
                assert_eq!(sender(&client), vip, "{family:?}");
            }
        });
    }
}

#[test]
fn a_udp_socket_that_connects_again_forgets_the_service() {
    let mut world = World::new();
    for (port, family) in (100..).zip(ALL) {
        let endpoints = [family.endpoint(1, 8000 + port)];
        let vips = [family.vip(port), family.other_vip(port)];
        for vip in vips {
            world.service(vip, UDP, &endpoints);
        }
        world.in_pod(|| {
            let servers = Servers::start(&endpoints);
            let client = family.udp();
            // The same endpoint each time: only what was asked for last tells them apart.
            for to in [vips[0], vips[1], endpoints[0], vips[0]] {
                let to = family.written(to);
                client.connect(to).unwrap();
                assert_eq!(client.peer_addr().unwrap(), to);
                client.send(b"question").unwrap();
                servers.answered();
                assert_eq!(sender(&client), to, "{family:?}");
            }
        });
    }
}

#[test]
fn a_udp_socket_that_was_disconnected_may_speak_with_the_endpoint_itself() {
    let mut world = World::new();
    let (family, port) = (Family::V4, 53);
    let endpoints = [family.endpoint(1, 8053)];
    world.service(family.vip(port), UDP, &endpoints);
    world.in_pod(|| {
        let servers = Servers::start(&endpoints);
        let client = family.udp();
        client.connect(family.vip(port)).unwrap();
        disconnect(&client);
        client.send_to(b"question", endpoints[0]).unwrap();
        servers.answered();
        assert_eq!(sender(&client), endpoints[0]);
    });
}

#[test]
fn a_connect_that_failed_shows_nobody_a_wrong_peer() {
    let mut world = World::new();
    let (family, port) = (Family::V4, 53);
    let endpoints = [family.endpoint(1, 8053)];
    // Nothing leads to this one's endpoint.
    let lost = [family.other_vip(9999)];
    world.service(family.vip(port), UDP, &endpoints);
    world.service(family.other_vip(port), UDP, &lost);
    world.in_pod(|| {
        let client = family.udp();
        client.connect(family.vip(port)).unwrap();
        let error = client.connect(family.other_vip(port)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
        // The kernel keeps the old connection, to the endpoint.
        assert_eq!(client.peer_addr().unwrap(), endpoints[0]);
    });
}

#[test]
fn an_ipv6_socket_may_be_given_an_ipv4_address() {
    let mut world = World::new();
    let (vip, endpoint) = (Family::V4.vip(53), Family::V4.endpoint(1, 8053));
    world.service(vip, UDP, &[endpoint]);
    world.in_pod(|| {
        let servers = Servers::start(&[endpoint]);
        let client = Family::Mapped.udp();
        // The standard library passes the address as it is: AF_INET to an AF_INET6 socket.
        client.connect(vip).unwrap();
        assert_eq!(client.peer_addr().unwrap(), Family::Mapped.written(vip));
        client.send(b"question").unwrap();
        servers.answered();
        assert_eq!(sender(&client), Family::Mapped.written(vip));
        let client = Family::Mapped.udp();
        client.send_to(b"question", vip).unwrap();
        servers.answered();
        assert_eq!(sender(&client), Family::Mapped.written(vip));
    });
}

#[test]
fn a_connection_outlives_its_service() {
    let mut world = World::new();
    let (vip, endpoint) = (Family::V4.vip(80), Family::V4.endpoint(1, 8080));
    world.service(vip, TCP, &[endpoint]);
    let (servers, client) = world.in_pod(|| {
        let servers = Servers::start(&[endpoint]);
        let client = Family::V4.connect(vip).unwrap();
        servers.accepted();
        (servers, client)
    });
    world.remove_frontend(vip, TCP);
    assert!(
        world
            .map::<_, keelson_ebpf_abi::Frontend>("frontends")
            .get(&frontend_key(vip, TCP), 0)
            .is_err()
    );
    world.in_pod(|| assert_eq!(client.peer_addr().unwrap(), vip));
    drop(servers);
}

#[test]
fn only_threads_in_the_cgroup_are_concerned() {
    let mut world = World::new();
    let (vip, endpoint) = (Family::V4.vip(80), Family::V4.endpoint(1, 8080));
    world.service(vip, TCP, &[endpoint]);
    world.in_pod(|| {
        let _servers = Servers::start(&[endpoint]);
        Family::V4.connect(vip).unwrap();
    });
    let outside = world.pod.run(|| Family::V4.connect(vip)).unwrap();
    assert_eq!(outside.unwrap_err().kind(), ErrorKind::NetworkUnreachable);
}

/// connect(2) to no family.
#[expect(unsafe_code, reason = "the standard library cannot disconnect")]
fn disconnect(socket: &std::net::UdpSocket) {
    use std::os::fd::AsRawFd;
    let nowhere =
        libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of_val(&nowhere) as libc::socklen_t;
    // SAFETY: the address outlives the call, and the length is its own.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, length) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
