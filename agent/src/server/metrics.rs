//! `/metrics`: this process and the pods that it runs, under the kubelet's names, in Prometheus'
//! text format.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use tokio::sync::Semaphore;

use super::containers::Containers;
use super::stats;

/// Collections at a time: they read files of cgroups, and a disk that hangs must not take many threads.
const COLLECTIONS: usize = 2;

/// Where the numbers come from.
pub struct Metrics {
    source: Arc<Source>,
    places: Arc<Semaphore>,
}

struct Source {
    node_name: String,
    containers: Arc<dyn Containers>,
}

impl Metrics {
    pub fn new(node_name: String, containers: Arc<dyn Containers>) -> Self {
        let source = Arc::new(Source { node_name, containers });
        Self { source, places: Arc::new(Semaphore::new(COLLECTIONS)) }
    }

    /// The text of `/metrics`, `/metrics/resource` or `/stats/summary`; `None` when there is nothing.
    pub async fn text(&self, path: &str) -> Option<String> {
        let place = self.places.clone().acquire_owned().await.ok()?;
        let (source, path) = (self.source.clone(), path.to_owned());
        let work = move || {
            let _place = place;
            keelson_supervise::catch("metrics", || source.text(&path))
        };
        tokio::task::spawn_blocking(work).await.ok()?.ok()?
    }
}

impl Source {
    fn text(&self, path: &str) -> Option<String> {
        match path {
            "metrics" => Some(self.own()),
            "metrics/resource" => Some(stats::resource_metrics(self.containers.as_ref())),
            "stats/summary" => {
                Some(stats::summary(&self.node_name, self.containers.as_ref()).to_string())
            }
            _ => None,
        }
    }

    fn own(&self) -> String {
        let mut text = String::new();
        let node = [("node", self.node_name.as_str())];
        gauge(&mut text, "kubelet_node_name", "The node's name.", &[(&node, 1.0)]);
        let pods = self.containers.pods();
        let running = pods.iter().filter(|pod| phase(pod) == "Running").count();
        let help = "Number of pods that have a running pod sandbox.";
        gauge(&mut text, "kubelet_running_pods", help, &[(&[], as_float(running))]);
        let states = states(&pods);
        let samples: Vec<(Vec<(&str, &str)>, f64)> = states
            .iter()
            .map(|(state, count)| (vec![("container_state", *state)], as_float(*count)))
            .collect();
        let samples: Vec<Sample<'_>> =
            samples.iter().map(|(labels, value)| (labels.as_slice(), *value)).collect();
        let help = "Number of containers by state.";
        gauge(&mut text, "kubelet_running_containers", help, &samples);
        panics(&mut text);
        process(&mut text);
        text
    }
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// How many containers there are in each state.
fn states(pods: &[Arc<Pod>]) -> [(&'static str, usize); 3] {
    let (mut running, mut exited) = (0, 0);
    for status in pods.iter().flat_map(|pod| statuses(pod)) {
        let Some(state) = &status.state else { continue };
        match (&state.running, &state.terminated) {
            (Some(_), _) => running += 1,
            (None, Some(_)) => exited += 1,
            (None, None) => {}
        }
    }
    [("created", 0), ("running", running), ("exited", exited)]
}

fn statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let init = status.and_then(|status| status.init_container_statuses.as_ref());
    let main = status.and_then(|status| status.container_statuses.as_ref());
    init.into_iter().chain(main).flatten()
}

/// What went wrong in this process without ending it.
fn panics(text: &mut String) {
    let counts = keelson_supervise::panics();
    let labels: Vec<_> =
        counts.iter().map(|(task, count)| ([("task", *task)], as_float_u64(*count))).collect();
    let samples: Vec<Sample<'_>> =
        labels.iter().map(|(labels, count)| (labels.as_slice(), *count)).collect();
    let help = "Panics, each of which ended one task.";
    sample(text, "keelson_panics_total", "counter", help, &samples);
}

/// The process itself, as every Prometheus client names it.
fn process(text: &mut String) {
    let stat = std::fs::read("/proc/self/stat").unwrap_or_default();
    let stat = String::from_utf8_lossy(&stat);
    let open_files = std::fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or(0);
    let Some(usage) = parse_stat(&stat) else { return };
    let help = "Total user and system CPU time spent in seconds.";
    sample(text, "process_cpu_seconds_total", "counter", help, &[(&[], usage.cpu_seconds)]);
    let help = "Resident memory size in bytes.";
    gauge(text, "process_resident_memory_bytes", help, &[(&[], usage.resident_bytes)]);
    gauge(
        text,
        "process_open_fds",
        "Number of open file descriptors.",
        &[(&[], as_float(open_files))],
    );
    gauge(text, "process_threads", "Number of threads.", &[(&[], usage.threads)]);
}

struct ProcessUsage {
    cpu_seconds: f64,
    resident_bytes: f64,
    threads: f64,
}

/// Reads `/proc/<pid>/stat`; the name in it may contain anything, so counting starts behind it.
fn parse_stat(stat: &str) -> Option<ProcessUsage> {
    // The kernel's unit of time for user space and its page size, both fixed on Linux' main
    // architectures for this file: 100 ticks a second; pages are asked for.
    const TICKS: f64 = 100.0;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<f64>().ok();
    Some(ProcessUsage {
        cpu_seconds: (number(11)? + number(12)?) / TICKS,
        threads: number(17)?,
        resident_bytes: number(21)? * f64::from(i32::try_from(page).ok()?),
    })
}

type Sample<'a> = (&'a [(&'a str, &'a str)], f64);

fn gauge(text: &mut String, name: &str, help: &str, samples: &[Sample<'_>]) {
    sample(text, name, "gauge", help, samples);
}

/// Appends a metric with its samples.
pub(super) fn sample(
    text: &mut String,
    name: &str,
    kind: &str,
    help: &str,
    samples: &[Sample<'_>],
) {
    *text += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    for (labels, value) in samples {
        let labels: Vec<String> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        let labels =
            if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        *text += &format!("{name}{labels} {value}\n");
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[allow(clippy::cast_precision_loss, reason = "metrics are floating point")]
fn as_float_u64(count: u64) -> f64 {
    count as f64
}

#[allow(clippy::cast_precision_loss, reason = "counts of pods and files are small")]
fn as_float(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let mut text = String::new();
        gauge(&mut text, "a_b", "Help.", &[(&[("x", "1\"2")], 3.0), (&[], 0.5)]);
        assert_eq!(text, "# HELP a_b Help.\n# TYPE a_b gauge\na_b{x=\"1\\\"2\"} 3\na_b 0.5\n");
    }

    #[test]
    fn a_process_with_a_strange_name_is_understood() {
        let stat = "1 (a) b) S 2 3 4 5 6 7 8 9 10 11 250 50 14 15 16 17 7 19 20 21 1000 23";
        let usage = parse_stat(stat).unwrap();
        assert!((usage.cpu_seconds - 3.0).abs() < 1e-9);
        assert!((usage.threads - 7.0).abs() < 1e-9 && usage.resident_bytes > 1e6);
        assert!(parse_stat(&std::fs::read_to_string("/proc/self/stat").unwrap()).is_some());
    }
}
