//! What pods and node use, read from cgroups: `/metrics/resource` for metrics-server (`kubectl top`)
//! and `/stats/summary`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use keelson_procfs::Mount;
use serde_json::{Value, json};

use super::containers::Containers;
use super::metrics::sample;

/// What a cgroup has used and uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu_nanos: u64,
    pub memory_bytes: u64,
    /// Memory that cannot be given back by dropping files from the page cache.
    pub working_set_bytes: u64,
    pub rss_bytes: u64,
}

/// Where this machine keeps the numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hierarchies {
    /// Version 2, or `None` when its controllers are all in version 1.
    unified: Option<PathBuf>,
    cpuacct: Option<PathBuf>,
    memory: Option<PathBuf>,
}

impl Hierarchies {
    /// Looks at what is mounted.
    pub fn detect() -> Self {
        Self::from_mounts(&keelson_procfs::own_mounts().unwrap_or_default())
    }

    pub(crate) fn from_mounts(mounts: &[Mount]) -> Self {
        let mut found = Self::default();
        for seen in mounts {
            let mount = Some(seen.point.clone());
            let has = |name: &str| seen.super_options.iter().any(|option| option == name);
            match seen.kind.as_str() {
                "cgroup2" if found.unified.is_none() => found.unified = mount,
                "cgroup" if has("cpuacct") => found.cpuacct = found.cpuacct.or(mount),
                "cgroup" if has("memory") => found.memory = found.memory.or(mount),
                _ => {}
            }
        }
        found
    }

    /// What a cgroup uses; its path begins below every hierarchy's mount point.
    pub fn usage(&self, cgroup: &str) -> Option<Usage> {
        let below = |mount: &Option<PathBuf>| {
            mount.as_ref().map(|mount| mount.join(cgroup.trim_start_matches('/')))
        };
        if let (Some(cpu), Some(memory)) = (below(&self.cpuacct), below(&self.memory)) {
            return v1_usage(&cpu, &memory);
        }
        v2_usage(&below(&self.unified)?)
    }
}

fn v1_usage(cpu: &Path, memory: &Path) -> Option<Usage> {
    let stat = fs::read_to_string(memory.join("memory.stat")).ok()?;
    let used = number(&memory.join("memory.usage_in_bytes"))?;
    Some(Usage {
        cpu_nanos: number(&cpu.join("cpuacct.usage"))?,
        memory_bytes: used,
        working_set_bytes: used.saturating_sub(field(&stat, "total_inactive_file").unwrap_or(0)),
        rss_bytes: field(&stat, "total_rss").unwrap_or(0),
    })
}

fn v2_usage(cgroup: &Path) -> Option<Usage> {
    let cpu = fs::read_to_string(cgroup.join("cpu.stat")).ok()?;
    let stat = fs::read_to_string(cgroup.join("memory.stat")).ok()?;
    let used = number(&cgroup.join("memory.current"))?;
    Some(Usage {
        cpu_nanos: field(&cpu, "usage_usec")?.saturating_mul(1000),
        memory_bytes: used,
        working_set_bytes: used.saturating_sub(field(&stat, "inactive_file").unwrap_or(0)),
        rss_bytes: field(&stat, "anon").unwrap_or(0),
    })
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A value of a file whose lines are `name value`.
fn field(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    value.trim().parse().ok()
}

/// The whole machine, from /proc: its root cgroup has no memory numbers in version 2.
fn node_usage() -> Usage {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    let used = (kib("MemTotal").saturating_sub(kib("MemFree"))) * 1024;
    Usage {
        cpu_nanos: busy_nanos(&stat),
        memory_bytes: used,
        working_set_bytes: used.saturating_sub(kib("Inactive(file)") * 1024),
        rss_bytes: kib("AnonPages") * 1024,
    }
}

/// The first line of /proc/stat counts hundredths of a second: user, nice, system, idle, iowait, irq,
/// softirq, steal.
pub(crate) fn busy_nanos(stat: &str) -> u64 {
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> =
        line.split_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|index| ticks.get(*index)).sum();
    busy.saturating_mul(10_000_000)
}

/// One pod with what it and its running containers use.
struct PodUsage {
    pod: Arc<Pod>,
    usage: Usage,
    containers: Vec<(ContainerStatus, Usage)>,
}

fn pods_usage(containers: &dyn Containers, hierarchies: &Hierarchies) -> Vec<PodUsage> {
    let of_pod = |pod: Arc<Pod>| {
        let cgroup = containers.pod_cgroup(&pod)?;
        let usage = hierarchies.usage(&cgroup)?;
        let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.clone());
        let of_container = |status: ContainerStatus| {
            status.state.as_ref()?.running.as_ref()?;
            let id = status.container_id.as_deref()?.split_once("://")?.1;
            let usage = hierarchies.usage(&format!("{cgroup}/{id}"))?;
            Some((status, usage))
        };
        let containers = statuses.into_iter().flatten().filter_map(of_container).collect();
        Some(PodUsage { pod, usage, containers })
    };
    containers.pods().into_iter().filter_map(of_pod).collect()
}

/// The text of `/metrics/resource`.
pub fn resource_metrics(containers: &dyn Containers) -> String {
    let hierarchies = Hierarchies::detect();
    let pods = pods_usage(containers, &hierarchies);
    let node = node_usage();
    let mut text = String::new();
    let cpu_help = "Cumulative cpu time consumed in core-seconds";
    let memory_help = "Current working set in bytes";
    let one = |text: &mut String, name, kind, help, value| {
        sample(text, name, kind, help, &[(&[], value)]);
    };
    one(&mut text, "node_cpu_usage_seconds_total", "counter", cpu_help, seconds(node));
    one(&mut text, "node_memory_working_set_bytes", "gauge", memory_help, working_set(node));
    let values = [
        ("cpu_usage_seconds_total", "counter", cpu_help, seconds as fn(Usage) -> f64),
        ("memory_working_set_bytes", "gauge", memory_help, working_set),
    ];
    for (name, kind, help, value) in values {
        let of_pods: Vec<(Vec<(&str, &str)>, f64)> =
            pods.iter().map(|pod| (pod_labels(&pod.pod), value(pod.usage))).collect();
        let of_containers = pods.iter().flat_map(|pod| {
            pod.containers.iter().map(move |(status, usage)| {
                let mut labels = vec![("container", status.name.as_str())];
                labels.extend(pod_labels(&pod.pod));
                (labels, value(*usage))
            })
        });
        let of_containers: Vec<_> = of_containers.collect();
        for (owner, samples) in [("pod", of_pods), ("container", of_containers)] {
            let samples: Vec<_> =
                samples.iter().map(|(labels, value)| (labels.as_slice(), *value)).collect();
            sample(&mut text, &format!("{owner}_{name}"), kind, help, &samples);
        }
    }
    let help = "1 if there was an error while getting container metrics, 0 otherwise";
    one(&mut text, "resource_scrape_error", "gauge", help, 0.0);
    text
}

fn pod_labels(pod: &Pod) -> Vec<(&str, &str)> {
    let meta = &pod.metadata;
    vec![
        ("namespace", meta.namespace.as_deref().unwrap_or_default()),
        ("pod", meta.name.as_deref().unwrap_or_default()),
    ]
}

#[allow(clippy::cast_precision_loss, reason = "metrics are floating point")]
fn seconds(usage: Usage) -> f64 {
    usage.cpu_nanos as f64 / 1e9
}

#[allow(clippy::cast_precision_loss, reason = "metrics are floating point")]
fn working_set(usage: Usage) -> f64 {
    usage.working_set_bytes as f64
}

/// The object of `/stats/summary`.
pub fn summary(node_name: &str, containers: &dyn Containers) -> Value {
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let pods: Vec<Value> = pods_usage(containers, &Hierarchies::detect())
        .iter()
        .map(|pod| {
            let meta = &pod.pod.metadata;
            let containers: Vec<Value> = pod
                .containers
                .iter()
                .map(|(status, usage)| {
                    let running = status.state.as_ref().and_then(|state| state.running.as_ref());
                    let start = running.and_then(|running| running.started_at.clone());
                    with_usage(json!({"name": status.name, "startTime": start}), *usage, &now)
                })
                .collect();
            let start = pod.pod.status.as_ref().and_then(|status| status.start_time.clone());
            let object = json!({
                "podRef": {"name": meta.name, "namespace": meta.namespace, "uid": meta.uid},
                "startTime": start,
                "containers": containers,
            });
            with_usage(object, pod.usage, &now)
        })
        .collect();
    let node = with_usage(json!({"nodeName": node_name}), node_usage(), &now);
    json!({"node": node, "pods": pods})
}

fn with_usage(mut object: Value, usage: Usage, now: &str) -> Value {
    let cpu = json!({"time": now, "usageCoreNanoSeconds": usage.cpu_nanos});
    let memory = json!({
        "time": now,
        "usageBytes": usage.memory_bytes,
        "workingSetBytes": usage.working_set_bytes,
        "rssBytes": usage.rss_bytes,
    });
    if let Some(object) = object.as_object_mut() {
        object.insert("cpu".to_owned(), cpu);
        object.insert("memory".to_owned(), memory);
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(text: &[u8]) -> Vec<Mount> {
        keelson_procfs::mounts(text).collect()
    }

    #[test]
    fn hierarchies_of_both_versions() {
        let hybrid = "30 23 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                      32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      33 23 0:29 / /tmp rw - tmpfs memory rw\n";
        let found = Hierarchies::from_mounts(&mounts(hybrid.as_bytes()));
        assert_eq!(found.cpuacct.unwrap(), Path::new("/sys/fs/cgroup/cpu"));
        assert_eq!(found.memory.unwrap(), Path::new("/sys/fs/cgroup/memory"));
        let v2 = Hierarchies::from_mounts(&mounts(
            b"30 23 0:26 / /sys/fs/cgroup rw - cgroup2 none rw\n",
        ));
        assert_eq!(v2.unified.unwrap(), Path::new("/sys/fs/cgroup"));
    }

    #[test]
    fn a_cgroup_of_version_2_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = dir.path().join("a/b");
        fs::create_dir_all(&cgroup).unwrap();
        fs::write(cgroup.join("cpu.stat"), "usage_usec 2500\nuser_usec 1\n").unwrap();
        fs::write(cgroup.join("memory.current"), "4096\n").unwrap();
        fs::write(cgroup.join("memory.stat"), "anon 1000\ninactive_file 96\n").unwrap();
        let unified = Some(dir.path().to_owned());
        let hierarchies = Hierarchies { unified, ..Hierarchies::default() };
        let want = Usage {
            cpu_nanos: 2_500_000,
            memory_bytes: 4096,
            working_set_bytes: 4000,
            rss_bytes: 1000,
        };
        assert_eq!(hierarchies.usage("/a/b"), Some(want));
        assert_eq!(hierarchies.usage("/a/c"), None);
    }

    #[test]
    fn the_machine_is_busy() {
        assert_eq!(busy_nanos("cpu  10 1 5 900 50 2 1 1 7 7\ncpu0 1\n"), 200_000_000);
        assert!(node_usage().working_set_bytes > 0);
    }
}
