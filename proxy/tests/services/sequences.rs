//! Random histories against the real kernel: whatever happened, a new start finds nothing to do.

use crate::stage::*;
use keelson_proxy::diff::{Plans, advance};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::json;

rows![any_history_leaves_the_kernel_as_a_new_start_would_want_it,];

#[derive(Clone, Debug)]
enum Step {
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
        pods: Vec<u8>,
    },
    Restart,
    /// Several steps are put in force together.
    Commit,
}

fn step() -> impl Strategy<Value = Step> {
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
        (0u8..5, any::<bool>(), proptest::collection::btree_set(2u8..9, 0..6)).prop_map(
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

fn perform(node: &mut Node, step: &Step) {
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
                .map(|pod| (*pod, if pod % 2 == 0 { "here" } else { "other" }, json!({})))
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

fn any_history_leaves_the_kernel_as_a_new_start_would_want_it(mode: Mode) {
    let mut runner =
        TestRunner::new(Config { cases: 40, failure_persistence: None, ..Config::default() });
    let steps = proptest::collection::vec(step(), 1..30);
    let node = std::cell::RefCell::new(Node::new(mode));
    runner
        .run(&steps, |steps| {
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
            Ok(())
        })
        .unwrap();
}
