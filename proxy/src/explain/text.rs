//! Explanations as text. Pure.

use crate::backend::{BackendConfig, Difference, Mode};
use crate::ebpf::is_direct;
use crate::model::{
    At, Family, Frontend, Masquerade, PortPlan, Route, Scope, ServiceKey, ServicePlan, Target,
    Verdict,
};
use crate::trace::{Fate, Packet, Trace};

/// Differences that are shown one by one.
const SHOWN: usize = 20;

/// Frontends and endpoints of a Service.
pub(super) fn service(
    service: &ServiceKey,
    plan: &ServicePlan,
    backend: &BackendConfig,
    verdicts: &[Verdict],
) -> String {
    let mut out = Vec::new();
    out.push(format!("Service {service}"));
    for port in &plan.ports {
        let name = if port.name.is_empty() { "without a name" } else { &*port.name };
        let family = if port.family == Family::V4 { "IPv4" } else { "IPv6" };
        out.push(format!("\nPort {name}, {}, {family}", port.protocol));
        let direct = is_direct(backend, port.protocol);
        for frontend in &port.frontends {
            let is_cluster_ip = |at| matches!(at, At::Address(ip) if plan.guarded.contains(&ip));
            let direct = direct && !is_cluster_ip(frontend.key.at);
            let way = describe(port, frontend, direct);
            out.push(format!("  {:<32} -> {way}", frontend.key.to_string()));
        }
        if port.frontends.is_empty() {
            out.push("  no address: another Service has what this one asks for".to_owned());
        }
        if let Some(secs) = port.affinity_secs {
            out.push(format!("  clients stick to an endpoint for {secs} s"));
        }
        let mine = verdicts.iter().filter(|verdict| {
            let family = Family::of(verdict.endpoint.address);
            (&*verdict.port, verdict.protocol, family) == (&*port.name, port.protocol, port.family)
        });
        let mut none = true;
        for verdict in mine {
            none = false;
            let here = if verdict.here { "here" } else { "" };
            let endpoint = verdict.endpoint.to_string();
            out.push(format!("  endpoint {endpoint:<24} {here:<4} {}", verdict.reason));
        }
        if none {
            out.push("  no slice has an endpoint for this port".to_owned());
        }
    }
    for address in &plan.guarded {
        out.push(format!("\nAny other port of {address} is refused."));
    }
    out.join("\n") + "\n"
}

/// `direct`: clients outside keep their address.
fn describe(port: &PortPlan, frontend: &Frontend, direct: bool) -> String {
    let mut text = match frontend.route {
        Route::Same { target, masquerade } => {
            let masquerade = match (target, masquerade) {
                (Target::Forward(_), Masquerade::Always) if direct => {
                    ", source replaced for pods and the node; others are answered directly"
                }
                (Target::Forward(_), Masquerade::Always) => ", source replaced by the node's",
                (Target::Forward(_), Masquerade::UnlessPod) => {
                    ", source replaced unless it is a pod"
                }
                _ => "",
            };
            format!("{}{masquerade}", goal(port, target))
        }
        Route::BySource { inside, outside } => {
            format!("pods and the node: {}; others: {}", goal(port, inside), goal(port, outside))
        }
    };
    if let Some(sources) = &frontend.sources {
        let ranges: Vec<String> = sources.iter().map(ToString::to_string).collect();
        match ranges.join(", ") {
            none if none.is_empty() => text += "; from nowhere: no source range can be read",
            ranges => text += &format!("; only from {ranges}"),
        }
    }
    text
}

fn goal(port: &PortPlan, target: Target) -> String {
    match target {
        Target::Forward(scope) => {
            let count = port.pool(scope).len();
            let plural = if count == 1 { "" } else { "s" };
            match scope {
                Scope::Cluster => format!("{count} endpoint{plural}"),
                Scope::Local => format!("{count} endpoint{plural} on this node"),
            }
        }
        Target::Reject => "refused: no endpoint is usable".to_owned(),
        Target::Drop => "dropped: policy Local, and no endpoint is here".to_owned(),
    }
}

/// The way of a packet.
pub(super) fn packet(packet: &Packet, trace: &Trace) -> String {
    let mut out = Vec::new();
    let through = match &packet.interface {
        Some(interface) => format!(" through {interface}"),
        None => String::new(),
    };
    let to = std::net::SocketAddr::new(packet.destination, packet.port);
    out.push(format!("Packet from {}{through} to {to}/{}", packet.source, packet.protocol));
    for step in &trace.steps {
        out.push(format!("  {step}"));
    }
    match &trace.fate {
        Fate::Untouched => out.push("=> not touched by Services".to_owned()),
        Fate::Rejected => out.push("=> refused".to_owned()),
        Fate::Dropped => out.push("=> dropped".to_owned()),
        Fate::Forwarded { to, masqueraded, affinity_secs } => {
            let mut how =
                if *masqueraded { "source replaced by the node's" } else { "source kept" }
                    .to_owned();
            if to.iter().any(|endpoint| endpoint.address == packet.source) {
                how += ", replaced when it meets itself";
            }
            out.push(format!("=> forwarded, {how}, to one of"));
            for endpoint in to {
                out.push(format!("     {endpoint}"));
            }
            if let Some(secs) = affinity_secs {
                out.push(format!("   and to the same again within {secs} s"));
            }
        }
    }
    out.join("\n") + "\n"
}

/// What the kernel has for a Service.
pub(super) fn details(lines: &[String]) -> String {
    let mut out = String::new();
    if !lines.is_empty() {
        out += "\nThere:\n";
    }
    lines.iter().for_each(|line| out += &format!("  {line}\n"));
    out
}

/// Whether the kernel is as planned, as far as `service` and what all share are concerned.
pub(super) fn kernel(
    mode: Mode,
    differences: &[Difference],
    service: Option<&ServiceKey>,
) -> String {
    let mut out = Vec::new();
    let concerns =
        |found: &&Difference| found.service.is_none() || found.service.as_ref() == service;
    let mine: Vec<&Difference> = differences.iter().filter(concerns).collect();
    let others = differences.len() - mine.len();
    if mine.is_empty() {
        out.push(format!("\nThe kernel ({mode}) has exactly that."));
    } else {
        out.push(format!("\nThe kernel ({mode}) DIFFERS:"));
        for difference in mine.iter().take(SHOWN) {
            out.push(format!("  {}", difference.what));
        }
        if mine.len() > SHOWN {
            out.push(format!("  and {} more", mine.len() - SHOWN));
        }
    }
    if others > 0 {
        out.push(format!("Other Services: {others} differences."));
    }
    out.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use serde_json::json;

    use super::*;
    use crate::backend::PodSources;
    use crate::diff::{Plans, advance};
    use crate::ebpf::Forwarding;
    use crate::model::{Model, NodeFacts, Protocol};
    use crate::trace::{Ground, trace};

    /// Of the Service `web`.
    fn slice(endpoints: &serde_json::Value) -> serde_json::Value {
        json!({
            "metadata": {
                "namespace": "ns", "name": "web-1",
                "labels": {"kubernetes.io/service-name": "web"},
            },
            "addressType": "IPv4",
            "ports": [{"name": "", "port": 8080}],
            "endpoints": endpoints,
        })
    }

    fn model() -> Model {
        let mut model = Model::new(NodeFacts {
            name: "here".to_owned(),
            zone: Some("a".to_owned()),
            knows_pods: true,
            ..NodeFacts::default()
        });
        let service = json!({
            "metadata": {"namespace": "ns", "name": "web"},
            "spec": {
                "type": "NodePort", "clusterIP": "10.96.0.1", "externalTrafficPolicy": "Local",
                "sessionAffinity": "ClientIP", "ports": [{"port": 80, "nodePort": 30080}],
            },
        });
        model.apply_service(&serde_json::from_value(service).unwrap());
        let slice = slice(&json!([
            {"addresses": ["10.0.0.1"], "hints": {"forZones": [{"name": "a"}]}},
            {"addresses": ["10.0.0.2"], "hints": {"forZones": [{"name": "b"}]}},
            {"addresses": ["10.0.0.3"], "nodeName": "here", "conditions": {"ready": false}},
        ]));
        model.apply_slice(&serde_json::from_value(slice).unwrap());
        model
    }

    #[test]
    fn a_service_is_shown_with_every_endpoint_and_its_reason() {
        let model = model();
        let key = ServiceKey::new("ns", "web");
        let text = service(
            &key,
            &model.plan(&key).unwrap(),
            &BackendConfig::default(),
            &model.explain_endpoints(&key),
        );
        expect![[r#"
            Service ns/web

            Port without a name, tcp, IPv4
              10.96.0.1:80/tcp                 -> 1 endpoint, source replaced unless it is a pod
              node port 30080/tcp              -> pods and the node: 1 endpoint; others: dropped: policy Local, and no endpoint is here
              clients stick to an endpoint for 10800 s
              endpoint 10.0.0.1:8080                 used: ready
              endpoint 10.0.0.2:8080                 left out: its hints name other zones
              endpoint 10.0.0.3:8080            here left out: not ready

            Any other port of 10.96.0.1 is refused.
        "#]].assert_eq(&text);
    }

    #[test]
    fn a_packet_is_followed_step_by_step() {
        let mut model = model();
        let mut plans = Plans::new();
        let dirty = model.take_dirty();
        advance(&mut plans, dirty, |key| model.plan(key));
        let pods = PodSources::Ranges(vec!["10.0.0.0/16".parse().unwrap()]);
        let config = BackendConfig { pods, ..BackendConfig::default() };
        let own = ["192.0.2.1".parse().unwrap()];
        let ground = Ground { config: &config, own: &own };
        let mut text = String::new();
        for (source, destination, port) in [
            ("10.0.0.9", "10.96.0.1", 80),
            ("198.51.100.9", "192.0.2.1", 30080),
            ("10.0.0.9", "10.96.0.1", 81),
            ("10.0.0.9", "192.0.2.9", 80),
        ] {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            let sent =
                Packet { source, interface: None, destination, protocol: Protocol::Tcp, port };
            text += &packet(&sent, &trace(&plans, ground, &sent));
        }
        expect![[r#"
            Packet from 10.0.0.9 to 10.96.0.1:80/tcp
              10.96.0.1:80/tcp belongs to ns/web
              the source 10.0.0.9 is a pod's
            => forwarded, source kept, to one of
                 10.0.0.1:8080
               and to the same again within 10800 s
            Packet from 198.51.100.9 to 192.0.2.1:30080/tcp
              192.0.2.1 is an address of this node that serves node ports
              node port 30080/tcp belongs to ns/web
              externalTrafficPolicy Local: 198.51.100.9 is from outside
              its traffic policy is Local and no endpoint is here
            => dropped
            Packet from 10.0.0.9 to 10.96.0.1:81/tcp
              10.96.0.1 is the ClusterIP of ns/web, which has no such port
            => refused
            Packet from 10.0.0.9 to 192.0.2.9:80/tcp
              no Service has 192.0.2.9 port 80
            => not touched by Services
        "#]]
        .assert_eq(&text);
    }

    #[test]
    fn direct_server_return_is_told_of_clients_outside() {
        let mut model = model();
        let service_object = json!({
            "metadata": {"namespace": "ns", "name": "web"},
            "spec": {
                "type": "NodePort", "clusterIP": "10.96.0.1",
                "ports": [{"port": 80, "nodePort": 30080}],
            },
        });
        model.apply_service(&serde_json::from_value(service_object).unwrap());
        let slice = slice(&json!([
            {"addresses": ["10.0.0.1"], "nodeName": "there"}, {"addresses": ["192.0.2.7"]},
        ]));
        model.apply_slice(&serde_json::from_value(slice).unwrap());
        let key = ServiceKey::new("ns", "web");
        let mut plans = Plans::new();
        advance(&mut plans, model.take_dirty(), |key| model.plan(key));
        let pods = PodSources::Ranges(vec!["10.0.0.0/16".parse().unwrap()]);
        let mut config = BackendConfig { pods, ..BackendConfig::default() };
        config.ebpf.forwarding = Forwarding::Hybrid;
        let own = ["192.0.2.1".parse().unwrap()];
        let mut text = service(&key, &plans[&key], &config, &[]);
        for source in ["198.51.100.9", "10.0.0.9"] {
            let sent = Packet {
                source: source.parse().unwrap(),
                interface: None,
                destination: own[0],
                protocol: Protocol::Tcp,
                port: 30080,
            };
            text += &packet(&sent, &trace(&plans, Ground { config: &config, own: &own }, &sent));
        }
        expect![[r#"
            Service ns/web

            Port without a name, tcp, IPv4
              10.96.0.1:80/tcp                 -> 2 endpoints, source replaced unless it is a pod
              node port 30080/tcp              -> 2 endpoints, source replaced for pods and the node; others are answered directly
              no slice has an endpoint for this port

            Any other port of 10.96.0.1 is refused.
            Packet from 198.51.100.9 to 192.0.2.1:30080/tcp
              192.0.2.1 is an address of this node that serves node ports
              node port 30080/tcp belongs to ns/web
              direct server return: 198.51.100.9 is from outside, and the endpoint's node answers it
              endpoints that are on no node see this node's address instead
            => forwarded, source kept, to one of
                 10.0.0.1:8080
                 192.0.2.7:8080
            Packet from 10.0.0.9 to 192.0.2.1:30080/tcp
              192.0.2.1 is an address of this node that serves node ports
              node port 30080/tcp belongs to ns/web
            => forwarded, source replaced by the node's, to one of
                 10.0.0.1:8080
                 192.0.2.7:8080
        "#]].assert_eq(&text);
    }

    #[test]
    fn the_kernels_state_is_said_in_a_line_unless_it_differs() {
        let of = |name: &str| Difference {
            service: Some(ServiceKey::new("ns", name)),
            what: format!("missing for {name}"),
        };
        let web = ServiceKey::new("ns", "web");
        let all = [of("web"), of("other")];
        let text = kernel(Mode::Nftables, &all[1..], Some(&web))
            + &kernel(Mode::Nftables, &all, Some(&web));
        expect![[r#"

            The kernel (nftables) has exactly that.
            Other Services: 1 differences.

            The kernel (nftables) DIFFERS:
              missing for web
            Other Services: 1 differences.
        "#]]
        .assert_eq(&text);
    }
}
