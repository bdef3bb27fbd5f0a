//! Counters under kube-proxy's names.

pub(crate) mod traffic;

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};

use crate::backend::{Figures, MapFill, Mode};
use crate::clock::Now;
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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TableLabel {
    table: &'static str,
    ip_family: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MapLabel {
    map: &'static str,
}

type Durations = Family<FamilyLabel, Histogram, fn() -> Histogram>;
type PerFamily = Family<FamilyLabel, Counter>;

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
    last_queued: Family<FamilyLabel, Seconds>,
    healthz: Family<CodeLabel, Counter>,
    livez: Family<CodeLabel, Counter>,
    without_local: Family<PolicyLabel, Gauge>,
    conntrack_duration: Durations,
    conntrack_deleted: PerFamily,
    failures: PerFamily,
    partial_failures: PerFamily,
    cleanup_failures: PerFamily,
    rules: Family<TableLabel, Gauge>,
    rules_last: Family<TableLabel, Gauge>,
    map_entries: Family<MapLabel, Gauge>,
    map_max_entries: Family<MapLabel, Gauge>,
    pub(crate) endpoint_changes: Counter,
    pub(crate) service_changes: Counter,
    pub(crate) endpoints_pending: Gauge,
    pub(crate) services_pending: Gauge,
    pub(crate) operations: Counter,
    pub(crate) repairs: Counter,
    pub(crate) refused: Counter,
    pub(crate) left_out: Counter,
}

impl Metrics {
    pub(crate) fn new(mode: Mode) -> Self {
        let mut metrics = Metrics {
            registry: Registry::default(),
            sync_duration: durations(),
            full_duration: durations(),
            partial_duration: durations(),
            programming_duration: Family::new_with_constructor(|| {
                Histogram::new(programming_buckets())
            }),
            last_sync: Family::default(),
            last_queued: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            without_local: Family::default(),
            conntrack_duration: durations(),
            conntrack_deleted: Family::default(),
            failures: Family::default(),
            partial_failures: Family::default(),
            cleanup_failures: Family::default(),
            rules: Family::default(),
            rules_last: Family::default(),
            map_entries: Family::default(),
            map_max_entries: Family::default(),
            endpoint_changes: Counter::default(),
            service_changes: Counter::default(),
            endpoints_pending: Gauge::default(),
            services_pending: Gauge::default(),
            operations: Counter::default(),
            repairs: Counter::default(),
            refused: Counter::default(),
            left_out: Counter::default(),
        };
        metrics.register();
        metrics.register_mode(mode);
        metrics.start_at_zero();
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
        let help = "EndpointSlice changes that wait to be put in force";
        add(kube, "sync_proxy_rules_endpoint_changes_pending", help, &self.endpoints_pending);
        let help = "Service changes that wait to be put in force";
        add(kube, "sync_proxy_rules_service_changes_pending", help, &self.services_pending);
        let help = "Service ports whose traffic policy is Local and that have no endpoint here";
        add(kube, "sync_proxy_rules_no_local_endpoints_total", help, &self.without_local);
        add(kube, "proxy_healthz", "Answers of /healthz", &self.healthz);
        add(kube, "proxy_livez", "Answers of /livez", &self.livez);
        let help = "Latency of a walk through the connection tracking table";
        add(kube, "conntrack_reconciler_sync_duration_seconds", help, &self.conntrack_duration);
        let help = "Stale UDP connection tracking entries removed";
        add(kube, "conntrack_reconciler_deleted_entries", help, &self.conntrack_deleted);
        let own = self.registry.sub_registry_with_prefix("keelson_proxy");
        add(own, "kernel_operations", "Kernel objects added or removed", &self.operations);
        let help = "Times that foreign changes to our tables were mended";
        add(own, "repairs", help, &self.repairs);
        let help = "Times that a single Service, a part of the node, or everything could not be put in force";
        add(own, "sync_failures", help, &self.refused);
        let help = "Fields and frontends that were wrong or asked for twice, and so left out";
        add(own, "left_out", help, &self.left_out);
    }

    /// What kube-proxy has in that mode only. In mode ipvs it has failures of iptables-restore, which is not
    /// used here: a table of nf_tables does what it did.
    fn register_mode(&mut self, mode: Mode) {
        let kube = self.registry.sub_registry_with_prefix("kubeproxy_sync_proxy_rules");
        match mode {
            Mode::Iptables(_) => {
                let help = "Runs of iptables-restore that failed";
                add(kube, "iptables_restore_failures", help, &self.failures);
                let help = "Changes that failed, so that all rules were compared";
                add(kube, "iptables_partial_restore_failures", help, &self.partial_failures);
                add(kube, "iptables_total", "Rules of ours", &self.rules);
                add(kube, "iptables_last", "Rules written by the last change", &self.rules_last);
            }
            Mode::Nftables | Mode::Ipvs => {
                let help = "Transactions that the kernel refused";
                add(kube, "nftables_sync_failures", help, &self.failures);
                let help = "Removals of leftovers that the kernel refused";
                add(kube, "nftables_cleanup_failures", help, &self.cleanup_failures);
            }
            Mode::Ebpf => {
                let own = self.registry.sub_registry_with_prefix("keelson_proxy_ebpf");
                let help = "Entries of a BPF map; of those that programs write, an estimate";
                add(own, "map_entries", help, &self.map_entries);
                let help = "Entries that a BPF map has room for; some maps grow";
                add(own, "map_max_entries", help, &self.map_max_entries);
            }
        }
    }

    /// A counter that is not there until something happened is no use to an alert on its growth.
    fn start_at_zero(&self) {
        for label in IpFamily::BOTH.map(FamilyLabel::of) {
            for counters in [
                &self.failures,
                &self.partial_failures,
                &self.cleanup_failures,
                &self.conntrack_deleted,
            ] {
                counters.get_or_create(&label).inc_by(0);
            }
            for traffic_policy in ["internal", "external"] {
                let label = PolicyLabel { traffic_policy, ip_family: label.ip_family };
                self.without_local.get_or_create(&label).inc_by(0);
            }
        }
    }

    /// Changes of a family are in force.
    pub(crate) fn synced(&self, family: IpFamily, all: bool, took: Duration, now: Now) {
        let (label, secs) = (FamilyLabel::of(family), took.as_secs_f64());
        self.sync_duration.get_or_create(&label).observe(secs);
        let kind = if all { &self.full_duration } else { &self.partial_duration };
        kind.get_or_create(&label).observe(secs);
        self.last_sync.get_or_create(&label).set(now.unix_secs());
    }

    /// A change of a family has arrived.
    pub(crate) fn queued(&self, family: IpFamily, now: Now) {
        self.last_queued.get_or_create(&FamilyLabel::of(family)).set(now.unix_secs());
    }

    /// A change is in force, so long after its cause.
    pub(crate) fn programmed(&self, family: IpFamily, after: Duration) {
        let label = FamilyLabel::of(family);
        self.programming_duration.get_or_create(&label).observe(after.as_secs_f64());
    }

    /// The connection table was walked through.
    pub(crate) fn reconciled(&self, family: IpFamily, took: Duration, deleted: u64) {
        let label = FamilyLabel::of(family);
        self.conntrack_duration.get_or_create(&label).observe(took.as_secs_f64());
        self.conntrack_deleted.get_or_create(&label).inc_by(deleted);
    }

    /// What the backend has counted since the last time.
    pub(crate) fn take_in(&self, figures: &Figures) {
        for family in IpFamily::BOTH {
            let (label, of) = (FamilyLabel::of(family), figures.of(family));
            self.failures.get_or_create(&label).inc_by(of.failures);
            self.partial_failures.get_or_create(&label).inc_by(of.partial_failures);
            self.cleanup_failures.get_or_create(&label).inc_by(of.cleanup_failures);
            for rules in &of.rules {
                let label = TableLabel { table: rules.table, ip_family: label.ip_family };
                self.rules.get_or_create(&label).set(rules.all);
                self.rules_last.get_or_create(&label).set(rules.written);
            }
        }
    }

    /// How full maps are.
    pub(crate) fn note_fills(&self, fills: &[MapFill]) {
        for fill in fills {
            let label = MapLabel { map: fill.map };
            self.map_entries.get_or_create(&label).set(fill.entries.into());
            self.map_max_entries.get_or_create(&label).set(fill.max_entries.into());
        }
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

    /// The text that Prometheus reads, `more` metrics included.
    pub(crate) fn text(&self, more: &str) -> String {
        let mut text = String::new();
        let encoded = encode_registry(&mut text, &self.registry).and_then(|()| {
            text.push_str(more);
            encode_eof(&mut text)
        });
        match encoded {
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
