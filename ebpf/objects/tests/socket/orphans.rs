//! Connected UDP sockets whose endpoint goes: case 58 of the reference.

use std::io::ErrorKind;
use std::net::UdpSocket;

use aya::maps::Array;
use keelson_ebpf_abi::{Connected, MEMBER_DRAINING, MemberKey, PLACES, Peer};
use keelson_netlink::netns;

use super::connected_udp::Orphans;
use super::families::{ALL, Family, Servers};
use super::world::{TCP, UDP, World, cookie_of, endpoint_of};

/// As the proxy does it.
fn end(world: &mut World) -> usize {
    let members = world.map::<MemberKey, u32>("members");
    let members: Vec<_> = members.keys().map(Result::unwrap).collect();
    let orphans = Orphans::among(connected(world), |member| members.contains(member));
    let ended = orphans.end([world.pod.try_clone().unwrap()]);
    assert!(ended.troubles.is_empty(), "{:?}", ended.troubles);
    for (cookie, peer) in ended.settled {
        world.map("connected_udp").insert(cookie, peer.ended(), 0).unwrap();
    }
    ended.count
}

fn connected(world: &mut World) -> Vec<(u64, Peer)> {
    world.map("connected_udp").iter().map(Result::unwrap).collect()
}

fn is_aborted(client: &UdpSocket) -> bool {
    client.set_nonblocking(true).unwrap();
    client.recv(&mut [0; 64]).unwrap_err().kind() == ErrorKind::ConnectionAborted
}

#[test]
fn exactly_the_sockets_that_lost_their_endpoint_are_ended() {
    let mut world = World::new();
    for (port, family) in (100..).zip(ALL) {
        let endpoints = [1, 2].map(|n| family.endpoint(n, 8000 + port));
        let vips = [family.vip(port), family.other_vip(port)];
        let (_, pool) = world.service(vips[0], UDP, &endpoints[..1]);
        world.service(vips[1], UDP, &endpoints);
        let connected = |world: &World, to| {
            world.in_pod(|| {
                let client = family.udp();
                client.connect(family.written(to)).unwrap();
                client
            })
        };
        let servers = world.in_pod(|| Servers::start(&endpoints));
        let through = connected(&world, vips[0]);
        let itself = connected(&world, endpoints[0]);
        let elsewhere: Vec<_> = (0..10).map(|_| connected(&world, vips[1])).collect();
        assert_eq!(end(&mut world), 0);

        world.set_member(pool, endpoints[0], MEMBER_DRAINING);
        assert_eq!(end(&mut world), 0, "a draining endpoint keeps its flows");
        world.set_member(pool, endpoints[0], 0);
        assert_eq!(end(&mut world), 1, "{family:?}");
        assert_eq!(end(&mut world), 0);

        assert!(is_aborted(&through), "{family:?}");
        for client in elsewhere.iter().chain([&itself]) {
            world.in_pod(|| client.send(b"question").unwrap());
            servers.answered();
            assert!(client.recv(&mut [0; 64]).is_ok());
        }
    }
}

#[test]
fn the_books_of_connected_udp_sockets_are_right() {
    let mut world = World::new();
    let family = Family::V4;
    let (vip, endpoint) = (family.vip(53), family.endpoint(1, 8053));
    let (_, pool) = world.service(vip, UDP, &[endpoint]);
    let client = world.in_pod(|| {
        let client = family.udp();
        client.connect(vip).unwrap();
        client
    });
    let rests_on = MemberKey { pool, endpoint: endpoint_of(endpoint) };
    let all: Vec<_> = connected(&mut world).iter().map(|(_, peer)| peer.rests_on()).collect();
    assert_eq!(all, [rests_on]);
    let again = client.try_clone().unwrap();
    drop(client);
    assert_eq!(connected(&mut world).len(), 1);
    // Closed by a thread that is not in the cgroup: what counts is where it was made.
    drop(again);
    assert_eq!(connected(&mut world), []);

    let client = world.in_pod(|| {
        let client = family.udp();
        client.connect(vip).unwrap();
        client.connect(endpoint).unwrap();
        client
    });
    let all: Vec<_> = connected(&mut world).into_iter().map(|(_, peer)| peer).collect();
    assert_eq!(all, [Peer::default()]);
    drop(client);
    assert_eq!((connected(&mut world), counted(&mut world)), (vec![], 0));
}

#[test]
fn connected_tcp_sockets_are_forgotten_with_the_socket() {
    let mut world = World::new();
    let family = Family::V4;
    let (vip, endpoint) = (family.vip(80), family.endpoint(1, 8080));
    world.service(vip, TCP, &[endpoint]);
    let clients = world.in_pod(|| {
        let _servers = Servers::start(&[endpoint]);
        let through: Vec<_> = (0..3).map(|_| family.connect(vip).unwrap()).collect();
        (through, family.connect(endpoint).unwrap())
    });
    assert_eq!(counted(&mut world), 3);
    drop(clients);
    assert_eq!(counted(&mut world), 0);
}

#[test]
fn a_tcp_socket_whose_place_is_taken_is_known_all_the_same() {
    let mut world = World::new();
    let family = Family::V4;
    let (vip, endpoint) = (family.vip(80), family.endpoint(1, 8080));
    world.service(vip, TCP, &[endpoint]);
    let hashed = |world: &mut World| world.map::<u64, Peer>("connected_tcp").keys().count();
    // All places are taken.
    let mut places: Array<_, Connected> =
        Array::try_from(world.bpf.map_mut("connected").unwrap()).unwrap();
    for place in 0..PLACES {
        places.set(place, Connected { count: 1, ..Connected::default() }, 0).unwrap();
    }
    let client = world.in_pod(|| {
        let _servers = Servers::start(&[endpoint]);
        let client = family.connect(vip).unwrap();
        assert_eq!(client.peer_addr().unwrap(), vip);
        client
    });
    assert_eq!(hashed(&mut world), 1);
    assert_eq!(counted(&mut world), u64::from(PLACES) + 1);
    drop(client);
    assert_eq!(hashed(&mut world), 0);
    assert_eq!(counted(&mut world), u64::from(PLACES));
}

/// Those that there is no more room for: their packets go to the Service itself, and nobody answers there.
#[test]
fn a_full_table_leaves_sockets_to_the_packets() {
    const ROOM: u32 = 8;
    let mut world = World::with_room_for(ROOM);
    let family = Family::V4;
    let (vip, endpoint) = (family.vip(53), family.endpoint(1, 5353));
    world.service(vip, UDP, &[endpoint]);
    let connect = || {
        let client = family.udp();
        client.connect(vip).map(|()| client).map_err(|error| error.kind())
    };
    let clients = world.in_pod(|| (0..ROOM).map(|_| connect().unwrap()).collect::<Vec<_>>());
    for client in &clients {
        assert_eq!(client.peer_addr().unwrap(), vip);
    }
    // Only the route is missing here.
    assert_eq!(world.in_pod(|| connect().map(drop)), Err(ErrorKind::NetworkUnreachable));
    assert_eq!(connected(&mut world).len(), ROOM as usize);
    drop(clients);
    assert_eq!(counted(&mut world), 0);
    world.in_pod(connect).unwrap();
}

/// How many sockets there are, as the programs count.
fn counted(world: &mut World) -> u64 {
    let places: Array<_, Connected> = Array::try_from(world.bpf.map("connected").unwrap()).unwrap();
    let count = |place: Connected| (place.count & 0xffff_ffff) + (place.count >> 32);
    places.iter().map(|place| count(place.unwrap())).sum()
}

#[test]
fn the_namespaces_of_processes_are_found_once() {
    let own = netns::Netns::current().unwrap().identity().unwrap();
    let same = |netns: &netns::Netns| netns.identity().unwrap() == own;
    assert_eq!(netns::existing(&[]).filter(same).count(), 1);
    // One that nobody lives in, and that is pinned nowhere.
    let world = World::new();
    let of_pod = cookie_of(&world.pod);
    assert!(netns::existing(&[]).all(|netns| cookie_of(&netns) != of_pod));
}

#[test]
fn pinned_namespaces_are_found() {
    let folder = std::env::temp_dir().join(format!("keelson-netns-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("pinned");
    let pinned = netns::Netns::create(&path).unwrap().identity().unwrap();
    let found = netns::existing(&[&folder, &folder])
        .filter(|netns| netns.identity().unwrap() == pinned)
        .count();
    netns::delete(&path).unwrap();
    std::fs::remove_dir(&folder).unwrap();
    assert_eq!(found, 1);
}
