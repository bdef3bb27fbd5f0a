//! Under random packets, what is sent on at XDP is what the programs for packets and the kernel would send on, and as
//! much is known of connections afterwards.

use keelson_ebpf_abi::{Flow, Tuple};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::bytes::{ACK, FIN, RST, SYN, Sent, tcp, udp};
use crate::stage::{Stage, WAYS, XDP_PASS, XDP_TX, carried};

#[derive(Clone, Debug)]
struct Step {
    family: usize,
    client: u8,
    from_client: bool,
    /// None for UDP.
    flags: Option<u8>,
    changes: Vec<(usize, u8)>,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let flags = prop_oneof![
        2 => Just(Some(SYN)),
        2 => Just(Some(SYN | ACK)),
        8 => Just(Some(ACK)),
        1 => Just(Some(FIN | ACK)),
        1 => Just(Some(RST)),
        6 => Just(None),
    ];
    let changes = prop_oneof![
        3 => Just(Vec::new()),
        1 => prop::collection::vec((0usize..100, any::<u8>()), 1..3),
    ];
    let step = (0usize..2, 0u8..3, any::<bool>(), flags, changes).prop_map(
        |(family, client, from_client, flags, changes)| Step {
            family,
            client,
            from_client,
            flags,
            changes,
        },
    );
    prop::collection::vec(step, 1..120)
}

/// What connections look like behind the node, by family, client and protocol.
type Hidden = std::collections::BTreeMap<(usize, u8, bool), Sent>;

fn frame(stage: &Stage, step: &Step, hidden: &Hidden) -> Option<Vec<u8>> {
    let [_, service, _] = WAYS[step.family];
    let packet = match step.flags {
        Some(flags) => tcp(flags, service, service),
        None => udp(service, service),
    };
    let packet = if step.from_client {
        packet.from(&client(step))
    } else {
        let known = hidden.get(&key(step))?;
        packet.from(&known.destination.to_string()).to(&known.source.to_string())
    };
    let mut frame = stage.to_node(&packet);
    for (at, value) in &step.changes {
        // The link header stays: the kernel's own test would take the packet for another kind.
        let at = 14 + at % (frame.len() - 14);
        frame[at] = *value;
    }
    Some(frame)
}

fn client(step: &Step) -> String {
    let port = 40001 + u16::from(step.client);
    WAYS[step.family][0].replace("40001", &port.to_string())
}

fn key(step: &Step) -> (usize, u8, bool) {
    (step.family, step.client, step.flags.is_some())
}

fn without_times(flows: &[Vec<(Tuple, Flow)>; 2]) -> Vec<(Tuple, Flow)> {
    let timeless = |(key, flow): &(Tuple, Flow)| (*key, Flow { last_seen_ns: 0, ..*flow });
    flows.iter().flatten().map(timeless).collect()
}

/// Whether the frame was sent on at XDP.
fn check(stage: &mut Stage, step: &Step, hidden: &mut Hidden) -> Result<bool, TestCaseError> {
    let Some(frame) = frame(stage, step, hidden) else { return Ok(false) };
    let before = stage.flows();
    let (action, out) = stage.run(&frame);
    let after = stage.flows();
    if action == XDP_PASS {
        prop_assert_eq!(&out, &frame);
        prop_assert_eq!(without_times(&before), without_times(&after));
    }
    stage.set_flows(&before);
    let expected = stage.by_packets(&frame);
    if action == XDP_TX {
        prop_assert_eq!(Some(&out), expected.as_ref());
        let by_packets = stage.flows();
        prop_assert_eq!(without_times(&after), without_times(&by_packets));
    } else if step.from_client
        && step.changes.is_empty()
        && let Some(left) = expected
    {
        let packet = udp(&client(step), WAYS[step.family][1]);
        hidden.insert(key(step), carried(&left, &packet));
    }
    Ok(action == XDP_TX)
}

#[test]
fn random_frames_become_what_the_other_programs_make_of_them() {
    let mut runner =
        TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
    let sent_on = std::cell::Cell::new(0);
    runner
        .run(&steps(), |steps| {
            let mut stage = Stage::new();
            let mut hidden = Hidden::new();
            for step in &steps {
                sent_on.set(sent_on.get() + u32::from(check(&mut stage, step, &mut hidden)?));
            }
            Ok(())
        })
        .unwrap();
    assert!(sent_on.get() > 100, "hardly anything was sent on: {}", sent_on.get());
}
