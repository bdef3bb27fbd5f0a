//! Golden rules, and properties of any history of changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use expect_test::{Expect, expect};
use proptest::prelude::*;

use super::counts::Counts;
use super::names::{Chain, Table};
use super::restore::{Hooks, script};
use super::rules::rules_of;
use super::ruleset::{Dirty, Ruleset, Update};
use super::saved::target;
use crate::backend::{BackendConfig, PodSources};
use crate::model::{
    At, Endpoint, Family, Frontend, FrontendKey, Masquerade, PortPlan, Protocol, Route, Scope,
    ServiceKey, ServicePlan, Target,
};

fn pods() -> PodSources {
    PodSources::Ranges(vec!["10.66.0.0/16".parse().unwrap(), "fd66::/48".parse().unwrap()])
}

fn port(family: Family, endpoints: u8) -> PortPlan {
    let address = |number: u8| match family {
        Family::V4 => format!("10.66.0.{number}").parse().unwrap(),
        Family::V6 => format!("fd66::{number:x}").parse().unwrap(),
    };
    PortPlan {
        name: "http".into(),
        protocol: Protocol::Tcp,
        family,
        affinity_secs: None,
        cluster: (1..=endpoints).map(|n| Endpoint::new(address(n), 8080)).collect(),
        local: Box::default(),
        draining: Box::default(),
        here: (1..=endpoints.min(1)).map(address).collect(),
        strangers: Box::default(),
        frontends: Box::default(),
    }
}

fn frontend(at: At, port: u16, route: Route) -> Frontend {
    let key = FrontendKey { at, protocol: Protocol::Tcp, port };
    Frontend { key, route, sources: None }
}

fn cluster_ip(address: &str, target: Target) -> Frontend {
    let route = Route::Same { target, masquerade: Masquerade::UnlessPod };
    frontend(At::Address(address.parse().unwrap()), 80, route)
}

const CLUSTER: Target = Target::Forward(Scope::Cluster);
const LOCAL: Target = Target::Forward(Scope::Local);

fn check(port: PortPlan, expected: &Expect) {
    let plan = ServicePlan { ports: vec![port].into(), guarded: Box::default() };
    let rules = rules_of(&ServiceKey::new("default", "web"), &plan, &pods());
    let mut text = String::new();
    for (chain, lines) in &rules.chains {
        for line in lines {
            text += &format!("{} -A {} {line}\n", chain.table.name(), chain.name);
        }
    }
    for (leaf, _, lines) in &rules.lines {
        for line in lines {
            text += &format!("{} -A {} {line}\n", leaf.table.name(), leaf.chain().name);
        }
    }
    expected.assert_eq(&text);
}

#[test]
fn a_cluster_ip_leads_to_its_endpoints() {
    let frontends = vec![cluster_ip("10.96.0.165", CLUSTER)].into();
    check(
        PortPlan { frontends, ..port(Family::V4, 3) },
        &expect![[r#"
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -d 10.96.0.165/32 -j KEELSON-MARK-OTHERS
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -m statistic --mode random --probability 0.33333333349 -j DNAT --to-destination 10.66.0.1:8080
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -m statistic --mode random --probability 0.50000000000 -j DNAT --to-destination 10.66.0.2:8080
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -j DNAT --to-destination 10.66.0.3:8080
            nat -A KEELSON-SERVICES-5A -d 10.96.0.165/32 -p tcp -m comment --comment "default/web:http" -m tcp --dport 80 -j KEELSON-SVC-CDGGSHYLG3RE2FKL
        "#]],
    );
}

#[test]
fn sticky_clients_are_remembered_by_endpoint() {
    let frontends = vec![cluster_ip("fd96::1", CLUSTER)].into();
    check(
        PortPlan { frontends, affinity_secs: Some(10800), ..port(Family::V6, 2) },
        &expect![[r#"
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -d fd96::1/128 -j KEELSON-MARK-OTHERS
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -m recent --update --seconds 10800 --reap --name KEELSON-MFQTYQQGN2NSSTZ5 --mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource -j DNAT --to-destination [fd66::1]:8080
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -m recent --update --seconds 10800 --reap --name KEELSON-URGTB26MT6ADQ6RV --mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource -j DNAT --to-destination [fd66::2]:8080
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -m statistic --mode random --probability 0.50000000000 -m recent --set --name KEELSON-MFQTYQQGN2NSSTZ5 --mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource -j DNAT --to-destination [fd66::1]:8080
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -m recent --set --name KEELSON-URGTB26MT6ADQ6RV --mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource -j DNAT --to-destination [fd66::2]:8080
            nat -A KEELSON-SERVICES-10 -d fd96::1/128 -p tcp -m comment --comment "default/web:http" -m tcp --dport 80 -j KEELSON-SVC-CDGGSHYLG3RE2FKL
        "#]],
    );
}

#[test]
fn a_local_policy_tells_sources_apart() {
    let route = Route::BySource { inside: CLUSTER, outside: LOCAL };
    let local: Box<[Endpoint]> = port(Family::V4, 1).cluster;
    let frontends = vec![frontend(At::NodePort(Family::V4), 30080, route)].into();
    check(
        PortPlan { frontends, local, ..port(Family::V4, 2) },
        &expect![[r#"
            nat -A KEELSON-EXT-2PFRBYJ3EFMUSSR5 -s 10.66.0.0/16 -j KEELSON-SVC-CDGGSHYLG3RE2FKL
            nat -A KEELSON-EXT-2PFRBYJ3EFMUSSR5 -m addrtype --src-type LOCAL -j KEELSON-MARK
            nat -A KEELSON-EXT-2PFRBYJ3EFMUSSR5 -m addrtype --src-type LOCAL -j KEELSON-SVC-CDGGSHYLG3RE2FKL
            nat -A KEELSON-EXT-2PFRBYJ3EFMUSSR5 -j KEELSON-SVL-CDGGSHYLG3RE2FKL
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -m statistic --mode random --probability 0.50000000000 -j DNAT --to-destination 10.66.0.1:8080
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -j DNAT --to-destination 10.66.0.2:8080
            nat -A KEELSON-SVL-CDGGSHYLG3RE2FKL -p tcp -j DNAT --to-destination 10.66.0.1:8080
            nat -A KEELSON-NODEPORTS-TCP-758 -p tcp -m comment --comment "default/web:http" -m tcp --dport 30080 -j KEELSON-EXT-2PFRBYJ3EFMUSSR5
        "#]],
    );
    // Nobody here: strangers are dropped.
    let route = Route::BySource { inside: CLUSTER, outside: Target::Drop };
    let frontends = vec![frontend(At::NodePort(Family::V4), 30080, route)].into();
    check(
        PortPlan { frontends, ..port(Family::V4, 1) },
        &expect![[r#"
            nat -A KEELSON-EXT-GDLCO57HF7UDLYDE -s 10.66.0.0/16 -j KEELSON-SVC-CDGGSHYLG3RE2FKL
            nat -A KEELSON-EXT-GDLCO57HF7UDLYDE -m addrtype --src-type LOCAL -j KEELSON-MARK
            nat -A KEELSON-EXT-GDLCO57HF7UDLYDE -m addrtype --src-type LOCAL -j KEELSON-SVC-CDGGSHYLG3RE2FKL
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -j DNAT --to-destination 10.66.0.1:8080
            nat -A KEELSON-NODEPORTS-TCP-758 -p tcp -m comment --comment "default/web:http" -m tcp --dport 30080 -j KEELSON-EXT-GDLCO57HF7UDLYDE
            filter -A KEELSON-UNSERVED-TCP-758 -p tcp -m comment --comment "default/web:http" -m tcp --dport 30080 -j DROP
        "#]],
    );
}

#[test]
fn source_ranges_hold_whether_or_not_there_is_an_endpoint() {
    let restricted = |target| Frontend {
        sources: Some(["203.0.113.0/24", "198.51.100.7/32"].map(|r| r.parse().unwrap()).into()),
        ..frontend(
            At::Address("198.51.100.1".parse().unwrap()),
            80,
            Route::Same { target, masquerade: Masquerade::Always },
        )
    };
    check(
        PortPlan { frontends: vec![restricted(CLUSTER)].into(), ..port(Family::V4, 1) },
        &expect![[r#"
            nat -A KEELSON-EXT-CDGGSHYLG3RE2FKL -j KEELSON-MARK
            nat -A KEELSON-EXT-CDGGSHYLG3RE2FKL -j KEELSON-SVC-CDGGSHYLG3RE2FKL
            nat -A KEELSON-FW-F5UGSRXRXDKVY7OQ -s 203.0.113.0/24 -j KEELSON-EXT-CDGGSHYLG3RE2FKL
            nat -A KEELSON-FW-F5UGSRXRXDKVY7OQ -s 198.51.100.7/32 -j KEELSON-EXT-CDGGSHYLG3RE2FKL
            nat -A KEELSON-SVC-CDGGSHYLG3RE2FKL -p tcp -j DNAT --to-destination 10.66.0.1:8080
            nat -A KEELSON-SERVICES-10 -d 198.51.100.1/32 -p tcp -m comment --comment "default/web:http" -m tcp --dport 80 -j KEELSON-FW-F5UGSRXRXDKVY7OQ
            filter -A KEELSON-UNSERVED-10 -d 198.51.100.1/32 -p tcp -m comment --comment "default/web:http" -m tcp --dport 80 -j DROP
        "#]],
    );
    check(
        PortPlan { frontends: vec![restricted(Target::Reject)].into(), ..port(Family::V4, 0) },
        &expect![[r#"
            filter -A KEELSON-UNSERVED-10 -s 203.0.113.0/24 -d 198.51.100.1/32 -p tcp -m comment --comment "default/web:http" -m tcp --dport 80 -j KEELSON-REJECT
            filter -A KEELSON-UNSERVED-10 -s 198.51.100.7/32 -d 198.51.100.1/32 -p tcp -m comment --comment "default/web:http" -m tcp --dport 80 -j KEELSON-REJECT
            filter -A KEELSON-UNSERVED-10 -d 198.51.100.1/32 -p tcp -m comment --comment "default/web:http" -m tcp --dport 80 -j DROP
        "#]],
    );
}

#[test]
fn the_chains_that_are_always_there() {
    let config = BackendConfig {
        pods: pods(),
        service_ranges: vec!["10.96.0.0/16".parse().unwrap()],
        ..BackendConfig::default()
    };
    let ruleset = Ruleset::new(config, &[Family::V4]);
    let script = script(Family::V4, &ruleset.fixed(), &Hooks::new(), usize::MAX, Table::Nat);
    expect![[r#"
        *nat
        :KEELSON-HAIRPIN - [0:0]
        :KEELSON-MARK - [0:0]
        :KEELSON-MARK-OTHERS - [0:0]
        :KEELSON-NODEPORTS - [0:0]
        :KEELSON-POSTROUTING - [0:0]
        :KEELSON-SERVICES - [0:0]
        -A KEELSON-MARK -j MARK --set-xmark 0x4000/0x4000
        -A KEELSON-MARK-OTHERS -s 10.66.0.0/16 -j RETURN
        -A KEELSON-MARK-OTHERS -j MARK --set-xmark 0x4000/0x4000
        -A KEELSON-POSTROUTING -m conntrack --ctstate DNAT -j KEELSON-HAIRPIN
        -A KEELSON-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
        -A KEELSON-POSTROUTING -j MARK --set-xmark 0x4000/0x0
        -A KEELSON-POSTROUTING -j MASQUERADE --random-fully
        -A KEELSON-SERVICES -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j KEELSON-NODEPORTS
        -A KEELSON-SERVICES -m addrtype --dst-type LOCAL -j KEELSON-NODEPORTS
        COMMIT
        *filter
        :KEELSON-REJECT - [0:0]
        :KEELSON-UNSERVED-PORTS - [0:0]
        :KEELSON-UNSERVED - [0:0]
        :KEELSON-FORWARD - [0:0]
        :KEELSON-INPUT - [0:0]
        :KEELSON-OUTPUT - [0:0]
        -A KEELSON-REJECT -p tcp -j REJECT --reject-with tcp-reset
        -A KEELSON-REJECT -j REJECT --reject-with icmp-port-unreachable
        -A KEELSON-UNSERVED -m conntrack --ctstate DNAT -j RETURN
        -A KEELSON-UNSERVED -d 10.96.0.0/16 -j DROP
        -A KEELSON-UNSERVED -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j KEELSON-UNSERVED-PORTS
        -A KEELSON-UNSERVED -m addrtype --dst-type LOCAL -j KEELSON-UNSERVED-PORTS
        -A KEELSON-FORWARD -m conntrack --ctstate NEW -j KEELSON-UNSERVED
        -A KEELSON-FORWARD -m conntrack --ctstate INVALID -j DROP
        -A KEELSON-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
        -A KEELSON-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
        -A KEELSON-INPUT -m conntrack --ctstate NEW -j KEELSON-UNSERVED
        -A KEELSON-INPUT ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
        -A KEELSON-OUTPUT -m conntrack --ctstate NEW -j KEELSON-UNSERVED
        COMMIT
    "#]]
    .assert_eq(&script.text);
}

/// What the kernel makes of scripts.
#[derive(Debug, Default, PartialEq, Eq)]
struct Kernel {
    chains: BTreeMap<Chain, Vec<String>>,
}

impl Kernel {
    /// Takes one transaction after the other; after each of them every rule must lead to a chain that is
    /// there, and one that was reached before must not be empty.
    fn restore(&mut self, family: Family, text: &str) {
        let mut table = Table::Nat;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Table::parse(name).unwrap();
            } else if let Some(name) = line.strip_prefix(':') {
                let name = name.strip_suffix(" - [0:0]").unwrap();
                self.chains.insert(Chain::new(family, table, name), Vec::new());
            } else if let Some(rule) = line.strip_prefix("-A ") {
                let (name, rule) = rule.split_once(' ').unwrap();
                let chain = self.chains.get_mut(&Chain::new(family, table, name));
                chain.expect("a rule for a chain that is there").push(rule.to_owned());
            } else if let Some(name) = line.strip_prefix("-X ") {
                let chain = Chain::new(family, table, name);
                assert_eq!(self.chains.remove(&chain), Some(Vec::new()));
            } else {
                assert_eq!(line, "COMMIT");
                self.check();
            }
        }
    }

    fn check(&self) {
        for (chain, lines) in &self.chains {
            for line in lines {
                let to = target(line).unwrap();
                if to.starts_with("KEELSON-") {
                    let to = Chain { name: to.into(), ..chain.clone() };
                    let found = self.chains.get(&to);
                    assert!(found.is_some(), "{chain}: {line}: leads nowhere");
                    let may_be_empty =
                        ["KEELSON-NODEPORTS", "KEELSON-UNSERVED-PORTS", "KEELSON-HAIRPIN"];
                    let filled = found.is_some_and(|lines| !lines.is_empty());
                    assert!(
                        filled || may_be_empty.contains(&&*to.name),
                        "{chain}: {line}: to nothing"
                    );
                }
            }
        }
    }

    fn put(&mut self, dirty: &Dirty, limit: usize, first: Table) {
        for family in Family::BOTH {
            let script = script(family, dirty, &Hooks::new(), limit, first);
            self.restore(family, &script.text);
        }
    }
}

prop_compose! {
    fn plan()(
        v6 in any::<bool>(),
        endpoints in 0u8..4,
        last in 1u8..40,
        sticky in any::<bool>(),
        node_port in proptest::option::of(30000u16..30040),
        local in any::<bool>(),
        restricted in any::<bool>(),
    ) -> ServicePlan {
        let family = if v6 { Family::V6 } else { Family::V4 };
        let mut port = port(family, endpoints);
        let address = if v6 { format!("fd96::{last:x}") } else { format!("10.96.0.{last}") };
        let target = if endpoints > 0 { CLUSTER } else { Target::Reject };
        let mut frontends = vec![cluster_ip(&address, target)];
        let route = if local && endpoints > 0 {
            Route::BySource { inside: target, outside: Target::Drop }
        } else {
            Route::Same { target, masquerade: Masquerade::Always }
        };
        frontends.extend(node_port.map(|number| frontend(At::NodePort(family), number, route)));
        if restricted {
            let address = if v6 { format!("2001:db8::{last:x}") } else { format!("198.51.100.{last}") };
            let sources = Some(vec!["203.0.113.0/24".parse().unwrap()].into());
            let at = At::Address(address.parse().unwrap());
            frontends.push(Frontend { sources, ..frontend(at, 80, route) });
        }
        port.frontends = frontends.into();
        port.affinity_secs = sticky.then_some(60);
        ServicePlan { ports: vec![port].into(), guarded: vec![address.parse().unwrap()].into() }
    }
}

#[test]
fn clients_are_refused_as_long_as_nobody_translates_their_connections() {
    let config = BackendConfig { pods: pods(), ..BackendConfig::default() };
    let mut ruleset = Ruleset::new(config, &Family::BOTH);
    let mut counts = Counts::of(&ruleset.fixed());
    let mut first = |endpoints| {
        let target = if endpoints > 0 { CLUSTER } else { Target::Reject };
        let route = Route::Same { target, masquerade: Masquerade::Always };
        let frontends = vec![frontend(At::NodePort(Family::V4), 30080, route)].into();
        let ports = vec![PortPlan { frontends, ..port(Family::V4, endpoints) }].into();
        let plan = ServicePlan { ports, guarded: Box::default() };
        let update = (ServiceKey::new("default", "web"), Some(Arc::new(plan)));
        let dirty = ruleset.take(&[update]);
        let first = counts.first_to_change(&dirty);
        counts.change(&dirty);
        let text = script(Family::V4, &dirty, &Hooks::new(), usize::MAX, first).text;
        text.lines().next().unwrap_or_default().to_owned()
    };
    assert_eq!(first(2), "*nat");
    assert_eq!(first(0), "*filter");
    assert_eq!(first(1), "*nat");
}

/// Two Services never have the same frontend: later ones lose theirs, as in the model.
fn without_conflicts(plans: &BTreeMap<u8, ServicePlan>) -> BTreeMap<u8, ServicePlan> {
    let mut taken = std::collections::HashSet::new();
    let mut result = plans.clone();
    for plan in result.values_mut() {
        for port in &mut plan.ports {
            let all = std::mem::take(&mut port.frontends);
            port.frontends = all.iter().filter(|f| taken.insert(f.key)).cloned().collect();
        }
        let guarded = std::mem::take(&mut plan.guarded);
        let key =
            |address| FrontendKey { at: At::Address(address), protocol: Protocol::Udp, port: 0 };
        plan.guarded = guarded.iter().copied().filter(|a| taken.insert(key(*a))).collect();
    }
    result
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_history_ends_as_a_new_start_and_every_transaction_leaves_working_rules(
        steps in proptest::collection::vec(
            proptest::collection::vec((0u8..12, proptest::option::weighted(0.8, plan())), 1..5),
            1..12,
        ),
        limit in prop_oneof![Just(1usize), Just(3), Just(usize::MAX)],
    ) {
        let config = BackendConfig { pods: pods(), ..BackendConfig::default() };
        let key = |number: &u8| ServiceKey::new("default", &format!("s{number}"));
        let mut ruleset = Ruleset::new(config.clone(), &Family::BOTH);
        let (mut kernel, mut counts) = (Kernel::default(), Counts::of(&ruleset.fixed()));
        kernel.put(&ruleset.fixed(), limit, Table::Nat);
        let (mut wanted, mut before) = (BTreeMap::new(), BTreeMap::new());
        for step in steps {
            for (number, plan) in step {
                match plan {
                    Some(plan) => drop(wanted.insert(number, plan)),
                    None => drop(wanted.remove(&number)),
                }
            }
            let after = without_conflicts(&wanted);
            let changed = (0..12).filter(|number| before.get(number) != after.get(number));
            let updates: Vec<Update> =
                changed.map(|number| (key(&number), after.get(&number).cloned().map(Arc::new))).collect();
            let dirty = ruleset.take(&updates);
            kernel.put(&dirty, limit, counts.first_to_change(&dirty));
            counts.change(&dirty);
            before = after;
        }
        let mut fresh = Ruleset::new(config, &Family::BOTH);
        let all: Vec<Update> =
            before.iter().map(|(number, plan)| (key(number), Some(Arc::new(plan.clone())))).collect();
        let mut chains = fresh.take(&all);
        chains.extend(fresh.fixed());
        let mut from_scratch = Kernel::default();
        from_scratch.put(&chains, usize::MAX, Table::Nat);
        prop_assert_eq!(kernel, from_scratch);
    }
}
