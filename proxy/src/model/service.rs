//! From a Service object to the facts that count. Bad fields are named and left out; the rest works.

use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::IpNetwork;

use super::objects::{LoadBalancerIngress, Service, ServicePort as ServicePortObject};
use super::plan::{Family, Protocol};

const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
const DEFAULT_AFFINITY_SECS: u32 = 10_800;

/// A Service that needs programming.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServiceFacts {
    /// Seconds since the epoch; the older of two Services that claim the same port wins.
    pub(crate) created: i64,
    pub(crate) cluster_ips: Box<[IpAddr]>,
    pub(crate) external_ips: Box<[IpAddr]>,
    pub(crate) load_balancer_ips: Box<[IpAddr]>,
    pub(crate) source_ranges: SourceRanges,
    pub(crate) ports: Box<[PortFacts]>,
    pub(crate) affinity_secs: Option<u32>,
    pub(crate) external_local: bool,
    pub(crate) internal_local: bool,
    /// Where load balancers ask whether endpoints are here.
    pub(crate) health_check_port: Option<u16>,
}

/// spec.loadBalancerSourceRanges. A range that cannot be read must not open the Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SourceRanges {
    pub(crate) readable: Box<[IpNetwork]>,
    pub(crate) some_unreadable: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortFacts {
    pub(crate) name: Box<str>,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
    pub(crate) node_port: Option<u16>,
}

impl ServiceFacts {
    pub(crate) fn cluster_ip(&self, family: Family) -> Option<IpAddr> {
        self.cluster_ips.iter().copied().find(|ip| Family::of(*ip) == family)
    }
}

/// The facts, or nothing when the Service is none of a proxy's business; and what was wrong with it.
pub(crate) fn read_service(service: &Service) -> (Option<ServiceFacts>, Vec<String>) {
    let mut problems = Vec::new();
    if is_ignored(service) {
        return (None, problems);
    }
    let spec = &service.spec;
    let cluster_ips = cluster_ips(service, &mut problems);
    if cluster_ips.is_empty() {
        return (None, problems);
    }
    let external_ips = addresses("spec.externalIPs", spec.external_ips.as_deref(), &mut problems);
    let ports = spec.ports.iter().flatten().enumerate();
    let facts = ServiceFacts {
        created: service.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        cluster_ips: cluster_ips.into(),
        external_ips: external_ips.into(),
        load_balancer_ips: load_balancer_ips(service, &mut problems).into(),
        source_ranges: source_ranges(service, &mut problems),
        ports: ports.filter_map(|(index, port)| read_port(index, port, &mut problems)).collect(),
        affinity_secs: affinity_secs(service),
        external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        health_check_port: health_check_port(service, &mut problems),
    };
    (Some(facts), problems)
}

fn is_ignored(service: &Service) -> bool {
    let labels = service.metadata.labels.as_ref();
    let foreign = labels.is_some_and(|labels| labels.contains_key(PROXY_NAME_LABEL));
    let headless = matches!(service.spec.cluster_ip.as_deref(), None | Some("" | "None"));
    foreign || headless || service.spec.kind.as_deref() == Some("ExternalName")
}

/// `spec.clusterIPs`, or where an old API server does not know it, `spec.clusterIP`.
fn cluster_ips(service: &Service, problems: &mut Vec<String>) -> Vec<IpAddr> {
    let spec = &service.spec;
    match spec.cluster_ips.as_deref() {
        Some(several) if !several.is_empty() => {
            addresses("spec.clusterIPs", Some(several), problems)
        }
        _ => addresses(
            "spec.clusterIP",
            spec.cluster_ip.as_ref().map(std::slice::from_ref),
            problems,
        ),
    }
}

fn addresses(field: &str, texts: Option<&[String]>, problems: &mut Vec<String>) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for (index, text) in texts.unwrap_or_default().iter().enumerate() {
        match parse_address(text) {
            Some(address) => found.push(address),
            None => problems.push(format!("{field}[{index}]: {text:?} is not an IP address")),
        }
    }
    found
}

/// As Kubernetes reads addresses: leading zeros in IPv4 are decimal, and a mapped IPv4 is an IPv4.
pub fn parse_address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address.to_canonical());
    }
    let parts: Vec<u8> = text
        .split('.')
        .map(|part| {
            let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| part.parse().ok()).flatten()
        })
        .collect::<Option<_>>()?;
    <[u8; 4]>::try_from(parts).ok().map(|octets| IpAddr::V4(Ipv4Addr::from(octets)))
}

/// An ingress with another `ipMode` than VIP or with only a host name leads to a real load balancer.
fn load_balancer_ips(service: &Service, problems: &mut Vec<String>) -> Vec<IpAddr> {
    if service.spec.kind.as_deref() != Some("LoadBalancer") {
        return Vec::new();
    }
    let virtual_ip =
        |ingress: &&LoadBalancerIngress| matches!(ingress.ip_mode.as_deref(), None | Some("VIP"));
    let ingress = service.status.load_balancer.ingress.iter().flatten();
    let texts: Vec<String> =
        ingress.filter(virtual_ip).filter_map(|ingress| ingress.ip.clone()).collect();
    addresses("status.loadBalancer.ingress", Some(&texts), problems)
}

fn source_ranges(service: &Service, problems: &mut Vec<String>) -> SourceRanges {
    let mut readable = Vec::new();
    let mut some_unreadable = false;
    for (index, text) in service.spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        match text.trim().parse::<IpNetwork>() {
            Ok(range) => readable.push(range),
            Err(_) => {
                some_unreadable = true;
                problems.push(format!(
                    "spec.loadBalancerSourceRanges[{index}]: {text:?} is not a range such as 10.0.0.0/8; \
                     it admits nobody"
                ));
            }
        }
    }
    SourceRanges { readable: readable.into(), some_unreadable }
}

/// Only externalTrafficPolicy Local makes nodes differ, and so only it has such a port.
fn health_check_port(service: &Service, problems: &mut Vec<String>) -> Option<u16> {
    let spec = &service.spec;
    let balanced = spec.kind.as_deref() == Some("LoadBalancer")
        && spec.external_traffic_policy.as_deref() == Some("Local");
    let number = spec.health_check_node_port.filter(|number| balanced && *number != 0)?;
    let port = u16::try_from(number).ok();
    if port.is_none() {
        problems.push(format!("spec.healthCheckNodePort: {number} is not a port (1-65535)"));
    }
    port
}

fn affinity_secs(service: &Service) -> Option<u32> {
    let spec = &service.spec;
    (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec.session_affinity_config.as_ref();
        let configured = config.and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
        let secs = configured.and_then(|secs| u32::try_from(secs).ok()).filter(|secs| *secs > 0);
        secs.unwrap_or(DEFAULT_AFFINITY_SECS)
    })
}

fn read_port(
    index: usize,
    port: &ServicePortObject,
    problems: &mut Vec<String>,
) -> Option<PortFacts> {
    let Some(protocol) = Protocol::parse(port.protocol.as_deref()) else {
        let text = port.protocol.as_deref().unwrap_or_default();
        problems.push(format!("spec.ports[{index}].protocol: {text:?} is not TCP, UDP or SCTP"));
        return None;
    };
    let Some(number) = u16::try_from(port.port).ok().filter(|port| *port > 0) else {
        problems.push(format!("spec.ports[{index}].port: {} is not a port (1-65535)", port.port));
        return None;
    };
    let node_port = port.node_port.filter(|port| *port != 0).and_then(|node_port| {
        let valid = u16::try_from(node_port).ok();
        if valid.is_none() {
            problems
                .push(format!("spec.ports[{index}].nodePort: {node_port} is not a port (1-65535)"));
        }
        valid
    });
    let name = port.name.clone().unwrap_or_default().into_boxed_str();
    Some(PortFacts { name, protocol, port: number, node_port })
}
