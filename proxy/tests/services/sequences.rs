//! Random histories against the real kernel: whatever happened, a new start finds nothing to do, and
//! packets meet the fate that the model foretells.

use crate::stage::*;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::Duration;

use keelson_proxy::diff::{Plans, advance};
use keelson_proxy::model::Protocol;
use keelson_proxy::trace::Fate;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::json;

rows![any_history_leaves_the_kernel_as_a_new_start_would_want_it,];

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Service {
        number: u8,
        udp: bool,
        sticky: bool,
        policy: u8,
        external: bool,
        ranges: u8,
    },
    Delete(u8),
    Endpoints {
        number: u8,
        udp: bool,
        /// Pods and how they are.
        pods: Vec<(u8, u8)>,
    },
    Restart,
    /// Several steps are put in force together.
    Commit,
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    let service = (0u8..5, any::<bool>(), any::<bool>(), 0u8..4, any::<bool>(), 0u8..8).prop_map(
        |(number, udp, sticky, policy, external, ranges)| Step::Service {
            ranges,
            number,
            udp,
            sticky,
            policy,
            external,
        },
    );
    let endpoints =
        (0u8..5, any::<bool>(), proptest::collection::btree_map(2u8..7, 0u8..6, 0..6)).prop_map(
            |(number, udp, pods)| Step::Endpoints { number, udp, pods: pods.into_iter().collect() },
        );
    prop_oneof![
        4 => service,
        1 => (0u8..5).prop_map(Step::Delete),
        4 => endpoints,
        1 => Just(Step::Restart),
        3 => Just(Step::Commit),
    ]
}

pub(crate) fn perform(node: &mut Node, step: &Step) {
    let name = |number: &u8| format!("s{number}");
    let protocol = |udp: &bool| if *udp { "UDP" } else { "TCP" };
    match step {
        Step::Service { number, udp, sticky, policy, external, ranges } => {
            // Some overlap, some touch.
            let all = ["192.0.2.0/24", "192.0.0.0/16", "192.0.3.0/24"];
            let ranges: Vec<_> =
                (0..3).filter(|bit| ranges >> bit & 1 == 1).map(|bit| all[bit]).collect();
            let policy_of = |bit: u8| if policy & bit != 0 { "Local" } else { "Cluster" };
            let mut spec = with(
                node_port(cluster_ip(number + 1, protocol(udp), 80), 30000 + u16::from(*number)),
                json!({
                    "type": "LoadBalancer",
                    "sessionAffinity": if *sticky { "ClientIP" } else { "None" },
                    "internalTrafficPolicy": policy_of(1),
                    "externalTrafficPolicy": policy_of(2),
                    "loadBalancerSourceRanges": ranges,
                }),
            );
            if *external {
                // All ask for the same one.
                spec["externalIPs"] = json!(["198.51.100.1"]);
            }
            let object = json!({
                "metadata": {"namespace": "default", "name": name(number)},
                "spec": spec,
                "status": {"loadBalancer": {"ingress": [{"ip": format!("198.51.100.{}", 100 + number)}]}},
            });
            node.model.apply_service(&serde_json::from_value(object).unwrap());
            node.model.take_problems();
        }
        Step::Delete(number) => node.delete_service(&name(number)),
        Step::Endpoints { number, udp, pods } => {
            let of: Vec<_> = pods
                .iter()
                .map(|(pod, how)| (*pod, if pod % 2 == 0 { "here" } else { "other" }, state(*how)))
                .collect();
            node.endpoints(&name(number), protocol(udp), 8080, &of);
        }
        Step::Restart => {
            node.restart();
        }
        Step::Commit => {
            node.apply();
        }
    }
}

/// Most are ready.
fn state(how: u8) -> serde_json::Value {
    match how {
        0 => json!({"ready": false, "serving": true, "terminating": true}),
        1 => json!({"ready": false, "serving": false}),
        _ => json!({"ready": true}),
    }
}

/// A packet to try: who sends it, and where to.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    client: u8,
    pub(crate) service: u8,
    target: u8,
    pub(crate) udp: bool,
}

pub(crate) fn probe() -> impl Strategy<Value = Probe> {
    (0u8..6, 0u8..5, 0u8..9, any::<bool>()).prop_map(|(client, service, target, udp)| Probe {
        client,
        service,
        target,
        udp,
    })
}

/// The target that all Services ask for.
const COMMON: u8 = 6;

impl Probe {
    pub(crate) fn address(&self) -> String {
        let number = self.service;
        match self.target {
            0 | 1 => format!("10.96.0.{}:80", number + 1),
            2 => format!("[fd96::{}]:80", number + 1),
            3 => format!("10.96.0.{}:81", number + 1),
            4 => format!("{NODE4}:{}", 30000 + u16::from(number)),
            5 => format!("[{NODE6}]:{}", 30000 + u16::from(number)),
            COMMON => "198.51.100.1:80".to_owned(),
            _ => format!("198.51.100.{}:80", 100 + number),
        }
    }

    /// Whether no other Service asks for the address.
    pub(crate) fn is_for_one_service(&self) -> bool {
        self.target != COMMON
    }

    /// Where it comes from, with which address, and by which interface of the node if it is not the node's.
    pub(crate) fn client<'s>(
        &self,
        node: &'s Node,
        pods: &'s [Pod],
    ) -> (&'s Namespace, IpAddr, Option<String>) {
        let v6 = self.address().starts_with('[');
        let own = |v4: &str, six: &str| (if v6 { six } else { v4 }).parse::<IpAddr>().unwrap();
        match self.client {
            0 | 1 => (&node.namespace, own(NODE4, NODE6), None),
            2 | 3 => (&node.outside, own(OUTSIDE4, OUTSIDE6), Some("eth0".to_owned())),
            number => {
                // Those that are said to be on this node: as endpoints they may meet themselves.
                let pod = &pods[2 * (usize::from(number) - 4)];
                let source = if v6 { pod.v6 } else { pod.v4 };
                (&pod.namespace, source, Some("pod".to_owned()))
            }
        }
    }

    /// The model's answer and what the packet meets; nothing to compare where Services do not care.
    fn compare(&self, node: &Node, pods: &[Pod]) -> (Fate, String, bool) {
        let to = self.address();
        let (from, source, interface) = self.client(node, pods);
        let (protocol, word) =
            if self.udp { (Protocol::Udp, "UDP") } else { (Protocol::Tcp, "TCP") };
        let fate = node.trace(source, interface.as_deref(), protocol, &to).fate;
        let met = match fate {
            Fate::Untouched => return (fate, "not tried".to_owned(), true),
            // An answer would come at once.
            Fate::Dropped => from.ask_for(word, &to, SHORT),
            Fate::Rejected | Fate::Forwarded { .. } => from.ask_for(word, &to, silence()),
        };
        let agrees = match (&fate, &met) {
            (Fate::Forwarded { to, masqueraded, .. }, Ok(answer)) => to.iter().any(|endpoint| {
                let pod = endpoint.address;
                let name = pod.to_string().replace("10.66.0.", "p").replace("fd66::", "p");
                let itself = pod == source;
                let hidden = (answer.client == source) != (*masqueraded || itself);
                // What a socket speaks from when it connects to an endpoint, no packet has to change.
                let by_socket = node.mode == Mode::Ebpf && (itself || interface.is_none());
                name == answer.server && (hidden || by_socket)
            }),
            (Fate::Rejected, Err(ErrorKind::ConnectionRefused)) => true,
            (Fate::Dropped, Err(ErrorKind::TimedOut | ErrorKind::WouldBlock)) => true,
            _ => false,
        };
        (fate, format!("{source} -> {word} {to}: {met:?}"), agrees)
    }
}

const SHORT: Duration = Duration::from_millis(100);

/// Differential: incremental against from scratch, and the model against the kernel. Chains come and go with their map
/// elements on the way, also on a kernel older than 6.2 (the VM lane): case 54.
fn any_history_leaves_the_kernel_as_a_new_start_would_want_it(mode: Mode) {
    let cases = crate::harness::histories();
    let mut runner =
        TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let history =
        (proptest::collection::vec(step(), 1..30), proptest::collection::vec(probe(), 6..12));
    let node = Node::new(mode);
    // Clients that keep their address must get answers.
    node.outside.route("10.66.0.0/24", NODE4);
    node.outside.route("fd66::/64", NODE6);
    let pods: Vec<Pod> = (2..7)
        .map(|number| node.pod(&format!("p{number}"), number))
        .map(|pod| pod.serving("TCP", 8080).serving("UDP", 8080))
        .collect();
    let node = std::cell::RefCell::new(node);
    runner
        .run(&history, |(steps, probes)| {
            let node = &mut *node.borrow_mut();
            for step in &steps {
                perform(node, step);
            }
            node.apply();
            // The incremental state is what a new start finds right.
            prop_assert_eq!(node.restart(), 0);
            // And it is what the model plans from scratch.
            let mut fresh = Plans::new();
            let all: Vec<_> = node.model.services().cloned().collect();
            advance(&mut fresh, all, |key| node.model.plan(key));
            prop_assert_eq!(&fresh, &node.plans);
            // And packets meet what the model says.
            for probe in &probes {
                let (fate, met, agrees) = probe.compare(node, &pods);
                prop_assert!(agrees, "the model says {:?}, but {}", fate, met);
            }
            Ok(())
        })
        .unwrap();
}
