//! Nodes: whether they live, what that means for their pods, and which pod addresses they get.

mod cidr;
mod eviction;
mod health;
mod lifecycle;
mod pod_gc;

pub(crate) use self::cidr::{NodeCidrs, Range};
pub(crate) use self::lifecycle::NodeLifecycle;
pub(crate) use self::pod_gc::PodCollection;

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use super::cluster::Cluster;

/// The node that a pod is bound to.
fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

/// The pods that are bound to a node.
fn pods_on(cluster: &Cluster, node: &str) -> Vec<Arc<Pod>> {
    let mut pods = cluster.pods.all();
    pods.retain(|pod| node_of(pod) == Some(node));
    pods
}
