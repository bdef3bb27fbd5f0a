//! What `fuzz/` calls: every reader of foreign bytes in this crate. Each takes any bytes and panics when an invariant does
//! not hold. No program of keelson calls them, so they are in none.

use ipnetwork::IpNetwork;

use crate::backend::{BackendConfig, PodSources};
use crate::diff::{Plans, advance};
use crate::ebpf::monitor::decision;
use crate::ebpf::numbering::{self, Before, NumberedPool, Numbers};
use crate::ebpf::sys::read_event;
use crate::ebpf::{Algorithm, item as ebpf_item};
use crate::flags;
use crate::iptables::ruleset::Ruleset;
use crate::iptables::saved::Saved;
use crate::ipvs::servers::{Ground, Servers};
use crate::last_known::file;
use crate::model::objects::{EndpointSlice, Service};
use crate::model::{Family, Model, NodeFacts, PortPlan, Scope, ServiceKey, key_of};
use crate::nftables::Role;
use crate::nftables::item::{Pool, Pools, items_of, wanted_pool};
use crate::nftables::layout::Setup;

fn text(input: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(input)
}

/// What `iptables-save` prints, with the rules of others.
pub fn iptables_save(input: &[u8]) {
    let text = text(input);
    let ours = Saved::parse(&text);
    assert!(ours.chains.keys().all(|(_, chain)| chain.starts_with("KEELSON")));
    let all = Saved::parse_of(&text, |_| true);
    assert!(all.jumps.is_empty() && all.chains.len() >= ours.chains.len());
}

/// The file of the last known state after a bad day.
pub fn last_known(input: &[u8]) {
    let reader = file::Owner { boot: "now".to_owned(), node: "n".to_owned() };
    if let Ok(Some((plans, config))) = file::read_from(input, &reader) {
        put_in_force(&plans, &config);
    }
}

/// `KubeProxyConfiguration`.
pub fn proxy_config(input: &[u8]) {
    drop(flags::file::read(&text(input)));
}

/// Events of the BPF programs.
pub fn events(input: &[u8]) {
    if let Some(event) = read_event(input) {
        let decision = decision::of(&event, None, decision::From::address(&event));
        assert!(decision.ends().count() <= 3);
        drop(decision.as_json("now"));
        drop(decision.to_string());
    }
}

/// Objects of the API, one on each line, as they come and go: plans, and what the backends make of them.
pub fn services(input: &[u8]) {
    let mut model = Model::new(NodeFacts {
        name: "node".to_owned(),
        addresses: vec![[192, 168, 0, 2].into()],
        zone: Some("a".to_owned()),
        knows_pods: true,
        masquerade_all: false,
    });
    let mut plans = Plans::new();
    for line in input.split(|byte| *byte == b'\n') {
        let (what, object) = line.split_first().unwrap_or((&0, &[]));
        take(&mut model, *what, object);
        let keys = model.take_dirty();
        advance(&mut plans, keys, |key| model.plan(key));
    }
    let keys: Vec<ServiceKey> = model.services().cloned().collect();
    for key in &keys {
        let _check = model.health_check(key);
        drop(model.explain_endpoints(key));
    }
    drop(model.take_problems());
    let pods = match input.len() % 2 {
        0 => PodSources::Unknown,
        _ => PodSources::Ranges("10.0.0.0/8".parse::<IpNetwork>().into_iter().collect()),
    };
    put_in_force(&plans, &BackendConfig { pods, ..BackendConfig::default() });
}

fn take(model: &mut Model, what: u8, object: &[u8]) {
    match what {
        b's' => {
            if let Ok(service) = serde_json::from_slice::<Service>(object) {
                model.apply_service(&service);
            }
        }
        b'e' => {
            if let Ok(slice) = serde_json::from_slice::<EndpointSlice>(object) {
                model.apply_slice(&slice);
            }
        }
        b'd' => {
            if let Ok(service) = serde_json::from_slice::<Service>(object) {
                model.delete_service(&key_of(&service.metadata));
            }
        }
        b'g' => {
            if let Ok(slice) = serde_json::from_slice::<EndpointSlice>(object) {
                model.delete_slice(&key_of(&slice.metadata));
            }
        }
        _ => {}
    }
}

/// What each backend computes from plans, without a kernel: all comes, all goes again.
fn put_in_force(plans: &Plans, config: &BackendConfig) {
    let mut rules = Ruleset::new(config.clone(), &[Family::V4, Family::V6]);
    let come: Vec<_> = plans.iter().map(|(key, plan)| (key.clone(), Some(plan.clone()))).collect();
    let go: Vec<_> = plans.keys().map(|key| (key.clone(), None)).collect();
    rules.take(&come);
    rules.take(&go);
    let ground = Ground::new(config, [[192, 168, 0, 2].into()]);
    let mut servers = Servers::default();
    for (key, plan) in plans {
        servers.insert(key, plan, &ground);
    }
    for (key, plan) in plans {
        servers.remove(key, plan, &ground);
    }
    assert!(servers.is_empty(), "virtual servers of no Service");
    for role in [Role::Whole, Role::BesideIpvs, Role::IpvsFlows] {
        nftables_items(&Setup { role, config: config.clone() }, plans);
    }
    ebpf_items(plans);
}

fn nftables_items(setup: &Setup, plans: &Plans) {
    let mut items = Vec::new();
    for port in plans.values().flat_map(|plan| &plan.ports) {
        let pool = |number, scope| {
            let wanted = wanted_pool(setup, port, scope)?;
            let pool = Pool::empty(number, port.affinity_secs.is_some()).with(wanted);
            assert_eq!(
                pool.slots.len(),
                wanted.len(),
                "endpoints were lost on their way to the kernel"
            );
            Some(pool)
        };
        let pools = Pools { cluster: pool(1, Scope::Cluster), local: pool(2, Scope::Local) };
        items_of(setup, port, &pools, &mut items);
    }
    items.iter().for_each(|item| drop(item.to_string()));
}

fn ebpf_items(plans: &Plans) {
    let (mut numbers, mut items) = (Numbers::after(0), Vec::new());
    for plan in plans.values() {
        for algorithm in [Algorithm::Random, Algorithm::Maglev] {
            let numbered = numbering::number(plan, &mut Nothing, &mut numbers, algorithm);
            assert_eq!(numbered.len(), plan.ports.len());
            for (port, numbered) in plan.ports.iter().zip(&numbered) {
                ebpf_item::items_of(port, numbered, &mut items);
            }
        }
    }
}

/// A node that had no plans before.
struct Nothing;

impl Before for Nothing {
    fn pool(&mut self, _: &PortPlan, _: Scope) -> Option<NumberedPool> {
        None
    }

    fn number(&mut self, _: &PortPlan) -> Option<u32> {
        None
    }
}
