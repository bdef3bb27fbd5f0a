//! Plans to virtual servers, commands, and that any history of commands ends as planned.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use expect_test::{Expect, expect};
use keelson_netlink::ipvs::{Command, Key, Real};
use proptest::prelude::*;

use super::servers::{Ground, Servers, keys_of};
use super::steps::{Known, KnownReal, Steps, is_ours, known_after};
use crate::backend::BackendConfig;
use crate::model::{
    At, Endpoint, Family, Frontend, FrontendKey, Masquerade, PortPlan, Protocol, Route, Scope,
    ServiceKey, ServicePlan, Target,
};

const CLUSTER: Target = Target::Forward(Scope::Cluster);
const LOCAL: Target = Target::Forward(Scope::Local);

fn endpoints(numbers: &[u8]) -> Box<[Endpoint]> {
    numbers.iter().map(|n| Endpoint::new(IpAddr::from([10, 66, 0, *n]), 8080)).collect()
}

fn frontend(at: At, port: u16, route: Route) -> Frontend {
    Frontend { key: FrontendKey { at, protocol: Protocol::Tcp, port }, route, sources: None }
}

fn same(target: Target) -> Route {
    Route::Same { target, masquerade: Masquerade::Always }
}

fn address(text: &str) -> At {
    At::Address(text.parse().unwrap())
}

/// A port with a ClusterIP that leads to these endpoints.
fn web(numbers: &[u8]) -> PortPlan {
    let target = if numbers.is_empty() { Target::Reject } else { CLUSTER };
    PortPlan {
        name: "".into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
        affinity_secs: None,
        cluster: endpoints(numbers),
        local: Box::default(),
        draining: Box::default(),
        here: Box::default(),
        strangers: Box::default(),
        frontends: [frontend(address("10.96.0.1"), 80, same(target))].into(),
    }
}

fn ground() -> Ground {
    let own = ["203.0.113.2", "127.0.0.1", "2001:db8::2", "fe80::1", "::1"];
    Ground::new(&BackendConfig::default(), own.map(|own| own.parse().unwrap()))
}

fn plan(port: PortPlan) -> Arc<ServicePlan> {
    Arc::new(ServicePlan { ports: [port].into(), guarded: Box::default() })
}

fn service(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

/// The commands that lead from one plan to another.
fn steps(known: &BTreeMap<Key, Known>, after: Option<PortPlan>) -> Steps {
    let mut servers = Servers::default();
    if let Some(after) = after {
        servers.insert(&service("web"), &plan(after), &ground());
    }
    let keys: BTreeSet<Key> = servers.keys().chain(known.keys().copied()).collect();
    let mut steps = Steps::default();
    for key in keys {
        steps.lead(key, known.get(&key), servers.wanted(key), "rr");
    }
    steps
}

fn known(before: PortPlan) -> BTreeMap<Key, Known> {
    let mut servers = Servers::default();
    servers.insert(&service("web"), &plan(before), &ground());
    servers.keys().map(|k| (k, known_after(servers.wanted(k), None, "rr").unwrap())).collect()
}

#[track_caller]
fn check(before: Option<PortPlan>, after: Option<PortPlan>, expected: &Expect) {
    let steps = steps(&before.map(known).unwrap_or_default(), after);
    let mut text = String::new();
    for (when, commands) in [("first", &steps.first), ("last", &steps.last)] {
        for command in commands {
            text += &format!("{when}: {command}\n");
        }
    }
    for (key, reals) in &steps.draining {
        for at in reals {
            text += &format!("draining: {at} of {key}\n");
        }
    }
    expected.assert_eq(&text);
}

#[test]
fn a_virtual_server_for_each_address_and_own_address_of_a_node_port() {
    let mut port = web(&[2]);
    let more = [
        frontend(address("198.51.100.1"), 80, same(CLUSTER)),
        frontend(At::NodePort(Family::V4), 30080, same(CLUSTER)),
        // Nobody is there, and nobody shall be told: the table does that.
        frontend(address("198.51.100.2"), 80, same(Target::Drop)),
    ];
    port.frontends = port.frontends.iter().cloned().chain(more).collect();
    check(
        None,
        Some(port),
        &expect![[r#"
            first: add virtual server 10.96.0.1:80/tcp with scheduler rr
            first: add real server 10.66.0.2:8080 to 10.96.0.1:80/tcp
            first: add virtual server 198.51.100.1:80/tcp with scheduler rr
            first: add real server 10.66.0.2:8080 to 198.51.100.1:80/tcp
            first: add virtual server 203.0.113.2:30080/tcp with scheduler rr
            first: add real server 10.66.0.2:8080 to 203.0.113.2:30080/tcp
        "#]],
    );
}

#[test]
fn under_external_policy_local_ipvs_has_the_endpoints_here() {
    let mut port = web(&[2, 3]);
    port.local = endpoints(&[3]);
    let route = Route::BySource { inside: CLUSTER, outside: LOCAL };
    port.frontends = [frontend(At::NodePort(Family::V4), 30080, route)].into();
    check(
        None,
        Some(port),
        &expect![[r#"
            first: add virtual server 203.0.113.2:30080/tcp with scheduler rr
            first: add real server 10.66.0.3:8080 to 203.0.113.2:30080/tcp
        "#]],
    );
}

#[test]
fn for_clients_that_stick_ipvs_chooses_and_the_table_remembers() {
    let sticky = PortPlan { affinity_secs: Some(10_800), ..web(&[2]) };
    // Not persistent: whether they stick makes no difference here.
    check(Some(web(&[2])), Some(sticky), &expect![""]);
}

#[test]
fn new_endpoints_come_first_and_old_ones_drain_last() {
    check(
        Some(web(&[2, 3])),
        Some(web(&[3, 4])),
        &expect![[r#"
            first: add real server 10.66.0.4:8080 to 10.96.0.1:80/tcp
            last: give real server 10.66.0.2:8080 of 10.96.0.1:80/tcp weight 0
            draining: 10.66.0.2:8080 of 10.96.0.1:80/tcp
        "#]],
    );
    check(Some(web(&[2])), Some(web(&[2])), &expect![""]);
}

#[test]
fn a_service_that_goes_drains_with_its_virtual_server() {
    let drained = expect![[r#"
        last: give real server 10.66.0.2:8080 of 10.96.0.1:80/tcp weight 0
        draining: 10.66.0.2:8080 of 10.96.0.1:80/tcp
    "#]];
    check(Some(web(&[2])), None, &drained);
    check(Some(web(&[2])), Some(web(&[])), &drained);
}

#[test]
fn udp_does_not_wait_except_for_those_that_still_serve() {
    let udp = |numbers: &[u8], draining: &[u8]| {
        let mut port = PortPlan { protocol: Protocol::Udp, ..web(numbers) };
        port.draining = endpoints(draining);
        port.frontends[0].key.protocol = Protocol::Udp;
        port
    };
    check(
        Some(udp(&[2, 3, 4], &[])),
        Some(udp(&[4], &[3])),
        &expect![[r#"
            last: remove real server 10.66.0.2:8080 of 10.96.0.1:80/udp
            last: give real server 10.66.0.3:8080 of 10.96.0.1:80/udp weight 0
            draining: 10.66.0.3:8080 of 10.96.0.1:80/udp
        "#]],
    );
    check(
        Some(udp(&[2], &[])),
        None,
        &expect![[r#"
            last: remove virtual server 10.96.0.1:80/udp
        "#]],
    );
}

#[test]
fn what_others_left_is_taken_over_and_repaired() {
    let mut known = known(web(&[2, 3]));
    let found = known.values_mut().next().unwrap();
    (found.ours, found.scheduler) = (false, "wlc".to_owned());
    for (at, real) in [("10.66.0.2:8080", (0, true)), ("10.66.0.3:8080", (1, false))] {
        let (weight, translated) = real;
        found.reals.insert(at.parse().unwrap(), KnownReal { weight, translated });
    }
    let steps = steps(&known, Some(web(&[2, 3])));
    let text: Vec<String> = steps.first.iter().map(Command::to_string).collect();
    assert_eq!(
        text,
        [
            "change virtual server 10.96.0.1:80/tcp to scheduler rr",
            "give real server 10.66.0.2:8080 of 10.96.0.1:80/tcp weight 1",
            "give real server 10.66.0.3:8080 of 10.96.0.1:80/tcp weight 1",
        ]
    );
    assert_eq!(steps.last, []);
}

#[test]
fn an_address_of_a_service_counts_more_than_a_node_port() {
    let mut external = web(&[2]);
    external.frontends = [frontend(address("203.0.113.2"), 30080, same(CLUSTER))].into();
    let mut port = web(&[3]);
    port.frontends = [frontend(At::NodePort(Family::V4), 30080, same(CLUSTER))].into();
    let (external, port) = (plan(external), plan(port));
    let key = keys_of(&port, &ground()).next().unwrap();
    let mut servers = Servers::default();
    servers.insert(&service("a-port"), &port, &ground());
    servers.insert(&service("external"), &external, &ground());
    assert_eq!(servers.owner(key), Some(&service("external")));
    servers.remove(&service("external"), &external, &ground());
    assert_eq!(servers.owner(key), Some(&service("a-port")));
    servers.remove(&service("a-port"), &port, &ground());
    assert!(servers.is_empty());
}

#[test]
fn looking_goes_round() {
    let mut servers = Servers::default();
    let mut port = web(&[2]);
    port.frontends =
        (1..=5).map(|n| frontend(address(&format!("10.96.0.{n}")), 80, same(CLUSTER))).collect();
    servers.insert(&service("web"), &plan(port), &ground());
    let last = |keys: &[Key]| keys.last().map(|key| key.address.to_string());
    let first = servers.after(None, 2);
    assert_eq!(last(&first).as_deref(), Some("10.96.0.2"));
    let second = servers.after(first.last().copied(), 4);
    assert_eq!(last(&second).as_deref(), Some("10.96.0.1"));
    assert_eq!(servers.after(second.last().copied(), 9).len(), 5);
}

/// What the kernel does.
fn carry_out(kernel: &mut BTreeMap<Key, Known>, command: &Command) {
    let real = |real: &Real| (real.at, KnownReal { weight: real.weight, translated: true });
    match command {
        Command::AddVirtual(new) => {
            let known = Known {
                scheduler: new.scheduler.clone(),
                ours: is_ours(new),
                reals: BTreeMap::new(),
            };
            assert_eq!(kernel.insert(new.key, known), None);
        }
        Command::SetVirtual(new) => {
            let known = kernel.get_mut(&new.key).unwrap();
            (known.scheduler, known.ours) = (new.scheduler.clone(), is_ours(new));
        }
        Command::RemoveVirtual(key) => assert!(kernel.remove(key).is_some()),
        Command::AddReal(key, new) => {
            let (at, new) = real(new);
            assert_eq!(kernel.get_mut(key).unwrap().reals.insert(at, new), None);
        }
        Command::SetReal(key, new) => {
            let (at, new) = real(new);
            assert!(kernel.get_mut(key).unwrap().reals.insert(at, new).is_some());
        }
        Command::RemoveReal(key, at) => {
            assert!(kernel.get_mut(key).unwrap().reals.remove(at).is_some());
        }
        Command::SetTimeouts(_) | Command::Flush => {}
    }
}

proptest! {
    /// Each command fits what the kernel has then, and afterwards exactly the wanted ones get new connections.
    #[test]
    fn any_history_ends_as_planned(
        history in proptest::collection::vec(
            (proptest::collection::btree_set(2u8..8, 0..5), any::<bool>()), 1..12,
        ),
    ) {
        let mut kernel: BTreeMap<Key, Known> = BTreeMap::new();
        for (numbers, udp) in history {
            let numbers: Vec<u8> = numbers.into_iter().collect();
            let mut port = web(&numbers);
            if udp {
                port.protocol = Protocol::Udp;
                port.frontends[0].key.protocol = Protocol::Udp;
            }
            let steps = steps(&kernel, Some(port.clone()));
            for command in steps.first.iter().chain(&steps.last) {
                carry_out(&mut kernel, command);
            }
            let protocol = port.protocol as u8;
            let serving: BTreeSet<SocketAddr> = kernel
                .iter()
                .filter(|(key, _)| key.protocol == protocol)
                .flat_map(|(_, known)| &known.reals)
                .filter(|(_, real)| real.weight > 0)
                .map(|(at, _)| *at)
                .collect();
            let wanted: BTreeSet<SocketAddr> =
                port.cluster.iter().map(|e| SocketAddr::new(e.address, e.port)).collect();
            prop_assert_eq!(serving, wanted);
            // Doing it again changes nothing.
            prop_assert_eq!(steps_again(&kernel, port), 0);
        }
    }
}

fn steps_again(kernel: &BTreeMap<Key, Known>, port: PortPlan) -> usize {
    steps(kernel, Some(port)).operations()
}
