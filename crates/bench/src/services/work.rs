//! One proxy with one number of Services.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kube::Client;

use super::churn::Churn;
use super::{Subject, objects, probe};
use crate::api::{self, PATIENCE};
use crate::bpf::{self, ThreadGroup};
use crate::cluster::{Ground, NODE_ADDRESS};
use crate::process::{Daemon, in_netns};
use crate::report::{Report, Row, Unit};
use crate::stats::Samples;
use crate::subject::node::NODE_NAME;

/// The Service that exists before a proxy starts; those that come later have the next numbers. The last one by name,
/// too: that is the order in which some put them in force.
const LAST: &str = "zz-last-of-all";

pub(super) struct Work<'a> {
    pub(super) ground: &'a Ground<'a>,
    pub(super) client: &'a Client,
    pub(super) subject: &'a Subject,
    pub(super) size: u32,
    pub(super) endpoints: u32,
    /// New Services, one at a time.
    pub(super) changes: u32,
    /// Seconds to look at the idle proxy.
    pub(super) idle: u64,
    pub(super) churn: Churn,
}

impl Work<'_> {
    /// Start to effective, one change at a time, memory, idling.
    ///
    /// # Errors
    /// When the proxy ends or a Service does not come into force; with the end of its log.
    pub(super) async fn measure(
        &self,
        report: &mut Report,
        backend: &probe::Backend,
    ) -> Result<()> {
        probe::forget_rules(self.ground)?;
        self.create_marker(LAST, 0, backend).await?;
        let (mut proxy, _cgroup) = self.start()?;
        let outcome = self.run(report, &mut proxy, backend).await;
        let outcome = outcome
            .with_context(|| format!("the log of {} ends with:\n{}", proxy.name, proxy.log_tail()));
        let stopped = proxy.stop().await.map(drop);
        objects::delete(self.client, LAST).await?;
        outcome.and(stopped)
    }

    async fn run(
        &self,
        report: &mut Report,
        proxy: &mut Daemon,
        backend: &probe::Backend,
    ) -> Result<()> {
        let effective = probe::until(self.address(0), true, PATIENCE).await;
        proxy.must_run()?;
        let took = (effective? - proxy.began).as_secs_f64();
        let cpu = proxy.cpu();
        let goal = goals::start(&self.subject.mode, self.size);
        self.enter(report, "start to effective", Unit::Seconds, took, goal);
        self.enter(report, "CPU for the start", Unit::CpuSeconds, cpu, None);
        let changes = self.new_services(backend).await?;
        let goal = goals::change(&self.subject.mode, self.size);
        let mut row = Row::new(self.row("one new Service effective"), Unit::Millis);
        row.goal = goal;
        report.enter_spread(&self.subject.label, &row, &changes);
        let lookups = probe::lookups(self.address(0), backend.direct()).await?;
        let row = Row::new(lookup_row(self.size, self.endpoints), Unit::Ratio);
        report.enter(&self.subject.label, &row, lookups, &[]);
        // What the changes left behind still has to settle.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let (before, began) = (proxy.cpu(), Instant::now());
        tokio::time::sleep(Duration::from_secs(self.idle)).await;
        let share = (proxy.cpu() - before) / began.elapsed().as_secs_f64() * 100.0;
        proxy.must_run()?;
        let memory = proxy.memory();
        self.enter(report, "memory", Unit::Mebibytes, memory.resident, goals::memory(self.size));
        if let Some(share) = memory.proportional {
            self.enter(report, "memory (PSS)", Unit::Mebibytes, share, None);
        }
        self.enter(report, "memory, peak", Unit::Mebibytes, memory.peak, None);
        self.enter(report, "CPU while idle", Unit::PercentOfCore, share, Some(0.0));
        if self.churn.per_second > 0 {
            self.churn(report, proxy, backend).await?;
        }
        Ok(())
    }

    /// Many changes a second, and what they do to a single one.
    async fn churn(
        &self,
        report: &mut Report,
        proxy: &mut Daemon,
        backend: &probe::Backend,
    ) -> Result<()> {
        let before = proxy.cpu();
        let outcome = self.churn.run(self.client, backend, |index| self.address(index)).await?;
        let share = (proxy.cpu() - before) / outcome.took.as_secs_f64() * 100.0;
        proxy.must_run()?;
        let rate = self.churn.per_second;
        report.notes.push(format!(
            "{}: of {rate} changes a second the API server took {:.0} a second",
            self.subject.label, outcome.taken
        ));
        let what = format!("new Service effective under {rate} changes a second");
        let lags = outcome.lags;
        report.enter_spread(&self.subject.label, &Row::new(self.row(&what), Unit::Millis), &lags);
        if let Some(p99) = lags.percentile(99) {
            self.enter(report, &format!("{what}, p99"), Unit::Millis, p99, Some(100.0));
        }
        self.enter(report, "CPU under these changes", Unit::PercentOfCore, share, None);
        let peak = proxy.memory().peak;
        self.enter(report, "memory, peak, after these changes", Unit::Mebibytes, peak, None);
        self.churn.check(self.client, backend).await
    }

    /// Milliseconds from the POST of a Service until it answers; its slice is there before.
    async fn new_services(&self, backend: &probe::Backend) -> Result<Samples> {
        let mut samples = Samples::default();
        for number in 1..=self.changes {
            let name = format!("new-{}-{number}", self.size);
            let [slice, service] = objects::marker(&name, number, backend.endpoint());
            api::create(self.client, &slice).await?;
            let began = Instant::now();
            let create = api::create(self.client, &service);
            let answers = probe::until(self.address(number), true, PATIENCE);
            let (created, effective) = tokio::join!(create, answers);
            created?;
            samples.push((effective? - began).as_secs_f64() * 1e3);
            objects::delete(self.client, &name).await?;
            probe::until(self.address(number), false, PATIENCE).await?;
        }
        Ok(samples)
    }

    async fn create_marker(&self, name: &str, index: u32, backend: &probe::Backend) -> Result<()> {
        for object in objects::marker(name, index, backend.endpoint()) {
            api::create(self.client, &object).await?;
        }
        Ok(())
    }

    fn address(&self, index: u32) -> SocketAddr {
        SocketAddr::new(objects::marker_ip(index), objects::PORT)
    }

    /// Both proxies understand the same flags, but for the file.
    fn start(&self) -> Result<(Daemon, Option<ThreadGroup>)> {
        let node = self.ground.node();
        let mut command = in_netns(&self.ground.netns(), &self.subject.program);
        command.args([
            format!("--kubeconfig={}", self.ground.kubeconfig("proxy")?.display()),
            format!("--hostname-override={NODE_NAME}"),
            format!("--bind-address={NODE_ADDRESS}"),
            format!("--proxy-mode={}", self.subject.mode),
            "--cluster-cidr=10.244.0.0/16".into(),
            // Not this namespace's to set, and kube-proxy gives up where it cannot.
            "--conntrack-max-per-core=0".into(),
        ]);
        if self.subject.label == "keelson" {
            // Its last known Services are none of the machine's.
            let state = node.scratch().join("last-known.json");
            command.arg(format!("--state-file={}", state.display()));
        }
        // Of no use to the probe's sockets, which are not in there: packets of the node find Services, too.
        let cgroup = match self.subject.mode == bpf::MODE {
            true => Some(ThreadGroup::make(node.name())?),
            false => None,
        };
        if let Some(cgroup) = &cgroup {
            command.arg(format!("--ebpf-cgroup={}", cgroup.path().display()));
        }
        let log = node.scratch().join("proxy.log");
        let group = format!("{}-bench-proxy", node.name());
        Ok((Daemon::start(&self.subject.label, command, &log, &group)?, cgroup))
    }

    fn row(&self, what: &str) -> String {
        row(self.size, self.endpoints, what)
    }

    fn enter(&self, report: &mut Report, what: &str, unit: Unit, figure: f64, goal: Option<f64>) {
        let mut row = Row::new(self.row(what), unit);
        row.goal = goal;
        report.enter(&self.subject.label, &row, figure, &[]);
    }
}

fn row(size: u32, endpoints: u32, what: &str) -> String {
    format!("{}: {what}", scale(size, endpoints))
}

fn lookup_row(size: u32, endpoints: u32) -> String {
    row(size, endpoints, "connection through a ClusterIP, over a direct one")
}

/// What more Services do to the time that a connection takes, by the rows that are there already.
pub(super) fn compare_lookups(report: &mut Report, subject: &str, sizes: &[u32], endpoints: u32) {
    let Some((&few, more)) = sizes.split_first() else { return };
    let of = |report: &Report, size| report.figure(subject, &lookup_row(size, endpoints));
    for &size in more {
        if let (Some(base), Some(this)) = (of(report, few), of(report, size)) {
            let what = format!("that, over the same with {}", scale(few, endpoints));
            let row = Row::new(row(size, endpoints, &what), Unit::Ratio).goal(1.05);
            report.enter(subject, &row, this / base, &[]);
        }
    }
}

/// `10,000 x 10`.
fn scale(services: u32, endpoints: u32) -> String {
    if services < 1000 {
        return format!("{services} x {endpoints}");
    }
    format!("{},{:03} x {endpoints}", services / 1000, services % 1000)
}

/// What keelson wants to stay below, for the sizes that have a goal.
mod goals {
    pub(super) fn start(mode: &str, services: u32) -> Option<f64> {
        match (mode, services) {
            ("nftables", 1_000) => Some(0.3),
            ("nftables", 10_000) => Some(2.0),
            ("ebpf", 10_000) => Some(1.0),
            ("iptables" | "iptables-nft" | "iptables-legacy", 1_000) => Some(1.0),
            _ => None,
        }
    }

    /// Milliseconds until one new Service is effective.
    pub(super) fn change(mode: &str, services: u32) -> Option<f64> {
        match (mode, services) {
            ("nftables", 10_000) => Some(20.0),
            ("ebpf", 10_000) => Some(5.0),
            ("iptables" | "iptables-nft" | "iptables-legacy", 1_000) => Some(100.0),
            _ => None,
        }
    }

    pub(super) fn memory(services: u32) -> Option<f64> {
        match services {
            2 => Some(12.0),
            1_000 => Some(20.0),
            10_000 => Some(70.0),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(super::scale(2, 10), "2 x 10");
        assert_eq!(super::scale(10_000, 10), "10,000 x 10");
        assert_eq!(super::scale(1_234, 5), "1,234 x 5");
    }
}
