use super::decide::{Decision, decide};
use super::ledger::Ledger;
use super::*;
use expect_test::{Expect, expect};
use serde_json::{Value, json};

fn node(name: &str, change: &Value) -> Arc<Node> {
    let mut node = json!({"metadata": {"name": name, "labels": {"disk": "ssd"}}, "spec": {},
        "status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "10", "ephemeral-storage": "10Gi"},
            "conditions": [{"type": "Ready", "status": "True"}]}});
    json_patch::merge(&mut node, change);
    Arc::new(serde_json::from_value(node).unwrap())
}

fn pod(spec: &Value) -> Pod {
    let mut all = json!({"containers": [{"name": "c"}]});
    json_patch::merge(&mut all, spec);
    serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n"}, "spec": all}))
        .unwrap()
}

fn wants(cpu: &str) -> Value {
    json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]})
}

fn ledger(nodes: &[Arc<Node>]) -> Ledger {
    let mut ledger = Ledger::default();
    for node in nodes {
        ledger.observe_node(node.metadata.name.as_ref().unwrap(), Some(node.clone()));
    }
    ledger
}

#[track_caller]
fn check(spec: &Value, nodes: &[Arc<Node>], want: Expect) {
    let text = match decide(&pod(spec), &ledger(nodes)) {
        Decision::Bind(node) => format!("-> {node}"),
        Decision::Unschedulable(reason) => reason,
    };
    want.assert_eq(&text);
}

#[test]
fn each_obstacle_is_named_as_kubernetes_does() {
    let plain = || node("a", &json!({}));
    check(&json!({}), &[], expect!["no nodes available to schedule pods"]);
    check(&json!({}), &[plain()], expect!["-> a"]);
    check(&wants("3"), &[plain()], expect!["0/1 nodes are available: 1 Insufficient cpu."]);
    let much = json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "3", "memory": "5Gi", "nvidia.com/gpu": "1"}}}]});
    check(
        &much,
        &[plain()],
        expect![
            "0/1 nodes are available: 1 Insufficient cpu, 1 Insufficient memory, 1 Insufficient nvidia.com/gpu."
        ],
    );
    check(
        &json!({}),
        &[node("a", &json!({"spec": {"unschedulable": true}}))],
        expect!["0/1 nodes are available: 1 node(s) were unschedulable."],
    );
    let tainted = node(
        "a",
        &json!({"spec": {"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]}}),
    );
    check(
        &json!({}),
        &[tainted],
        expect!["0/1 nodes are available: 1 node(s) had untolerated taint {gpu: yes}."],
    );
    let unready =
        node("a", &json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}));
    check(
        &json!({}),
        &[unready],
        expect![
            "0/1 nodes are available: 1 node(s) had untolerated taint {node.kubernetes.io/not-ready: }."
        ],
    );
    check(
        &json!({"nodeSelector": {"disk": "hdd"}}),
        &[plain()],
        expect!["0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."],
    );
    let full = node("a", &json!({"status": {"allocatable": {"pods": "0"}}}));
    check(&json!({}), &[full], expect!["0/1 nodes are available: 1 Too many pods."]);
    let cordoned = node("b", &json!({"spec": {"unschedulable": true}}));
    check(
        &wants("3"),
        &[plain(), cordoned],
        expect!["0/2 nodes are available: 1 Insufficient cpu, 1 node(s) were unschedulable."],
    );
}

#[test]
fn a_cordon_and_an_unready_node_can_be_tolerated() {
    let cordoned =
        node("a", &json!({"spec": {"unschedulable": true}, "status": {"conditions": []}}));
    check(&json!({"tolerations": [{"operator": "Exists"}]}), &[cordoned], expect!["-> a"]);
}

#[test]
fn preferences_and_soft_taints_weigh_more_than_load() {
    let soft =
        node("a", &json!({"spec": {"taints": [{"key": "x", "effect": "PreferNoSchedule"}]}}));
    check(&json!({}), &[soft, node("b", &json!({}))], expect!["-> b"]);
    let preferred = json!({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 50, "preference": {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["z"]}]}}]}}});
    let nodes = [
        node("a", &json!({})),
        node(
            "b",
            &json!({"metadata": {"labels": {"zone": "z"}}, "status": {"allocatable": {"cpu": "1"}}}),
        ),
    ];
    check(&preferred, &nodes, expect!["-> b"]);
}

#[test]
fn pods_spread_to_the_least_allocated_node() {
    let mut ledger = ledger(&[node("a", &json!({})), node("b", &json!({}))]);
    let mut chosen = String::new();
    for number in 0..4 {
        let Decision::Bind(node) = decide(&pod(&wants("500m")), &ledger) else { panic!("fits") };
        ledger.assume(&format!("n/p{number}"), &pod(&wants("500m")), &node);
        chosen.push_str(&node);
    }
    assert_eq!(chosen, "abab");
}

#[test]
fn host_ports_conflict_by_address_and_protocol() {
    let holds = |ip: &str, protocol: &str| json!({"containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": 80, "hostIP": ip, "protocol": protocol}]}]});
    let table = [
        (holds("", "TCP"), holds("", "TCP"), true),
        (holds("127.0.0.1", "TCP"), holds("0.0.0.0", "TCP"), true),
        (holds("127.0.0.1", "TCP"), holds("127.0.0.2", "TCP"), false),
        (holds("", "TCP"), holds("", "UDP"), false),
    ];
    for (held, wanted, conflict) in table {
        let mut ledger = ledger(&[node("a", &json!({}))]);
        ledger.assume("n/held", &pod(&held), "a");
        let decision = decide(&pod(&wanted), &ledger);
        assert_eq!(matches!(decision, Decision::Unschedulable(_)), conflict, "{held} {wanted}");
    }
}

#[test]
fn room_is_promised_once_and_given_back_once() {
    let mut ledger = ledger(&[node("a", &json!({}))]);
    let big = pod(&wants("2"));
    ledger.assume("n/big", &big, "a");
    assert!(matches!(decide(&pod(&wants("1m")), &ledger), Decision::Unschedulable(_)));
    // The pod's own state from before the binding arrives late: that must not free the room.
    assert!(!ledger.observe_pod("n/big", Some(&big)));
    assert!(matches!(decide(&pod(&wants("1m")), &ledger), Decision::Unschedulable(_)));
    let mut bound = big.clone();
    bound.spec.as_mut().unwrap().node_name = Some("a".into());
    assert!(!ledger.observe_pod("n/big", Some(&bound)));
    bound.status.get_or_insert_default().phase = Some("Succeeded".into());
    assert!(ledger.observe_pod("n/big", Some(&bound)));
    assert!(!ledger.observe_pod("n/big", None));
    assert_eq!(decide(&big, &ledger), Decision::Bind("a".into()));
}

#[test]
fn heartbeats_are_not_worth_a_decision() {
    let quiet = node("a", &json!({}));
    let beat = node(
        "a",
        &json!({"status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-01T00:00:00Z"}]}}),
    );
    assert!(scheduling_facts(&quiet) == scheduling_facts(&beat));
    let cordoned = node("a", &json!({"spec": {"unschedulable": true}}));
    assert!(scheduling_facts(&quiet) != scheduling_facts(&cordoned));
    let unready = node("a", &json!({"status": {"conditions": []}}));
    assert!(scheduling_facts(&quiet) != scheduling_facts(&unready));
}
