//! Counters under kube-proxy's names.

use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

type Seconds = Gauge<f64, AtomicU64>;

/// All metrics of a proxy.
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) sync_duration: Histogram,
    pub(crate) programming_duration: Histogram,
    pub(crate) last_sync: Seconds,
    pub(crate) last_queued: Seconds,
    pub(crate) endpoint_changes: Counter,
    pub(crate) service_changes: Counter,
    pub(crate) pending: Gauge,
    pub(crate) sync_failures: Counter,
    pub(crate) operations: Counter,
    pub(crate) repairs: Counter,
    pub(crate) conntrack_deleted: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut metrics = Metrics {
            registry: Registry::default(),
            sync_duration: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            programming_duration: Histogram::new(programming_buckets()),
            last_sync: Seconds::default(),
            last_queued: Seconds::default(),
            endpoint_changes: Counter::default(),
            service_changes: Counter::default(),
            pending: Gauge::default(),
            sync_failures: Counter::default(),
            operations: Counter::default(),
            repairs: Counter::default(),
            conntrack_deleted: Counter::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let kube = self.registry.sub_registry_with_prefix("kubeproxy");
        let sync = "sync_proxy_rules";
        kube.register(
            format!("{sync}_duration_seconds"),
            "Latency of putting changes in force",
            self.sync_duration.clone(),
        );
        kube.register(
            "network_programming_duration_seconds",
            "Time from a change of a Service or pod until it is in force",
            self.programming_duration.clone(),
        );
        kube.register(
            format!("{sync}_last_timestamp_seconds"),
            "When changes were last put in force",
            self.last_sync.clone(),
        );
        kube.register(
            format!("{sync}_last_queued_timestamp_seconds"),
            "When a change last arrived",
            self.last_queued.clone(),
        );
        kube.register(
            format!("{sync}_endpoint_changes"),
            "EndpointSlice changes",
            self.endpoint_changes.clone(),
        );
        kube.register(
            format!("{sync}_service_changes"),
            "Service changes",
            self.service_changes.clone(),
        );
        kube.register(
            format!("{sync}_service_changes_pending"),
            "Services that wait to be put in force",
            self.pending.clone(),
        );
        kube.register(
            format!("{sync}_nftables_sync_failures"),
            "Times that the kernel refused a change",
            self.sync_failures.clone(),
        );
        let own = self.registry.sub_registry_with_prefix("keelson_proxy");
        own.register(
            "kernel_operations",
            "Kernel objects added or removed",
            self.operations.clone(),
        );
        own.register(
            "repairs",
            "Times that foreign changes to our tables were mended",
            self.repairs.clone(),
        );
        own.register(
            "conntrack_deleted_entries",
            "Stale UDP connection tracking entries removed",
            self.conntrack_deleted.clone(),
        );
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
