//! Pods: whatever the API server lets a tenant write.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodStatus};

use super::text;
use crate::cgroup::resources;
use crate::dns::{self, ClusterDns, Resolver};
use crate::env::{self, EnvContext, FieldContext, Objects};
use crate::pod::admission::Ledger;
use crate::pod::backoff::CrashBackoff;
use crate::pod::plan::{Action, Holds, Probes, View, plan};
use crate::pod::spec;
use crate::pod::status::{StatusInput, status};
use crate::runtime::types::{
    ContainerState, Exit, ImageRef, ObservedContainer, ObservedPod, ObservedSandbox,
};

/// More than this no program can be given; the kernel takes 2 MiB.
const MAX_ENV: usize = 4 << 20;

/// A pod, and on the next line what became of its containers: what is planned for it, told of it and given to it.
pub fn pods(input: &[u8]) {
    let mut parts = input.splitn(2, |byte| *byte == b'\n');
    let Ok(pod) = serde_json::from_slice::<Pod>(parts.next().unwrap_or_default()) else { return };
    let fates = parts.next().unwrap_or_default();
    life(&pod, fates);
    shares(&pod);
    names(&pod);
    for container in spec::main_containers(&pod).iter().chain(spec::init_containers(&pod)) {
        environment(&pod, container);
    }
}

fn life(pod: &Pod, fates: &[u8]) {
    let mut backoff = CrashBackoff::default();
    let (probes, holds, mut told) = (Probes::new(), Holds::new(), PodStatus::default());
    for (turn, now) in
        [Timestamp::UNIX_EPOCH, Timestamp::MAX, Timestamp::MIN].into_iter().enumerate()
    {
        let seen = observed(pod, fates.get(turn..).unwrap_or_default(), now);
        for stop in [false, true] {
            let observed = (turn > 0).then_some(&seen);
            let view = View {
                pod,
                observed,
                stop,
                probes: &probes,
                holds: &holds,
                backoff: &backoff,
                now,
            };
            let plan = plan(&view);
            assert!(!plan.finished || !plan.actions.contains(&Action::KillPod));
            told = status(&StatusInput {
                pod,
                observed,
                previous: &told,
                waiting: &plan.waiting,
                probes: &probes,
                host_ips: &[],
                ending: None,
                finished: plan.finished,
                now,
            });
        }
        for container in &seen.containers {
            if let ContainerState::Exited(exit) = &container.state {
                backoff.note_restart(container, exit, now);
            }
        }
    }
}

/// Each byte is a container that was started: which, and how it goes.
fn observed(pod: &Pod, fates: &[u8], now: Timestamp) -> ObservedPod {
    let sandbox = ObservedSandbox {
        id: "s".to_owned(),
        attempt: 7,
        ready: fates.len().is_multiple_of(2),
        created_at: now,
        ips: Vec::new(),
        host_network: spec::host_network(pod),
    };
    let all: Vec<&Container> =
        spec::init_containers(pod).iter().chain(spec::main_containers(pod)).collect();
    let started = fates.iter().take(16).filter_map(|fate| {
        let container = all.get(usize::from(fate >> 3) % all.len().max(1))?;
        let state = match fate & 7 {
            0 => ContainerState::Created,
            1 => ContainerState::Unknown,
            2..=4 => ContainerState::Running { started_at: now, pid: 1 },
            code => ContainerState::Exited(Exit {
                code: i32::from(code) - 5,
                reason: "Error".to_owned(),
                message: String::new(),
                started_at: Some(now),
                finished_at: now,
            }),
        };
        Some(ObservedContainer {
            id: format!("c{fate}"),
            name: container.name.clone(),
            attempt: u32::from(*fate),
            sandbox_id: "s".to_owned(),
            spec_hash: spec::spec_hash(container),
            image_name: container.image.clone().unwrap_or_default(),
            image: ImageRef { id: String::new(), repo_digest: String::new() },
            state,
            created_at: now,
            log_path: "/l".into(),
        })
    });
    let containers = started.collect();
    ObservedPod { pod: spec::id(pod), sandboxes: vec![sandbox], containers }
}

/// Quantities are anybody's; what they become is within what the kernel takes.
fn shares(pod: &Pod) {
    let all = resources::pod_resources(pod, None);
    let within = |shares: Option<u64>| shares.is_none_or(|shares| (2..=262_144).contains(&shares));
    assert!(within(all.cpu_shares), "{all:?}");
    for container in spec::main_containers(pod).iter().chain(spec::init_containers(pod)) {
        let own = resources::container_resources(pod, container, 1 << 30);
        assert!(within(own.cpu_shares) && (-1000..=1000).contains(&own.oom_score_adj), "{own:?}");
        assert!(own.cpu_quota_us.is_none_or(|quota| quota > 0), "{own:?}");
    }
    let (ledger, allocatable) = (Ledger::default(), BTreeMap::new());
    drop(ledger.admit(pod, "node", &allocatable));
    ledger.adopt(pod);
    assert!(ledger.cpu_requests_milli() >= 0, "requests are less than nothing");
}

fn names(pod: &Pod) {
    let cluster = ClusterDns { servers: &[], domain: "cluster.local" };
    drop(dns::resolver(pod, &Resolver::default(), cluster));
    if let Ok(hostname) = dns::hostname(pod, "node", "cluster.local") {
        drop(dns::hosts_file(pod, &hostname, &[], ""));
    }
}

fn environment(pod: &Pod, container: &Container) {
    let allocatable = BTreeMap::new();
    let fields =
        FieldContext { pod_ips: &[], host_ips: &[], node_name: "node", allocatable: &allocatable };
    let (objects, services) = (Objects::default(), BTreeMap::new());
    let context = EnvContext { pod, objects: &objects, fields: &fields, services: &services };
    if let Ok(variables) = env::build(container, &context) {
        let bytes: usize = variables.iter().map(|(name, value)| name.len() + value.len()).sum();
        assert!(bytes <= MAX_ENV, "an environment of {bytes} bytes");
    }
}

/// The node's own resolv.conf.
pub fn resolv_conf(input: &[u8]) {
    drop(Resolver::parse(&text(input)));
}
