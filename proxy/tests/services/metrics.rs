//! What the proxy counts: under kube-proxy's names, and true.

use keelson_proxy::diff::advance;
use keelson_proxy::iptables::Variant;
use keelson_proxy::model::{At, Family, ServicePlan};
use serde_json::json;

use crate::stage::*;
use crate::world::{endpoint, node_object, service, spec, with_proxy};

rows![
    every_metric_that_kube_proxy_has_in_this_mode_is_there,
    rules_are_counted_as_the_kernel_has_them,
    refused_changes_are_counted_by_family,
];

/// kube-proxy 1.36, pkg/proxy/metrics: those of all modes.
const ALWAYS: &[&str] = &[
    "sync_proxy_rules_duration_seconds_bucket{le=\"0.001\",ip_family=\"IPv4\"}",
    "sync_proxy_rules_duration_seconds_bucket{le=\"16.384\",ip_family=\"IPv4\"}",
    "sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv4\"}",
    "sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv6\"}",
    "sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"}",
    "sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv6\"}",
    "sync_proxy_rules_endpoint_changes_pending 0",
    "sync_proxy_rules_endpoint_changes_total 2",
    "sync_proxy_rules_service_changes_pending 0",
    "sync_proxy_rules_service_changes_total 1",
    "proxy_healthz_total{code=\"200\"} 1",
    "proxy_livez_total{code=\"200\"} 1",
    "network_programming_duration_seconds_bucket{le=\"0.25\",ip_family=\"IPv4\"}",
    "network_programming_duration_seconds_bucket{le=\"59.0\",ip_family=\"IPv4\"}",
    "network_programming_duration_seconds_bucket{le=\"115.0\",ip_family=\"IPv4\"}",
    "network_programming_duration_seconds_bucket{le=\"300.0\",ip_family=\"IPv4\"}",
    "sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\",ip_family=\"IPv4\"} 0",
    "sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\",ip_family=\"IPv6\"} 0",
    "conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} 0",
];
/// Those of the modes nftables and iptables.
const FULL_AND_PARTIAL: &[&str] = &[
    "sync_full_proxy_rules_duration_seconds_bucket{le=\"0.001\",ip_family=\"IPv4\"}",
    "sync_partial_proxy_rules_duration_seconds_bucket{le=\"16.384\",ip_family=\"IPv4\"}",
];
const NFTABLES: &[&str] = &[
    "sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv4\"} 0",
    "sync_proxy_rules_nftables_cleanup_failures_total{ip_family=\"IPv6\"} 0",
];
const IPTABLES: &[&str] = &[
    "sync_proxy_rules_iptables_restore_failures_total{ip_family=\"IPv4\"} 0",
    "sync_proxy_rules_iptables_partial_restore_failures_total{ip_family=\"IPv6\"} 0",
    "sync_proxy_rules_iptables_total{table=\"nat\",ip_family=\"IPv4\"}",
    "sync_proxy_rules_iptables_total{table=\"filter\",ip_family=\"IPv6\"}",
    "sync_proxy_rules_iptables_last{table=\"nat\",ip_family=\"IPv4\"}",
    "sync_proxy_rules_iptables_last{table=\"filter\",ip_family=\"IPv6\"}",
];

/// Row 54.
fn every_metric_that_kube_proxy_has_in_this_mode_is_there(mode: Mode) {
    let mut node = Node::new(mode);
    node.backend = None;
    let client = node.pod("client", 10);
    let _server = node.pod("one", 2).serving("TCP", 8080);
    let folder = tempfile::tempdir().unwrap();
    let lists = json!({
        "services": [service("web", spec("10.96.0.1", 30080))],
        "endpointslices": [endpoint("web", "10.66.0.9")],
        "nodes": [node_object()],
    });
    with_proxy(&node, lists, folder.path(), |world| {
        world.tell("endpointslices", "MODIFIED", endpoint("web", "10.66.0.2"));
        crate::world::eventually("the change is in force", || {
            client.namespace.tcp("10.96.0.1:80").ok()
        });
        for path in ["/healthz", "/livez"] {
            node.namespace.get("127.0.0.1:10256", path);
        }
        let text = node.namespace.get("127.0.0.1:10249", "/metrics");
        let (own, other) = match mode {
            Mode::Iptables(_) => (IPTABLES, NFTABLES),
            Mode::Nftables | Mode::Ipvs => (NFTABLES, IPTABLES),
            Mode::Ebpf => (&[][..], NFTABLES),
        };
        for name in ALWAYS.iter().chain(FULL_AND_PARTIAL).chain(own) {
            assert!(text.contains(&format!("\nkubeproxy_{name}")), "{name} is not in {text}");
        }
        for name in other {
            assert!(!text.contains(name), "{name} is in {text}");
        }
    });
}

fn rules_are_counted_as_the_kernel_has_them(mode: Mode) {
    let Mode::Iptables(variant) = mode else { skip("it has no rules to count") };
    let mut node = Node::new(mode);
    for last in 1..=5 {
        let name = format!("web{last}");
        node.service(&name, node_port(cluster_ip(last, "TCP", 80), 30000 + u16::from(last)));
        node.ready(&name, "TCP", 8080, &[2, 3]);
    }
    node.service("empty", cluster_ip(9, "TCP", 80));
    node.apply();
    compare(&mut node, variant);
    node.ready("web1", "TCP", 8080, &[2]);
    node.delete_service("web2");
    node.apply();
    compare(&mut node, variant);
    // Also one that takes over from another process.
    assert_eq!(node.restart(), 0);
    let figures = compare(&mut node, variant);
    assert!(figures.of(Family::V4).rules.iter().all(|table| table.written == 0), "{figures:?}");
}

/// Compares the figures with what the programs print.
fn compare(node: &mut Node, variant: Variant) -> keelson_proxy::backend::Figures {
    let figures = node.backend.as_mut().unwrap().take_figures();
    for (family, program) in [(Family::V4, "iptables"), (Family::V6, "ip6tables")] {
        for table in &figures.of(family).rules {
            let program = format!("{program}-{}-save", variant.word());
            let text = node.namespace.output(&program, &["-t", table.table]);
            let ours = text.lines().filter(|line| line.starts_with("-A KEELSON-")).count();
            assert_eq!(table.all, i64::try_from(ours).unwrap(), "{} {text}", table.table);
        }
        assert_eq!(figures.of(family).rules.len(), 2);
    }
    figures
}

fn refused_changes_are_counted_by_family(mode: Mode) {
    if mode == Mode::Ebpf {
        skip("kube-proxy has no metric for it");
    }
    let mut node = Node::new(mode);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let of = |node: &mut Node, family| {
        let figures = node.backend.as_mut().unwrap().take_figures();
        let of = figures.of(family);
        (of.failures, of.partial_failures, of.cleanup_failures)
    };
    assert_eq!(of(&mut node, Family::V4), (0, 0, 0));
    node.ready("web", "TCP", 8080, &[3]);
    let dirty = node.model.take_dirty();
    let mut changes = advance(&mut node.plans, dirty, |key| node.model.plan(key));
    // Such a plan cannot come from the model: an IPv6 address in an IPv4 map.
    let mut plan = ServicePlan::clone(changes[0].plan.as_ref().unwrap());
    let mut ports = plan.ports.to_vec();
    ports.retain(|port| port.family == Family::V4);
    ports[0].frontends[0].key.at = At::Address("fd96::99".parse().unwrap());
    plan.ports = ports.into();
    changes[0].plan = Some(plan.into());
    node.plans.insert(changes[0].service.clone(), changes[0].plan.clone().unwrap());
    let backend = node.backend.as_mut().unwrap();
    assert_eq!(backend.apply(&changes, &node.plans).unwrap().refused.len(), 1);
    let (failures, partial, cleanup) = of(&mut node, Family::V4);
    assert!(failures > 0);
    assert_eq!(partial > 0, matches!(mode, Mode::Iptables(_)));
    assert_eq!(cleanup, 0);
}
