//! What each node has given away: kept up to date pod by pod, so that one decision costs nothing per running pod.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};

use super::resources::{Amounts, pod_request};

/// A host port that a pod holds: address (empty for all), protocol, port.
pub(crate) type HostPort = (String, String, i32);

/// One node with the sum of what its pods hold.
#[derive(Debug, Clone, Default)]
pub(crate) struct NodeLoad {
    /// The node object, once it has been seen. Pods may be known before their node is.
    pub(crate) node: Option<Arc<Node>>,
    /// What the node offers to pods.
    pub(crate) allocatable: Amounts,
    /// What its pods have reserved.
    pub(crate) requested: Amounts,
    /// How many pods it carries that have not ended.
    pub(crate) pods: usize,
    /// The host ports in use.
    pub(crate) ports: Vec<HostPort>,
}

#[derive(Debug, Clone)]
struct Held {
    node: String,
    request: Amounts,
    ports: Vec<HostPort>,
}

/// All nodes and what they carry, by observation or by assumption.
///
/// A pod is assumed on its node from the decision until its binding is seen (or fails), so that a burst of pods
/// cannot be promised the same room twice.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    nodes: BTreeMap<String, NodeLoad>,
    pods: HashMap<String, Held>,
}

impl Ledger {
    /// The nodes that exist.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = (&str, &NodeLoad)> {
        self.nodes
            .iter()
            .filter(|(_, load)| load.node.is_some())
            .map(|(name, load)| (name.as_str(), load))
    }

    /// Records a node as it is now, or its absence.
    pub(crate) fn observe_node(&mut self, name: &str, node: Option<Arc<Node>>) {
        let load = self.nodes.entry(name.to_owned()).or_default();
        let status = node.as_ref().and_then(|node| node.status.as_ref());
        load.allocatable = Amounts::from_list(
            status.and_then(|status| status.allocatable.as_ref().or(status.capacity.as_ref())),
        );
        load.node = node;
        self.drop_if_empty(name);
    }

    /// Records a pod as it is now; returns whether room became free.
    pub(crate) fn observe_pod(&mut self, key: &str, pod: Option<&Pod>) -> bool {
        let holder = pod.filter(|pod| !has_ended(pod)).and_then(|pod| Some((pod, node_of(pod)?)));
        match holder {
            Some((pod, node)) => {
                self.hold(key, pod, node);
                false
            }
            // A pod without a node may be one that was just assumed: its own old state must not undo that.
            None if pod.is_some_and(|pod| !has_ended(pod)) => false,
            None => self.release(key),
        }
    }

    /// Reserves room for a pod that is about to be bound.
    pub(crate) fn assume(&mut self, key: &str, pod: &Pod, node: &str) {
        self.hold(key, pod, node);
    }

    /// Gives the room of a pod back; returns whether it held any.
    pub(crate) fn release(&mut self, key: &str) -> bool {
        let Some(held) = self.pods.remove(key) else { return false };
        if let Some(load) = self.nodes.get_mut(&held.node) {
            load.requested.subtract(&held.request);
            load.pods -= 1;
            for port in &held.ports {
                if let Some(at) = load.ports.iter().position(|used| used == port) {
                    load.ports.swap_remove(at);
                }
            }
        }
        self.drop_if_empty(&held.node);
        true
    }

    fn hold(&mut self, key: &str, pod: &Pod, node: &str) {
        self.release(key);
        let held =
            Held { node: node.to_owned(), request: pod_request(pod), ports: host_ports(pod) };
        let load = self.nodes.entry(held.node.clone()).or_default();
        load.requested.add(&held.request);
        load.pods += 1;
        load.ports.extend(held.ports.iter().cloned());
        self.pods.insert(key.to_owned(), held);
    }

    fn drop_if_empty(&mut self, name: &str) {
        if self.nodes.get(name).is_some_and(|load| load.node.is_none() && load.pods == 0) {
            self.nodes.remove(name);
        }
    }
}

/// The host ports that a pod asks for.
pub(crate) fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let containers = pod.spec.iter().flat_map(|spec| {
        let sidecars = spec.init_containers.iter().flatten();
        spec.containers.iter().chain(sidecars.filter(|init| init.restart_policy.is_some()))
    });
    containers
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            let address = match port.host_ip.as_deref() {
                None | Some("" | "0.0.0.0" | "::") => String::new(),
                Some(address) => address.to_owned(),
            };
            Some((address, port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), number))
        })
        .collect()
}

/// Whether a pod has run to its end and so holds nothing any more.
pub(crate) fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The node that a pod is bound to.
pub(crate) fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}
