//! The endpoints that a Service should have: pure, one address family at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::controllers::pods::{has_ended, is_deleting, is_ready};
use crate::controllers::selector::contains;

/// The ports of a slice. Pods whose named ports have different numbers need slices of their own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) protocol: String,
    pub(crate) number: i32,
    pub(crate) app_protocol: Option<String>,
}

impl Port {
    pub(crate) fn to_slice_port(&self) -> EndpointPort {
        EndpointPort {
            name: Some(self.name.clone()),
            protocol: Some(self.protocol.clone()),
            port: Some(self.number),
            app_protocol: self.app_protocol.clone(),
        }
    }
}

/// Endpoints by the ports that they offer.
pub(crate) type ByPorts = BTreeMap<Vec<Port>, Vec<Endpoint>>;

/// The address families (`IPv4`, `IPv6`) of a Service. Empty for one without addresses of its own to follow.
pub(crate) fn families(service: &Service) -> Vec<String> {
    let Some(spec) = &service.spec else { return Vec::new() };
    if let Some(families) = spec.ip_families.clone().filter(|families| !families.is_empty()) {
        return families;
    }
    let v6 = spec.cluster_ip.as_deref().is_some_and(|address| address.contains(':'));
    vec![if v6 { "IPv6" } else { "IPv4" }.to_owned()]
}

/// Whether the Service has no address of its own.
pub(crate) fn is_headless(service: &Service) -> bool {
    let address = service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref());
    address == Some("None")
}

/// The selector of a Service that has one. Without it, and for names of other hosts, nothing is to be done.
pub(crate) fn pod_selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    let spec = service.spec.as_ref()?;
    let external = spec.type_.as_deref() == Some("ExternalName");
    spec.selector.as_ref().filter(|selector| !selector.is_empty() && !external)
}

/// Whether the Service selects the pod.
pub(crate) fn is_selected(service: &Service, pod: &Pod) -> bool {
    pod_selector(service).is_some_and(|selector| {
        pod.metadata.labels.as_ref().is_some_and(|labels| contains(labels, selector))
    })
}

/// All endpoints of one family.
pub(crate) fn endpoints(
    service: &Service,
    family: &str,
    pods: &[Arc<Pod>],
    node: impl Fn(&str) -> Option<Arc<Node>>,
) -> ByPorts {
    let mut found = ByPorts::new();
    for pod in pods.iter().filter(|pod| is_selected(service, pod) && !has_ended(pod)) {
        let Some(address) = address(pod, family) else { continue };
        let ports = ports(service, pod);
        if ports.is_empty() && !is_headless(service) {
            continue;
        }
        let node_name = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        let node = node_name.and_then(&node);
        found.entry(ports).or_default().push(endpoint(service, pod, address, node.as_deref()));
    }
    for endpoints in found.values_mut() {
        endpoints.sort_by(|one, other| one.addresses.cmp(&other.addresses));
    }
    found
}

/// The pod's address of a family.
pub(crate) fn address<'a>(pod: &'a Pod, family: &str) -> Option<&'a str> {
    let status = pod.status.as_ref()?;
    let listed = status.pod_ips.iter().flatten().map(|address| address.ip.as_str());
    let mut all = listed.chain(status.pod_ip.as_deref()).filter(|address| !address.is_empty());
    all.find(|address| address.contains(':') == (family == "IPv6"))
}

/// The Service's ports as this pod offers them. A named port that the pod does not have is left out.
pub(crate) fn ports(service: &Service, pod: &Pod) -> Vec<Port> {
    let wanted = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let mut ports: Vec<Port> = wanted
        .filter_map(|port| {
            Some(Port {
                name: port.name.clone().unwrap_or_default(),
                protocol: protocol(port.protocol.as_deref()).to_owned(),
                number: target(port, pod)?,
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect();
    ports.sort();
    ports
}

fn target(port: &ServicePort, pod: &Pod) -> Option<i32> {
    let name = match &port.target_port {
        None => return Some(port.port),
        Some(IntOrString::Int(0)) => return Some(port.port),
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod.spec.as_ref()?;
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|init| init.restart_policy.as_deref() == Some("Always"));
    let mut offered = spec
        .containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten());
    let wanted = protocol(port.protocol.as_deref());
    offered
        .find(|offer| {
            offer.name.as_ref() == Some(name) && protocol(offer.protocol.as_deref()) == wanted
        })
        .map(|offer| offer.container_port)
}

fn protocol(given: Option<&str>) -> &str {
    given.unwrap_or("TCP")
}

fn endpoint(service: &Service, pod: &Pod, address: &str, node: Option<&Node>) -> Endpoint {
    let spec = service.spec.as_ref();
    let publish = spec.and_then(|spec| spec.publish_not_ready_addresses) == Some(true);
    let serving = is_ready(pod);
    let terminating = is_deleting(pod);
    let ready = publish || (serving && !terminating);
    let labels = node.and_then(|node| node.metadata.labels.as_ref());
    let zone = labels.and_then(|labels| labels.get("topology.kubernetes.io/zone")).cloned();
    let node_name = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let distribution = spec.and_then(|spec| spec.traffic_distribution.as_deref());
    Endpoint {
        addresses: vec![address.to_owned()],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hints: hints(distribution, ready, zone.as_deref(), node_name.as_deref()),
        hostname: hostname(service, pod),
        node_name,
        target_ref: Some(target_ref(pod)),
        zone,
        ..Endpoint::default()
    }
}

/// Whom the endpoint should serve, when the Service asks for near ones.
fn hints(
    distribution: Option<&str>,
    ready: bool,
    zone: Option<&str>,
    node: Option<&str>,
) -> Option<EndpointHints> {
    let zones = |zone: &str| vec![ForZone { name: zone.to_owned() }];
    match distribution.filter(|_| ready)? {
        "PreferClose" | "PreferSameZone" => {
            Some(EndpointHints { for_zones: Some(zones(zone?)), for_nodes: None })
        }
        "PreferSameNode" => Some(EndpointHints {
            for_zones: zone.map(zones),
            for_nodes: Some(vec![ForNode { name: node?.to_owned() }]),
        }),
        _ => None,
    }
}

/// The pod's name in DNS, where its subdomain is this Service.
fn hostname(service: &Service, pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let ours =
        spec.subdomain.as_ref().is_some_and(|name| service.metadata.name.as_ref() == Some(name));
    spec.hostname.clone().filter(|name| ours && !name.is_empty())
}

pub(crate) fn target_ref(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".to_owned()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}
