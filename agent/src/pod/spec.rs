//! Questions about a pod's manifest that several parts ask.

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};

use crate::runtime::types::PodId;

/// Marks a pod that came from a manifest folder with where it came from.
pub const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
/// A static pod's identity: changes when its manifest does.
pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// When a static pod's manifest was first read.
pub const CONFIG_SEEN: &str = "kubernetes.io/config.seen";
/// Marks the API's image of a static pod; the value is the static pod's hash.
pub const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";
/// Annotation: with `disabled` the service proxy translates the pod's packets, never its sockets.
pub const SOCKET_LB: &str = "keelson.io/socket-lb";

/// A pod's `restartPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

impl RestartPolicy {
    fn parse(text: Option<&str>) -> Option<Self> {
        match text? {
            "Always" => Some(Self::Always),
            "OnFailure" => Some(Self::OnFailure),
            "Never" => Some(Self::Never),
            _ => None,
        }
    }
}

/// Which list of the manifest a container stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ContainerKind {
    Init,
    Main,
    Ephemeral,
}

pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

pub fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

pub fn id(pod: &Pod) -> PodId {
    PodId { namespace: namespace(pod).into(), name: name(pod).into(), uid: uid(pod).into() }
}

/// `namespace/name`, for logs and messages.
pub fn key(pod: &Pod) -> String {
    format!("{}/{}", namespace(pod), name(pod))
}

pub fn annotation<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

/// A pod that a manifest folder asked for, not the API.
pub fn is_static(pod: &Pod) -> bool {
    annotation(pod, CONFIG_SOURCE).is_some_and(|source| source != "api") && !is_mirror(pod)
}

/// The API's image of a static pod.
pub fn is_mirror(pod: &Pod) -> bool {
    annotation(pod, CONFIG_MIRROR).is_some()
}

/// Pods that the node cannot do without: admitted past pressure, evicted last.
pub fn is_critical(pod: &Pod) -> bool {
    is_static(pod)
        || is_mirror(pod)
        || spec(pod).is_some_and(|s| s.priority.unwrap_or(0) >= 2_000_000_000)
}

pub fn spec(pod: &Pod) -> Option<&PodSpec> {
    pod.spec.as_ref()
}

pub fn init_containers(pod: &Pod) -> &[Container] {
    spec(pod).and_then(|s| s.init_containers.as_deref()).unwrap_or_default()
}

pub fn main_containers(pod: &Pod) -> &[Container] {
    spec(pod).map(|s| s.containers.as_slice()).unwrap_or_default()
}

pub fn ephemeral_containers(pod: &Pod) -> &[EphemeralContainer] {
    spec(pod).and_then(|s| s.ephemeral_containers.as_deref()).unwrap_or_default()
}

/// Finds an init or main container of that name.
pub fn container<'a>(pod: &'a Pod, name: &str) -> Option<(&'a Container, ContainerKind)> {
    let find = |list: &'a [Container], kind| {
        list.iter().find(|c| c.name == name).map(|container| (container, kind))
    };
    find(main_containers(pod), ContainerKind::Main)
        .or_else(|| find(init_containers(pod), ContainerKind::Init))
}

/// An init container that keeps running beside the main containers.
pub fn is_sidecar(init: &Container) -> bool {
    init.restart_policy.as_deref() == Some("Always")
}

pub fn restart_policy(pod: &Pod) -> RestartPolicy {
    RestartPolicy::parse(spec(pod).and_then(|s| s.restart_policy.as_deref()))
        .unwrap_or(RestartPolicy::Always)
}

/// Whether a container that ended with `exit_code` shall run again.
///
/// Precedence: an exit-code rule, then the container's own policy, then the pod's; an init container of an `Always` pod is
/// restarted only on failure.
pub fn restarts_after(
    pod: &Pod,
    container: &Container,
    kind: ContainerKind,
    exit_code: i32,
) -> bool {
    if rule_matches(container, exit_code) {
        return true;
    }
    let own = RestartPolicy::parse(container.restart_policy.as_deref());
    match (own.unwrap_or_else(|| restart_policy(pod)), kind) {
        (_, ContainerKind::Ephemeral) | (RestartPolicy::Never, _) => false,
        (RestartPolicy::Always, ContainerKind::Init) if own.is_none() => exit_code != 0,
        (RestartPolicy::Always, _) => true,
        (RestartPolicy::OnFailure, _) => exit_code != 0,
    }
}

fn rule_matches(container: &Container, exit_code: i32) -> bool {
    container.restart_policy_rules.iter().flatten().any(|rule| {
        rule.action == "Restart"
            && rule.exit_codes.as_ref().is_some_and(|codes| {
                let listed = codes.values.iter().flatten().any(|code| *code == exit_code);
                match codes.operator.as_str() {
                    "In" => listed,
                    "NotIn" => !listed,
                    _ => false,
                }
            })
    })
}

pub fn host_network(pod: &Pod) -> bool {
    spec(pod).and_then(|s| s.host_network).unwrap_or(false)
}

/// What decides that a running container must be replaced: its name and image, and nothing else.
pub fn spec_hash(container: &Container) -> String {
    let image = container.image.as_deref().unwrap_or_default();
    format!("{:016x}", fnv1a(&[container.name.as_bytes(), b"\0", image.as_bytes()]))
}

/// 64-bit FNV-1a: stable over releases, which `std`'s hasher does not promise.
pub fn fnv1a(parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in parts.iter().copied().flatten() {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash
}

/// How long a pod may take to stop: the deletion's period, else the manifest's, else 30 s; at least 1 s unless forced.
pub fn grace_secs(pod: &Pod) -> i64 {
    let wanted = pod
        .metadata
        .deletion_grace_period_seconds
        .or_else(|| spec(pod).and_then(|s| s.termination_grace_period_seconds))
        .unwrap_or(30);
    wanted.max(1)
}
