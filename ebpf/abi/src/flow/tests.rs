use super::*;

const SECOND: u64 = NS_PER_SEC;

fn flow(protocol: u8, role: u8, state: u8) -> Flow {
    let to = Tuple { protocol, ..Tuple::default() };
    Flow { to, role, state, last_seen_ns: 1_000_000 * SECOND, ..Flow::default() }
}

#[test]
fn connections_are_over_when_closed_or_after_their_time() {
    let done = STATE_ANSWERED | STATE_CLIENT_DONE | STATE_ENDPOINT_DONE;
    for (protocol, state, secs) in [
        (PROTOCOL_TCP, 0, 60),
        (PROTOCOL_TCP, STATE_ANSWERED, 86_400),
        (PROTOCOL_TCP, STATE_ANSWERED | STATE_CLIENT_DONE, 60),
        (PROTOCOL_TCP, STATE_ANSWERED | STATE_ENDPOINT_DONE, 60),
        (PROTOCOL_TCP, done, 0),
        (PROTOCOL_TCP, STATE_RESET, 0),
        (PROTOCOL_TCP, STATE_ANSWERED | STATE_RESET, 0),
        (PROTOCOL_UDP, 0, 30),
        (PROTOCOL_UDP, STATE_ANSWERED, 120),
        (PROTOCOL_SCTP, 0, 60),
        (PROTOCOL_SCTP, STATE_ANSWERED, 86_400),
        (PROTOCOL_SCTP, STATE_RESET, 0),
    ] {
        let flow = flow(protocol, FLOW_TO_ENDPOINT, state);
        let end = flow.last_seen_ns + secs * SECOND;
        assert!(flow.is_over(end), "{protocol} {state}");
        assert!(secs == 0 || !flow.is_over(end - 1), "{protocol} {state}");
        // Another CPU's clock may be ahead of ours.
        assert!(secs == 0 || !flow.is_over(flow.last_seen_ns - 1), "{protocol} {state}");
    }
}

#[test]
fn where_one_direction_is_not_seen_the_other_one_tells_all() {
    let begun = flow(PROTOCOL_TCP, FLOW_TO_ENDPOINT, STATE_TELLS);
    assert_eq!(begun.state_after(SIGN_START), STATE_TELLS);
    assert_eq!(begun.state_after(0), STATE_TELLS | STATE_ANSWERED);
    for (protocol, state, secs) in [
        (PROTOCOL_TCP, STATE_TELLS, 60),
        (PROTOCOL_TCP, STATE_TELLS | STATE_ANSWERED, 86_400),
        (PROTOCOL_TCP, STATE_TELLS | STATE_ANSWERED | STATE_CLIENT_DONE, 0),
        (PROTOCOL_TCP, STATE_TOLD, 60),
        (PROTOCOL_TCP, STATE_TOLD | STATE_ANSWERED, 86_400),
        (PROTOCOL_TCP, STATE_TOLD | STATE_ANSWERED | STATE_ENDPOINT_DONE, 0),
        (PROTOCOL_UDP, STATE_TELLS, 120),
        (PROTOCOL_UDP, STATE_TOLD, 30),
    ] {
        let flow = flow(protocol, FLOW_TO_ENDPOINT, state);
        let end = flow.last_seen_ns + secs * SECOND;
        assert!(flow.is_over(end), "{protocol} {state}");
        assert!(secs == 0 || !flow.is_over(end - 1), "{protocol} {state}");
    }
}

#[test]
fn an_endpoint_remembers_for_a_good_minute_what_it_closed_first() {
    const DONE: u8 = STATE_ANSWERED | STATE_CLIENT_DONE | STATE_ENDPOINT_DONE;
    for (protocol, state, secs) in [
        (PROTOCOL_TCP, DONE, 0),
        (PROTOCOL_TCP, DONE | STATE_ENDPOINT_FIRST, 68),
        (PROTOCOL_TCP, DONE | STATE_ENDPOINT_FIRST | STATE_RESET, 0),
        (PROTOCOL_TCP, STATE_ANSWERED, 86_400),
        (PROTOCOL_UDP, STATE_ANSWERED, 120),
        (PROTOCOL_SCTP, DONE, 0),
    ] {
        let flow = flow(protocol, FLOW_UNMASQUERADE, state);
        let end = flow.last_seen_ns + secs * SECOND;
        assert!(flow.is_forgotten(end), "{protocol} {state}");
        assert!(secs == 0 || !flow.is_forgotten(end - 1), "{protocol} {state}");
    }
}

#[test]
fn both_directions_bring_the_state_forward() {
    for (role, signs, state) in [
        (FLOW_TO_ENDPOINT, SIGN_START, 0),
        (FLOW_MASQUERADE, SIGN_DONE, STATE_CLIENT_DONE),
        (FLOW_FROM_ENDPOINT, SIGN_ACCEPT, STATE_ANSWERED),
        (FLOW_UNMASQUERADE, SIGN_DONE, STATE_ANSWERED | STATE_ENDPOINT_DONE | STATE_ENDPOINT_FIRST),
        (FLOW_TO_ENDPOINT, SIGN_RESET, STATE_RESET),
        (FLOW_FROM_ENDPOINT, SIGN_RESET, STATE_ANSWERED | STATE_RESET),
    ] {
        assert_eq!(flow(PROTOCOL_TCP, role, 0).state_after(signs), state);
        assert_eq!(flow(PROTOCOL_TCP, role, 15).state_after(signs), 15);
    }
    let last = flow(PROTOCOL_TCP, FLOW_FROM_ENDPOINT, STATE_ANSWERED | STATE_CLIENT_DONE);
    let done = STATE_ANSWERED | STATE_CLIENT_DONE | STATE_ENDPOINT_DONE;
    assert_eq!(last.state_after(SIGN_DONE), done);
}

#[test]
fn a_packet_is_noted_once_a_second_or_when_it_changes_something() {
    let flow = flow(PROTOCOL_TCP, FLOW_TO_ENDPOINT, STATE_ANSWERED);
    let now = flow.last_seen_ns;
    assert!(!flow.must_note(STATE_ANSWERED, now + SECOND - 1));
    assert!(flow.must_note(STATE_ANSWERED, now + SECOND));
    assert!(flow.must_note(STATE_ANSWERED | STATE_RESET, now));
}

#[test]
fn flags_tell_beginnings_and_ends() {
    for (flags, signs) in [
        (0x02, SIGN_START),
        (0xc2, SIGN_START),
        (0x12, SIGN_ACCEPT),
        (0x10, 0),
        (0x11, SIGN_DONE),
        (0x04, SIGN_RESET),
        (0x14, SIGN_RESET),
        (0x03, SIGN_DONE),
        (0x06, SIGN_RESET),
    ] {
        assert_eq!(tcp_signs(flags), signs, "{flags:#x}");
    }
}

#[test]
fn the_opposite_of_the_opposite_is_the_flow() {
    let key = Tuple { source_port_be: 1, destination_port_be: 2, ..Tuple::default() };
    for role in [FLOW_TO_ENDPOINT, FLOW_FROM_ENDPOINT, FLOW_MASQUERADE, FLOW_UNMASQUERADE] {
        let flow = flow(PROTOCOL_TCP, role, 3);
        assert_eq!(flow.opposite(&key).opposite(&flow.to.reversed()), flow);
        assert_ne!(flow.opposite(&key).is_from_client(), flow.is_from_client());
    }
}
