//! What a monitor is told.

use keelson_ebpf_abi::{
    DROP_NO_SUCH_ADDRESS, EVENT_CONNECTED, EVENT_DROPPED, EVENT_MASQUERADED, EVENT_REFUSED, Event,
    HOOK_EGRESS, HOOK_INGRESS, MASQUERADE_ALWAYS, MEMBER_SERVING, Route, Tuple, VERDICT_REJECT,
    WATCH_ALL, WATCH_FAILURES,
};

use crate::bytes::{ACK, SYN, tcp};
use crate::kernel::{INTERFACE, Kernel, to_pool, tuple};

fn kernel() -> Kernel {
    let mut kernel = Kernel::new();
    kernel.pool(1, &[("10.1.0.5:8080", 0, MEMBER_SERVING)]);
    kernel.frontend("10.96.0.10:80", 6, to_pool(7, 1, MASQUERADE_ALWAYS));
    let route = Route { verdict: VERDICT_REJECT, ..Route::default() };
    let refusing =
        keelson_ebpf_abi::Frontend { inside: route, outside: route, number: 8, flags: 0 };
    kernel.frontend("10.96.0.11:80", 6, refusing);
    kernel.range("service_ranges", "10.96.0.0", 16);
    kernel
}

#[test]
fn each_decision_is_told_once() {
    let mut kernel = kernel();
    kernel.watch(WATCH_ALL);
    let client = "198.51.100.7:40001";
    let packet = tcp(SYN, client, "10.96.0.10:80");
    let forwarded = packet.clone().to("10.1.0.5:8080");
    let refused = tcp(SYN, client, "10.96.0.11:80");
    let lost = tcp(SYN, client, "10.96.0.12:80");
    for flags in [SYN, ACK] {
        kernel.arrives(&tcp(flags, client, "10.96.0.10:80"));
        kernel.leaves(&tcp(flags, client, "10.1.0.5:8080"));
    }
    kernel.arrives(&refused);
    kernel.arrives(&lost);
    let mut events = kernel.events();
    assert!(events.is_sorted_by_key(|event| event.time_ns));
    for event in &mut events {
        assert_ne!(event.time_ns, 0);
        event.time_ns = 0;
    }
    let hidden = events[1].to;
    assert_eq!(
        hidden,
        Tuple { source: hidden.source, source_port_be: hidden.source_port_be, ..tuple(&forwarded) }
    );
    let event = |packet, to, frontend, what, hook| Event {
        tuple: tuple(packet),
        to,
        frontend,
        interface: INTERFACE,
        what,
        hook,
        ..Event::default()
    };
    let nothing = Tuple::default();
    assert_eq!(
        events,
        [
            event(&packet, tuple(&forwarded), 7, EVENT_CONNECTED, HOOK_INGRESS),
            event(&forwarded, hidden, 7, EVENT_MASQUERADED, HOOK_EGRESS),
            event(&refused, nothing, 8, EVENT_REFUSED, HOOK_INGRESS),
            Event {
                reason: u8::try_from(DROP_NO_SUCH_ADDRESS).unwrap(),
                ..event(&lost, nothing, 0, EVENT_DROPPED, HOOK_INGRESS)
            },
        ]
    );
}

#[test]
fn without_a_monitor_nothing_is_written() {
    let mut kernel = kernel();
    kernel.arrives(&tcp(SYN, "198.51.100.7:40001", "10.96.0.10:80"));
    assert!(kernel.events().is_empty());
}

#[test]
fn a_monitor_that_does_not_read_harms_nothing() {
    let mut kernel = kernel();
    kernel.watch(WATCH_ALL);
    for port in 0..4000 {
        let packet = tcp(SYN, &format!("198.51.100.7:{}", 1024 + port), "10.96.0.10:80");
        kernel.arrives_as(&packet, &packet.clone().to("10.1.0.5:8080"));
    }
    let read = u64::try_from(kernel.events().len()).unwrap();
    assert!(read < 4000);
    assert_eq!(read + kernel.events_lost(), 4000);
}

#[test]
fn who_wants_failures_is_told_of_them_alone() {
    let mut kernel = kernel();
    kernel.watch(WATCH_FAILURES);
    for to in ["10.96.0.10:80", "10.96.0.11:80", "10.96.0.12:80"] {
        kernel.arrives(&tcp(SYN, "198.51.100.7:40001", to));
    }
    let told: Vec<u32> = kernel.events().iter().map(|event| event.what).collect();
    assert_eq!(told, [EVENT_REFUSED, EVENT_DROPPED]);
}

/// What was on the same CPU before has nothing to do with it.
#[test]
fn a_drop_is_told_of_the_service_that_it_concerns() {
    let mut kernel = kernel();
    kernel.arrives(&tcp(SYN, "198.51.100.7:40001", "10.96.0.10:80"));
    kernel.hash::<u32, keelson_ebpf_abi::Interface>("interfaces").remove(&INTERFACE).unwrap();
    kernel.arrives(&tcp(SYN, "198.51.100.7:40002", "10.96.0.11:80"));
    kernel.watch(WATCH_FAILURES);
    // There is no address to hide the client with any more.
    kernel.leaves(&tcp(SYN, "198.51.100.7:40001", "10.1.0.5:8080"));
    let told: Vec<_> = kernel.events().iter().map(|event| (event.what, event.frontend)).collect();
    assert_eq!(told, [(EVENT_DROPPED, 7)]);
}
