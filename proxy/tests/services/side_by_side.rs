//! Mode nftables and another one side by side: the same random histories of Services, and after each the same packets,
//! which must meet the same fate. The model is not asked whether it is the right one: `sequences` does that.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::Duration;

use keelson_proxy::model::Protocol;
use keelson_proxy::trace::Fate;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::sequences::{Probe, Step, perform, probe, step};
use crate::stage::*;

rows![packets_meet_the_same_fate_as_under_nftables,];

/// So often two nodes are asked before a difference between the endpoints that answered is more than chance: of five
/// one is missed so long once in billions of times.
const ASKED_AT_MOST: u32 = 100;
/// How long silence lasts where the model foretells it, on both nodes alike.
const SHORT: Duration = Duration::from_millis(100);

/// Whom an endpoint saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Client,
    Node,
    /// A pod that reached itself, by its own address or by the node's: by which depends on the layer that translated.
    Itself,
    Strange,
}

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Met {
    Endpoint(String, Source),
    Refused,
    Silence,
    Other(ErrorKind),
}

struct Side {
    node: RefCell<Node>,
    pods: Vec<Pod>,
}

impl Side {
    fn new(mode: Mode) -> Self {
        let node = Node::new(mode);
        // Clients that keep their address must get answers.
        node.outside.route("10.66.0.0/24", NODE4);
        node.outside.route("fd66::/64", NODE6);
        let pods = (2..7)
            .map(|number| node.pod(&format!("p{number}"), number))
            .map(|pod| pod.serving("TCP", 8080).serving("UDP", 8080))
            .collect();
        Side { node: RefCell::new(node), pods }
    }

    fn perform(&self, steps: &[Step]) {
        let node = &mut *self.node.borrow_mut();
        steps.iter().for_each(|step| perform(node, step));
        node.apply();
    }

    fn foretold(&self, probe: &Probe) -> Fate {
        let node = self.node.borrow();
        let (_, source, interface) = probe.client(&node, &self.pods);
        let protocol = if probe.udp { Protocol::Udp } else { Protocol::Tcp };
        node.trace(source, interface.as_deref(), protocol, &probe.address()).fate
    }

    fn meets(&self, probe: &Probe, patience: Duration) -> Met {
        let node = self.node.borrow();
        let (from, own, _) = probe.client(&node, &self.pods);
        let word = if probe.udp { "UDP" } else { "TCP" };
        match from.ask_for(word, &probe.address(), patience) {
            Ok(answer) => {
                let source = self.source(&answer, own);
                Met::Endpoint(answer.server, source)
            }
            Err(ErrorKind::ConnectionRefused) => Met::Refused,
            Err(ErrorKind::TimedOut | ErrorKind::WouldBlock) => Met::Silence,
            Err(error) => Met::Other(error),
        }
    }

    fn source(&self, answer: &Answer, own: IpAddr) -> Source {
        let of_node = [NODE4, NODE6, "10.66.0.1", "fd66::1"].map(|ip| ip.parse().unwrap());
        let endpoint = self.pods.iter().find(|pod| pod.name == answer.server);
        let is_itself = endpoint.is_some_and(|pod| [pod.v4, pod.v6].contains(&own));
        if is_itself && (answer.client == own || of_node.contains(&answer.client)) {
            Source::Itself
        } else if of_node.contains(&answer.client) {
            // The node's own address for the way there, or that of masquerading.
            Source::Node
        } else if answer.client == own {
            Source::Client
        } else {
            Source::Strange
        }
    }
}

fn compare(sides: &[Side; 2], probe: &Probe, sticky: bool) -> Result<(), TestCaseError> {
    let fate = sides[0].foretold(probe);
    let patience = match fate {
        // Nobody does anything about it, and routes of these nodes lead it in circles.
        Fate::Untouched => return Ok(()),
        Fate::Dropped => SHORT,
        Fate::Rejected | Fate::Forwarded { .. } => silence(),
    };
    let mut met = [BTreeSet::new(), BTreeSet::new()];
    for _ in 0..ASKED_AT_MOST {
        for (side, met) in sides.iter().zip(&mut met) {
            met.insert(side.meets(probe, patience));
        }
        if met[0] == met[1] || sticky && stuck_alike(&met) {
            return Ok(());
        }
        // Endpoints come by and by; another fate does not change.
        let is_endpoint = |met: &Met| matches!(met, Met::Endpoint(..));
        if sticky || !met.iter().all(|met| met.iter().all(is_endpoint)) {
            break;
        }
    }
    Err(TestCaseError::fail(format!("{probe:?} to {}: {met:?}", probe.address())))
}

/// Whether both clients stick to endpoints, whichever, that see them alike.
fn stuck_alike(met: &[BTreeSet<Met>; 2]) -> bool {
    let source = |met: &BTreeSet<Met>| match (met.len(), met.first()) {
        (1, Some(Met::Endpoint(_, source))) => Some(*source),
        _ => None,
    };
    match met.each_ref().map(source) {
        [Some(a), Some(b)] => a == b || a == Source::Itself || b == Source::Itself,
        _ => false,
    }
}

fn packets_meet_the_same_fate_as_under_nftables(mode: Mode) {
    if mode == Mode::Nftables {
        skip("it would be compared with itself");
    }
    let cases = crate::harness::histories().div_ceil(2);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let history =
        (proptest::collection::vec(step(), 1..30), proptest::collection::vec(probe(), 6..12));
    let sides = [Side::new(Mode::Nftables), Side::new(mode)];
    let sticking = RefCell::new([false; 5]);
    TestRunner::new(config)
        .run(&history, |(steps, probes)| {
            sides.iter().for_each(|side| side.perform(&steps));
            let sticking = &mut *sticking.borrow_mut();
            for step in &steps {
                if let Step::Service { number, sticky, .. } = step {
                    sticking[usize::from(*number)] = *sticky;
                }
            }
            for probe in &probes {
                // An address that several Services ask for is the oldest one's.
                let sticky = match probe.is_for_one_service() {
                    true => sticking[usize::from(probe.service)],
                    false => sticking.contains(&true),
                };
                compare(&sides, probe, sticky)?;
            }
            Ok(())
        })
        .unwrap();
}
