//! What a monitor is told of sockets.

use std::io::ErrorKind;
use std::net::SocketAddr;

use aya::maps::{Array, RingBuf};
use keelson_ebpf_abi::{
    EVENT_CONNECTED, EVENT_REFUSED, Event, HOOK_CONNECT, HOOK_SEND, Route, VERDICT_REJECT,
    WATCH_ALL, WATCH_FAILURES, WATCH_NOTHING, namespace_of_client,
};

use super::families::{Family, Servers};
use super::world::{TCP, UDP, World, cookie_of, has_set_retval};

const FAMILY: Family = Family::V4;

impl World {
    fn watch(&mut self, wants: u32) {
        let map = self.bpf.map_mut("watched").unwrap();
        Array::<_, u32>::try_from(map).unwrap().set(0, wants, 0).unwrap();
    }

    fn told(&mut self) -> Vec<Told> {
        let mut events = RingBuf::try_from(self.bpf.map_mut("events").unwrap()).unwrap();
        let mut told = Vec::new();
        while let Some(item) = events.next() {
            assert_eq!(item.len(), size_of::<Event>());
            // SAFETY: it is as long as the type, which any bytes are a value of.
            #[allow(unsafe_code, reason = "plain data from the kernel")]
            told.push(Told::of(&unsafe { item.as_ptr().cast::<Event>().read_unaligned() }));
        }
        told
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Told {
    what: u32,
    hook: u8,
    frontend: u32,
    netns: Option<u64>,
    to: SocketAddr,
    endpoint: Option<SocketAddr>,
}

impl Told {
    fn of(event: &Event) -> Self {
        let (tuple, to) = (&event.tuple, &event.to);
        let endpoint = SocketAddr::new(to.destination.into(), u16::from_be(to.destination_port_be));
        assert_ne!(event.time_ns, 0);
        Told {
            what: event.what,
            hook: event.hook,
            frontend: event.frontend,
            netns: namespace_of_client(&tuple.source),
            to: SocketAddr::new(tuple.destination.into(), u16::from_be(tuple.destination_port_be)),
            endpoint: (event.what == EVENT_CONNECTED).then_some(endpoint),
        }
    }
}

#[test]
fn choices_and_refusals_are_told_once() {
    let mut world = World::new();
    let endpoint = FAMILY.endpoint(1, 8080);
    let (web, _) = world.service(FAMILY.vip(80), TCP, &[endpoint]);
    let (names, _) = world.service(FAMILY.vip(53), UDP, &[endpoint]);
    let reject = Route { verdict: VERDICT_REJECT, ..Route::default() };
    let empty = world.frontend(FAMILY.vip(81), TCP, reject);
    world.watch(WATCH_ALL);
    let ask = |world: &World| {
        world.in_pod(|| {
            let _servers = Servers::start(&[endpoint]);
            FAMILY.connect(FAMILY.vip(80)).unwrap();
            let client = FAMILY.udp();
            for _ in 0..2 {
                client.send_to(b"question", FAMILY.vip(53)).unwrap();
            }
            for port in [81, 82] {
                let refused = FAMILY.connect(FAMILY.vip(port)).unwrap_err().kind();
                assert_eq!(refused == ErrorKind::ConnectionRefused, has_set_retval());
            }
        });
    };
    ask(&world);
    let netns = Some(cookie_of(&world.pod));
    let connected = |hook, frontend, port| Told {
        what: EVENT_CONNECTED,
        hook,
        frontend,
        netns,
        to: FAMILY.vip(port),
        endpoint: Some(endpoint),
    };
    let refused = |frontend, port| Told {
        what: EVENT_REFUSED,
        hook: HOOK_CONNECT,
        frontend,
        netns,
        to: FAMILY.vip(port),
        endpoint: None,
    };
    let mut all = vec![connected(HOOK_CONNECT, web, 80), connected(HOOK_SEND, names, 53)];
    // What is left to packets is told there.
    if has_set_retval() {
        all.extend([refused(empty, 81), refused(0, 82)]);
    }
    assert_eq!(world.told(), all);
    world.watch(WATCH_FAILURES);
    ask(&world);
    assert_eq!(world.told(), all[2..]);
    world.watch(WATCH_NOTHING);
    ask(&world);
    assert_eq!(world.told(), []);
}
