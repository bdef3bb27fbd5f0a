//! From the configuration and the Node object to what model and backend must know about this node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use crate::backend::{BackendConfig, PodSources};
use crate::config::{LocalSources, NodePortAddresses, ProxyConfig};
use crate::model::objects::Node;
use crate::model::{NodeFacts, parse_address};

/// The autoscaler is about to remove the node: load balancers shall stop to send.
pub(crate) fn is_leaving(node: &Node) -> bool {
    const TAINT: &str = "ToBeDeletedByClusterAutoscaler";
    let tainted = node.spec.taints.iter().flatten().any(|taint| taint.key == TAINT);
    tainted || node.metadata.deletion_timestamp.is_some()
}

fn addresses(config: &ProxyConfig, node: Option<&Node>) -> Vec<IpAddr> {
    if !config.node_addresses.is_empty() {
        return config.node_addresses.clone();
    }
    let addresses = node.into_iter().flat_map(|node| node.status.addresses.iter().flatten());
    let ips = addresses.filter(|address| matches!(&*address.kind, "InternalIP" | "ExternalIP"));
    ips.filter_map(|address| parse_address(&address.address)).collect()
}

/// The node's first address of each family, as kube-proxy chooses it: an InternalIP before an ExternalIP. A family
/// without one has loopback only, because no range at all would mean everywhere.
fn primary(config: &ProxyConfig, node: Option<&Node>) -> Vec<IpAddr> {
    let configured = config.node_addresses.iter().copied();
    let of_kind = |kind: &'static str| {
        let addresses = node.into_iter().flat_map(|node| node.status.addresses.iter().flatten());
        let wanted = addresses.filter(move |address| *address.kind == *kind);
        wanted.filter_map(|address| parse_address(&address.address))
    };
    let candidates: Vec<IpAddr> = match config.node_addresses.is_empty() {
        false => configured.collect(),
        true => of_kind("InternalIP").chain(of_kind("ExternalIP")).collect(),
    };
    let first = |loopback: IpAddr| {
        let found = candidates.iter().copied().find(|ip| ip.is_ipv4() == loopback.is_ipv4());
        found.unwrap_or(loopback)
    };
    vec![first(Ipv4Addr::LOCALHOST.into()), first(Ipv6Addr::LOCALHOST.into())]
}

fn zone(node: &Node) -> Option<String> {
    const LABEL: &str = "topology.kubernetes.io/zone";
    node.metadata.labels.as_ref()?.get(LABEL).filter(|zone| !zone.is_empty()).cloned()
}

/// What the model must know.
pub(crate) fn facts(config: &ProxyConfig, node: Option<&Node>) -> NodeFacts {
    NodeFacts {
        name: config.node_name.clone(),
        addresses: addresses(config, node),
        zone: node.and_then(zone),
        knows_pods: pods(config, node) != PodSources::Unknown,
        masquerade_all: config.masquerade_all,
    }
}

fn pods(config: &ProxyConfig, node: Option<&Node>) -> PodSources {
    match &config.local_sources {
        LocalSources::Unknown => PodSources::Unknown,
        LocalSources::Cidrs(cidrs) => PodSources::Ranges(cidrs.clone()),
        LocalSources::NodeCidrs => {
            let cidrs = node.into_iter().flat_map(|node| node.spec.pod_cidrs.iter().flatten());
            let ranges: Vec<IpNetwork> = cidrs.filter_map(|cidr| cidr.parse().ok()).collect();
            if ranges.is_empty() { PodSources::Unknown } else { PodSources::Ranges(ranges) }
        }
        LocalSources::Bridge(name) => PodSources::Bridge(name.clone()),
        LocalSources::InterfacePrefix(prefix) => PodSources::InterfacePrefix(prefix.clone()),
    }
}

/// What the backend must know; `service_ranges` come from the ServiceCIDR objects.
pub(crate) fn backend_config(
    config: &ProxyConfig,
    node: Option<&Node>,
    service_ranges: Vec<IpNetwork>,
) -> BackendConfig {
    let node_port_ranges = match &config.node_port_addresses {
        NodePortAddresses::All => Vec::new(),
        NodePortAddresses::Ranges(ranges) => ranges.clone(),
        NodePortAddresses::Primary => {
            primary(config, node).into_iter().map(IpNetwork::from).collect()
        }
    };
    BackendConfig {
        pods: pods(config, node),
        node_port_ranges,
        localhost_node_ports: config.localhost_node_ports,
        service_ranges,
        masquerade_bit: config.masquerade_bit,
        ipvs: config.ipvs.clone(),
        ebpf: config.ebpf.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_node_object_tells_zone_addresses_pods_and_that_it_leaves() {
        let mut node: Node = serde_json::from_value(json!({
            "metadata": {"name": "n", "labels": {"topology.kubernetes.io/zone": "a"}},
            "spec": {"podCIDRs": ["10.1.0.0/24", "fd01::/64"]},
            "status": {"addresses": [
                {"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "192.0.2.7"},
            ]},
        }))
        .unwrap();
        let config =
            ProxyConfig { local_sources: LocalSources::NodeCidrs, ..ProxyConfig::default() };
        let found = facts(&config, Some(&node));
        assert_eq!(found.zone.as_deref(), Some("a"));
        assert!(found.knows_pods);
        let backend = backend_config(&config, Some(&node), Vec::new());
        assert_eq!(backend.pods.ranges().len(), 2);
        let ranges = ["192.0.2.7/32", "::1/128"].map(|range| range.parse().unwrap());
        assert_eq!(backend.node_port_ranges, ranges);
        // An address that the cluster knows the node by is not one where node ports are.
        node.status.addresses = serde_json::from_value(json!([
            {"type": "ExternalIP", "address": "2001:db8::9"}, {"type": "ExternalIP", "address": "203.0.113.7"},
            {"type": "InternalIP", "address": "192.0.2.7"}, {"type": "InternalIP", "address": "192.168.50.5"},
            {"type": "InternalIP", "address": "2001:db8::7"},
        ]))
        .unwrap();
        assert_eq!(
            backend_config(&config, Some(&node), Vec::new()).node_port_ranges,
            ["192.0.2.7/32", "2001:db8::7/128"].map(|range| range.parse().unwrap())
        );
        assert_eq!(facts(&config, Some(&node)).addresses.len(), 5);
        let unknown = backend_config(&config, None, Vec::new()).node_port_ranges;
        assert_eq!(unknown, ["127.0.0.1/32", "::1/128"].map(|range| range.parse().unwrap()));
        // Without a Node nobody knows: then pods are not known rather than everybody being one.
        assert!(!facts(&config, None).knows_pods);
        assert!(!is_leaving(&node));
        node.spec.taints = Some(vec![crate::model::objects::Taint {
            key: "ToBeDeletedByClusterAutoscaler".to_owned(),
        }]);
        assert!(is_leaving(&node));
    }
}
