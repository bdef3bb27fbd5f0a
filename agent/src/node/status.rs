//! What the Node object shall say: a pure function of the machine, the configuration, the readiness
//! of runtime and network, and the status that is there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeStatus,
    NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::facts::{Machine, Usage};
use crate::config::AgentConfig;

#[cfg(test)]
mod tests;

/// The version that the node shows; control planes and tools parse it as the kubelet's.
pub const KUBELET_VERSION: &str = concat!("v1.36.0-keelson.", env!("CARGO_PKG_VERSION"));

/// The API server sends WebSockets straight to nodes that name this feature.
pub const WEBSOCKET_FEATURE: &str = "ExtendWebSocketsToKubelet";

/// All that the status is made of, apart from the status that is there already.
#[derive(Debug, Clone, Default)]
pub struct Observation {
    pub machine: Machine,
    pub usage: Usage,
    pub addresses: Vec<IpAddr>,
    /// `containerd://1.6.20`.
    pub runtime_version: String,
    pub images: Vec<NodeImage>,
    /// Why pods cannot run here; empty when they can.
    pub not_ready: Vec<String>,
    pub pressure: Pressure,
}

/// An image that is present.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeImage {
    pub names: Vec<String>,
    pub size_bytes: u64,
}

/// Which resources are scarce.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    pub memory: bool,
    pub disk: bool,
    pub pid: bool,
}

impl Pressure {
    /// What is scarce right now.
    pub fn measure(config: &AgentConfig, machine: &Machine, usage: &Usage) -> Self {
        let node = &config.node;
        Self {
            memory: usage.memory_available < node.eviction_memory.of(machine.memory_bytes),
            // File systems without a fixed number of inodes report none at all.
            disk: usage.disk_available < node.eviction_disk.of(usage.disk_total)
                || (usage.inodes_total > 0
                    && usage.inodes_free < node.eviction_inodes.of(usage.inodes_total)),
            pid: usage.pids_max.saturating_sub(usage.pids_used) < usage.pids_max / 100,
        }
    }

    /// Scarce in either.
    pub fn or(self, other: Self) -> Self {
        Self {
            memory: self.memory || other.memory,
            disk: self.disk || other.disk,
            pid: self.pid || other.pid,
        }
    }
}

/// The status that the node shall have, given the one that it has.
pub fn status(
    config: &AgentConfig,
    seen: &Observation,
    previous: &NodeStatus,
    now: Timestamp,
) -> NodeStatus {
    let capacity = capacity(config, seen, previous);
    NodeStatus {
        addresses: Some(addresses(config, seen)),
        allocatable: Some(allocatable(config, seen, &capacity)),
        capacity: Some(capacity),
        conditions: Some(conditions(seen, previous, now)),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(config.server.port) }),
        }),
        declared_features: Some(declared_features(previous)),
        images: Some(images(&seen.images, config.node.status_max_images)),
        node_info: Some(node_info(seen)),
        ..previous.clone()
    }
}

/// Whether two statuses differ in more than the time of the last sign of life.
pub fn differs(a: &NodeStatus, b: &NodeStatus) -> bool {
    without_heartbeats(a) != without_heartbeats(b)
}

fn without_heartbeats(status: &NodeStatus) -> NodeStatus {
    let mut status = status.clone();
    for condition in status.conditions.iter_mut().flatten() {
        condition.last_heartbeat_time = None;
    }
    status
}

fn addresses(config: &AgentConfig, seen: &Observation) -> Vec<NodeAddress> {
    let address = |type_: &str, address: String| NodeAddress { type_: type_.to_owned(), address };
    let internal = seen.addresses.iter().map(|ip| address("InternalIP", ip.to_string()));
    internal.chain([address("Hostname", config.node_name.clone())]).collect()
}

/// What the machine has, and what others (device plugins, administrators) say it has besides.
fn capacity(
    config: &AgentConfig,
    seen: &Observation,
    previous: &NodeStatus,
) -> BTreeMap<String, Quantity> {
    let own = |name: &str| {
        matches!(name, "cpu" | "memory" | "ephemeral-storage" | "pods")
            || name.starts_with("hugepages-")
    };
    let mut capacity: BTreeMap<String, Quantity> = previous.capacity.clone().unwrap_or_default();
    capacity.retain(|name, _| !own(name));
    let machine = &seen.machine;
    capacity.insert("cpu".to_owned(), Quantity(machine.cpus.to_string()));
    capacity.insert("memory".to_owned(), kibibytes(machine.memory_bytes));
    capacity.insert("ephemeral-storage".to_owned(), kibibytes(seen.usage.disk_total));
    capacity.insert("pods".to_owned(), Quantity(config.node.max_pods.to_string()));
    for (size, bytes) in &seen.usage.hugepages {
        capacity.insert(format!("hugepages-{size}"), bytes_quantity(*bytes));
    }
    capacity
}

/// Capacity less what is withheld from pods.
fn allocatable(
    config: &AgentConfig,
    seen: &Observation,
    capacity: &BTreeMap<String, Quantity>,
) -> BTreeMap<String, Quantity> {
    let node = &config.node;
    let reserved = |resource: &str| {
        let of = |map: &BTreeMap<String, u64>| map.get(resource).copied().unwrap_or(0);
        of(&node.kube_reserved).saturating_add(of(&node.system_reserved))
    };
    let mut allocatable = capacity.clone();
    let machine = &seen.machine;
    let cpu = (machine.cpus * 1000).saturating_sub(reserved("cpu"));
    allocatable.insert("cpu".to_owned(), milli(cpu));
    let hugepages: u64 = seen.usage.hugepages.values().sum();
    let memory = machine
        .memory_bytes
        .saturating_sub(hugepages)
        .saturating_sub(reserved("memory"))
        .saturating_sub(node.eviction_memory.of(machine.memory_bytes));
    allocatable.insert("memory".to_owned(), kibibytes(memory));
    let disk = seen.usage.disk_total;
    let storage = disk
        .saturating_sub(reserved("ephemeral-storage"))
        .saturating_sub(node.eviction_disk.of(disk));
    allocatable.insert("ephemeral-storage".to_owned(), bytes_quantity(storage));
    allocatable
}

/// What the machine has and what of it pods may use, before anybody has added resources of their own.
pub fn resources(
    config: &AgentConfig,
    machine: &Machine,
    usage: &Usage,
) -> (BTreeMap<String, Quantity>, BTreeMap<String, Quantity>) {
    let seen =
        Observation { machine: machine.clone(), usage: usage.clone(), ..Observation::default() };
    let capacity = capacity(config, &seen, &NodeStatus::default());
    let allocatable = allocatable(config, &seen, &capacity);
    (capacity, allocatable)
}

fn milli(milli: u64) -> Quantity {
    Quantity(if milli.is_multiple_of(1000) {
        (milli / 1000).to_string()
    } else {
        format!("{milli}m")
    })
}

fn kibibytes(bytes: u64) -> Quantity {
    Quantity(format!("{}Ki", bytes / 1024))
}

/// Bytes in the largest binary unit that divides them, as Kubernetes itself writes quantities.
fn bytes_quantity(bytes: u64) -> Quantity {
    let units = [(60, "Ei"), (50, "Pi"), (40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")];
    let unit = units.into_iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    Quantity(match unit {
        Some((shift, suffix)) => format!("{}{suffix}", bytes >> shift),
        None => bytes.to_string(),
    })
}

/// Conditions in the kubelet's order and words; those of others stay where they are.
fn conditions(seen: &Observation, previous: &NodeStatus, now: Timestamp) -> Vec<NodeCondition> {
    let pressure = |type_, scarce, reason_word: &str, word: &str| {
        let amount = if scarce { "Insufficient" } else { "Sufficient" };
        let message = format!("kubelet has {} {word} available", amount.to_lowercase());
        (type_, scarce, format!("KubeletHas{amount}{reason_word}"), message)
    };
    let disk = if seen.pressure.disk {
        ("DiskPressure", true, "KubeletHasDiskPressure".to_owned(), "kubelet has disk pressure")
    } else {
        (
            "DiskPressure",
            false,
            "KubeletHasNoDiskPressure".to_owned(),
            "kubelet has no disk pressure",
        )
    };
    let ready = seen.not_ready.is_empty();
    let (reason, message) = if ready {
        ("KubeletReady", "kubelet is posting ready status".to_owned())
    } else {
        ("KubeletNotReady", seen.not_ready.join(", "))
    };
    let own = [
        pressure("MemoryPressure", seen.pressure.memory, "Memory", "memory"),
        (disk.0, disk.1, disk.2, disk.3.to_owned()),
        pressure("PIDPressure", seen.pressure.pid, "PID", "PID"),
        ("Ready", ready, reason.to_owned(), message),
    ];
    let old = previous.conditions.clone().unwrap_or_default();
    let mut conditions = old.clone();
    for (type_, holds, reason, message) in own {
        let status = if holds { "True" } else { "False" };
        let before = old.iter().find(|c| c.type_ == type_);
        let since =
            before.filter(|c| c.status == status).and_then(|c| c.last_transition_time.clone());
        let condition = NodeCondition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: Some(reason),
            message: Some(message),
            last_heartbeat_time: Some(Time(whole_seconds(now))),
            last_transition_time: since.or_else(|| Some(Time(whole_seconds(now)))),
        };
        match conditions.iter_mut().find(|c| c.type_ == type_) {
            Some(place) => *place = condition,
            None => conditions.push(condition),
        }
    }
    conditions
}

/// The API stores times in seconds; anything finer would look like a change for ever.
fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

fn declared_features(previous: &NodeStatus) -> Vec<String> {
    let others = previous.declared_features.iter().flatten().cloned();
    let features: BTreeSet<String> = others.chain([WEBSOCKET_FEATURE.to_owned()]).collect();
    features.into_iter().collect()
}

/// The largest images first, as the scheduler wants to know them.
fn images(images: &[NodeImage], at_most: Option<usize>) -> Vec<ContainerImage> {
    let mut images: Vec<&NodeImage> = images.iter().filter(|i| !i.names.is_empty()).collect();
    images.sort_by(|a, b| b.size_bytes.cmp(&a.size_bytes).then_with(|| a.names.cmp(&b.names)));
    images.truncate(at_most.unwrap_or(usize::MAX));
    let image = |image: &NodeImage| ContainerImage {
        names: Some(image.names.iter().take(5).cloned().collect()),
        size_bytes: i64::try_from(image.size_bytes).ok(),
    };
    images.into_iter().map(image).collect()
}

fn node_info(seen: &Observation) -> NodeSystemInfo {
    let machine = &seen.machine;
    NodeSystemInfo {
        architecture: machine.architecture.to_owned(),
        boot_id: machine.boot_id.clone(),
        container_runtime_version: seen.runtime_version.clone(),
        kernel_version: machine.kernel_version.clone(),
        kube_proxy_version: String::new(),
        kubelet_version: KUBELET_VERSION.to_owned(),
        machine_id: machine.machine_id.clone(),
        operating_system: "linux".to_owned(),
        os_image: machine.os_image.clone(),
        swap: None,
        system_uuid: machine.system_uuid.clone(),
    }
}
