//! Counters under kube-proxy's names.

use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};

use crate::diff::Change;
use crate::model::{Family as IpFamily, Route, ServicePlan, Target};

type Seconds = Gauge<f64, AtomicU64>;

/// Which family a figure is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FamilyLabel {
    ip_family: &'static str,
}

impl FamilyLabel {
    fn of(family: IpFamily) -> Self {
        FamilyLabel { ip_family: if family == IpFamily::V4 { "IPv4" } else { "IPv6" } }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PolicyLabel {
    traffic_policy: &'static str,
    ip_family: &'static str,
}

type Durations = Family<FamilyLabel, Histogram, fn() -> Histogram>;

fn durations() -> Durations {
    Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 15)))
}

/// All metrics of a proxy.
pub(crate) struct Metrics {
    registry: Registry,
    sync_duration: Durations,
    full_duration: Durations,
    partial_duration: Durations,
    programming_duration: Durations,
    last_sync: Family<FamilyLabel, Seconds>,
    healthz: Family<CodeLabel, Counter>,
    livez: Family<CodeLabel, Counter>,
    without_local: Family<PolicyLabel, Gauge>,
    pub(crate) last_queued: Seconds,
    pub(crate) endpoint_changes: Counter,
    pub(crate) service_changes: Counter,
    pub(crate) pending: Gauge,
    pub(crate) sync_failures: Counter,
    pub(crate) operations: Counter,
    pub(crate) repairs: Counter,
    pub(crate) left_out: Counter,
    pub(crate) conntrack_deleted: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut metrics = Metrics {
            registry: Registry::default(),
            sync_duration: durations(),
            full_duration: durations(),
            partial_duration: durations(),
            programming_duration: Family::new_with_constructor(|| {
                Histogram::new(programming_buckets())
            }),
            last_sync: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            without_local: Family::default(),
            last_queued: Seconds::default(),
            endpoint_changes: Counter::default(),
            service_changes: Counter::default(),
            pending: Gauge::default(),
            sync_failures: Counter::default(),
            operations: Counter::default(),
            repairs: Counter::default(),
            left_out: Counter::default(),
            conntrack_deleted: Counter::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let kube = self.registry.sub_registry_with_prefix("kubeproxy");
        let duration = "Latency of putting changes in force";
        add(kube, "sync_proxy_rules_duration_seconds", duration, &self.sync_duration);
        add(kube, "sync_full_proxy_rules_duration_seconds", duration, &self.full_duration);
        add(kube, "sync_partial_proxy_rules_duration_seconds", duration, &self.partial_duration);
        let help = "Time from a change of a Service or pod until it is in force";
        add(kube, "network_programming_duration_seconds", help, &self.programming_duration);
        let help = "When changes were last put in force";
        add(kube, "sync_proxy_rules_last_timestamp_seconds", help, &self.last_sync);
        let help = "When a change last arrived";
        add(kube, "sync_proxy_rules_last_queued_timestamp_seconds", help, &self.last_queued);
        let help = "EndpointSlice changes";
        add(kube, "sync_proxy_rules_endpoint_changes", help, &self.endpoint_changes);
        let help = "Service changes";
        add(kube, "sync_proxy_rules_service_changes", help, &self.service_changes);
        let help = "Services that wait to be put in force";
        add(kube, "sync_proxy_rules_service_changes_pending", help, &self.pending);
        let help = "Times that the kernel refused a change";
        add(kube, "sync_proxy_rules_nftables_sync_failures", help, &self.sync_failures);
        let help = "Service ports whose traffic policy is Local and that have no endpoint here";
        add(kube, "sync_proxy_rules_no_local_endpoints_total", help, &self.without_local);
        add(kube, "proxy_healthz", "Answers of /healthz", &self.healthz);
        add(kube, "proxy_livez", "Answers of /livez", &self.livez);
        let help = "Stale UDP connection tracking entries removed";
        add(kube, "conntrack_reconciler_deleted_entries", help, &self.conntrack_deleted);
        let own = self.registry.sub_registry_with_prefix("keelson_proxy");
        add(own, "kernel_operations", "Kernel objects added or removed", &self.operations);
        let help = "Times that foreign changes to our tables were mended";
        add(own, "repairs", help, &self.repairs);
        let help = "Fields and frontends that were wrong or asked for twice, and so left out";
        add(own, "left_out", help, &self.left_out);
    }

    /// Changes of a family are in force.
    pub(crate) fn synced(&self, family: IpFamily, all: bool, took: Duration) {
        let (label, secs) = (FamilyLabel::of(family), took.as_secs_f64());
        self.sync_duration.get_or_create(&label).observe(secs);
        let kind = if all { &self.full_duration } else { &self.partial_duration };
        kind.get_or_create(&label).observe(secs);
        self.last_sync.get_or_create(&label).set(now_secs());
    }

    /// A change is in force, so long after its cause.
    pub(crate) fn programmed(&self, family: IpFamily, after: Duration) {
        let label = FamilyLabel::of(family);
        self.programming_duration.get_or_create(&label).observe(after.as_secs_f64());
    }

    pub(crate) fn asked_for_health(&self, path: &str, code: u16) {
        match path {
            "/healthz" => self.healthz.get_or_create(&CodeLabel { code }).inc(),
            "/livez" => self.livez.get_or_create(&CodeLabel { code }).inc(),
            _ => return,
        };
    }

    /// Keeps count of ports without a local endpoint; costs as much as the changes.
    pub(crate) fn count_without_local(&self, changes: &[Change]) {
        for change in changes {
            for (plan, sign) in [(&change.before, -1), (&change.plan, 1)] {
                for (policy, family) in plan.iter().flat_map(|plan| without_local(plan)) {
                    let ip_family = FamilyLabel::of(family).ip_family;
                    let label = PolicyLabel { traffic_policy: policy, ip_family };
                    self.without_local.get_or_create(&label).inc_by(sign);
                }
            }
        }
    }

    /// The text that Prometheus reads.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(error) => format!("# cannot encode metrics: {error}\n"),
        }
    }
}

fn add(registry: &mut Registry, name: &str, help: &str, metric: &(impl Metric + Clone)) {
    registry.register(name, help, metric.clone());
}

/// The ports that a Local policy leaves without an endpoint on this node, once per policy.
fn without_local(plan: &ServicePlan) -> Vec<(&'static str, IpFamily)> {
    let mut found = Vec::new();
    for port in &plan.ports {
        let drops = |route: Route| match route {
            Route::Same { target: Target::Drop, .. } => Some("internal"),
            Route::BySource { outside: Target::Drop, .. } => Some("external"),
            Route::Same { .. } | Route::BySource { .. } => None,
        };
        let mut policies: Vec<_> =
            port.frontends.iter().filter_map(|frontend| drops(frontend.route)).collect();
        policies.sort_unstable();
        policies.dedup();
        found.extend(policies.into_iter().map(|policy| (policy, port.family)));
    }
    found
}

/// kube-proxy's: fine below a second, then wider and wider up to five minutes.
fn programming_buckets() -> impl Iterator<Item = f64> {
    let quarters = [0.25, 0.5];
    let seconds = (1..60).map(f64::from);
    let fives = (60..120).step_by(5).map(f64::from);
    let thirties = (120..=300).step_by(30).map(f64::from);
    quarters.into_iter().chain(seconds).chain(fives).chain(thirties)
}

/// Seconds since the epoch.
pub(crate) fn now_secs() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}
