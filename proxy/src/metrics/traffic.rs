//! What the kernel has counted, as metrics. Pure.

use std::cmp::Reverse;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::add;
use crate::backend::{Counted, PortTraffic, Traffic};
use crate::model::Protocol;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PortLabel {
    namespace: String,
    service: String,
    port: String,
    protocol: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

impl PortLabel {
    fn of(port: &PortTraffic) -> Self {
        let (namespace, service) = port.service.parts();
        PortLabel {
            namespace: namespace.to_owned(),
            service: service.to_owned(),
            port: port.port.to_string(),
            protocol: match port.protocol {
                Protocol::Tcp => "TCP",
                Protocol::Udp => "UDP",
                Protocol::Sctp => "SCTP",
            },
        }
    }
}

/// The text of metrics that Prometheus reads, without its end. At most `limit` Service ports are shown, those with the
/// most traffic; the order of two changes seldom, since counters only grow.
pub(crate) fn text(counted: Counted, limit: usize) -> String {
    let Counted { mut ports, drops } = counted;
    ports.retain(|port| port.traffic != Traffic::default());
    let size = |port: &PortTraffic| {
        let Traffic { connections, packets, refused, .. } = port.traffic;
        connections.saturating_add(packets).saturating_add(refused)
    };
    ports.sort_by_cached_key(|port| (Reverse(size(port)), port.service.clone(), port.port.clone()));
    let omitted = Gauge::<i64>::default();
    omitted.set(i64::try_from(ports.len().saturating_sub(limit)).unwrap_or(i64::MAX));
    ports.truncate(limit);
    let mut registry = Registry::with_prefix("keelson_proxy");
    register_ports(&mut registry, &ports);
    let help = "Service ports with traffic that are not shown, since there are more than --ebpf-service-metrics";
    add(&mut registry, "service_ports_omitted", help, &omitted);
    let dropped = Family::<ReasonLabel, Counter>::default();
    for (reason, count) in drops {
        dropped.get_or_create(&ReasonLabel { reason }).inc_by(count);
    }
    add(&mut registry, "dropped_packets", "Packets that were dropped", &dropped);
    let mut text = String::new();
    match encode_registry(&mut text, &registry) {
        Ok(()) => text,
        Err(error) => format!("# cannot encode metrics: {error}\n"),
    }
}

fn register_ports(registry: &mut Registry, ports: &[PortTraffic]) {
    let mut register = |name: &str, help: &str, of: fn(&Traffic) -> u64| {
        let family = Family::<PortLabel, Counter>::default();
        for port in ports {
            family.get_or_create(&PortLabel::of(port)).inc_by(of(&port.traffic));
        }
        add(registry, name, help, &family);
    };
    let help =
        "Connections that were given an endpoint: TCP, SCTP, flows of UDP, connected UDP sockets";
    register("service_connections", help, |traffic| traffic.connections);
    let help = "Connections that were refused or dropped";
    register("service_refused", help, |traffic| traffic.refused);
    let help = "Translated packets, both ways; those of sockets that were translated themselves are not seen";
    register("service_packets", help, |traffic| traffic.packets);
    register("service_bytes", "Bytes of these packets", |traffic| traffic.bytes);
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::model::ServiceKey;

    fn port(name: &str, connections: u64) -> PortTraffic {
        PortTraffic {
            service: ServiceKey::new("ns", name),
            port: "http".into(),
            protocol: Protocol::Tcp,
            traffic: Traffic { connections, packets: 2, bytes: 80, refused: 1 },
        }
    }

    #[test]
    fn each_port_has_its_series() {
        let idle = PortTraffic { traffic: Traffic::default(), ..port("idle", 0) };
        let counted =
            Counted { ports: vec![port("web", 7), idle], drops: vec![("source_ranges", 3)] };
        expect![[r##"
            # HELP keelson_proxy_service_connections Connections that were given an endpoint: TCP, SCTP, flows of UDP, connected UDP sockets.
            # TYPE keelson_proxy_service_connections counter
            keelson_proxy_service_connections_total{namespace="ns",service="web",port="http",protocol="TCP"} 7
            # HELP keelson_proxy_service_refused Connections that were refused or dropped.
            # TYPE keelson_proxy_service_refused counter
            keelson_proxy_service_refused_total{namespace="ns",service="web",port="http",protocol="TCP"} 1
            # HELP keelson_proxy_service_packets Translated packets, both ways; those of sockets that were translated themselves are not seen.
            # TYPE keelson_proxy_service_packets counter
            keelson_proxy_service_packets_total{namespace="ns",service="web",port="http",protocol="TCP"} 2
            # HELP keelson_proxy_service_bytes Bytes of these packets.
            # TYPE keelson_proxy_service_bytes counter
            keelson_proxy_service_bytes_total{namespace="ns",service="web",port="http",protocol="TCP"} 80
            # HELP keelson_proxy_service_ports_omitted Service ports with traffic that are not shown, since there are more than --ebpf-service-metrics.
            # TYPE keelson_proxy_service_ports_omitted gauge
            keelson_proxy_service_ports_omitted 0
            # HELP keelson_proxy_dropped_packets Packets that were dropped.
            # TYPE keelson_proxy_dropped_packets counter
            keelson_proxy_dropped_packets_total{reason="source_ranges"} 3
        "##]].assert_eq(&text(counted, 10));
    }

    #[test]
    fn beyond_the_limit_the_busiest_are_shown() {
        let counted = Counted {
            ports: vec![port("quiet", 1), port("busy", 9), port("quieter", 0)],
            drops: Vec::new(),
        };
        let text = text(counted, 1);
        assert!(text.contains("service=\"busy\""), "{text}");
        assert!(!text.contains("quiet"), "{text}");
        assert!(text.contains("keelson_proxy_service_ports_omitted 2\n"), "{text}");
    }
}
