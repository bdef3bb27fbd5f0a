//! Requests and limits turned into cgroup values, as kubelet computes them. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::config::quantity;
use crate::pod::spec;
use crate::runtime::types::Resources;

/// A pod's quality-of-service class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum QosClass {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl QosClass {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// A length of time that CFS quotas are measured in: 100 ms.
pub const CPU_PERIOD_US: u64 = 100_000;
const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;
const MIN_QUOTA_US: i64 = 1000;

/// The largest quantity in thousandths: Kubernetes' own limit, and small enough to be added up and multiplied.
const MAX_MILLI: i128 = i64::MAX as i128 * 1000;

/// A quantity in thousandths, rounded up; `None` when it is not a quantity.
pub fn milli(quantity: &Quantity) -> Option<i128> {
    let milli = quantity::parse_milli(quantity.0.trim())?;
    Some(i128::try_from(milli).map_or(MAX_MILLI, |milli| milli.min(MAX_MILLI)))
}

/// The whole value, rounded up.
pub fn whole(quantity: &Quantity) -> Option<i64> {
    let milli = milli(quantity)?;
    i64::try_from(milli / 1000 + i128::from(milli > 0 && milli % 1000 != 0)).ok()
}

type List = BTreeMap<String, Quantity>;

fn of<'a>(list: Option<&'a List>, name: &str) -> Option<&'a Quantity> {
    list?.get(name)
}

fn limits(resources: Option<&ResourceRequirements>) -> Option<&List> {
    resources.and_then(|r| r.limits.as_ref())
}

fn requests(resources: Option<&ResourceRequirements>) -> Option<&List> {
    resources.and_then(|r| r.requests.as_ref())
}

/// A container's limit.
pub fn limit<'a>(container: &'a Container, name: &str) -> Option<&'a Quantity> {
    of(limits(container.resources.as_ref()), name)
}

/// A container's request; a limit without a request is the request, too.
pub fn request<'a>(container: &'a Container, name: &str) -> Option<&'a Quantity> {
    of(requests(container.resources.as_ref()), name).or_else(|| limit(container, name))
}

/// What the pod as a whole asks for, in thousandths: the mains and sidecars together, or the largest moment during
/// initialisation, plus overhead; a pod-level request wins.
pub fn pod_request_milli(pod: &Pod, name: &str) -> i128 {
    let own = spec::spec(pod).and_then(|s| s.resources.as_ref());
    let total = match of(requests(own), name).or_else(|| of(limits(own), name)).and_then(milli) {
        Some(own) => own,
        None => aggregate(pod, |c| request(c, name).and_then(milli).unwrap_or(0)),
    };
    total + overhead(pod, name)
}

fn overhead(pod: &Pod, name: &str) -> i128 {
    let overhead = spec::spec(pod).and_then(|s| s.overhead.as_ref());
    of(overhead, name).and_then(milli).unwrap_or(0)
}

fn aggregate(pod: &Pod, value: impl Fn(&Container) -> i128) -> i128 {
    let mains: i128 = spec::main_containers(pod).iter().map(&value).sum();
    let (mut sidecars, mut peak) = (0, 0);
    for init in spec::init_containers(pod) {
        if spec::is_sidecar(init) {
            sidecars += value(init);
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars + value(init));
        }
    }
    peak.max(mains + sidecars)
}

/// The pod's limit in thousandths, only if every container has one.
fn pod_limit_milli(pod: &Pod, name: &str) -> Option<i128> {
    let own = spec::spec(pod).and_then(|s| s.resources.as_ref());
    if let Some(own) = of(limits(own), name).and_then(milli) {
        return Some(own + overhead(pod, name));
    }
    let mut all = spec::main_containers(pod).iter().chain(spec::init_containers(pod));
    if !all.all(|c| limit(c, name).and_then(milli).is_some_and(|v| v > 0)) {
        return None;
    }
    let total = aggregate(pod, |c| limit(c, name).and_then(milli).unwrap_or(0));
    Some(total + overhead(pod, name))
}

/// The class: Guaranteed when all requests equal all limits for cpu and memory, BestEffort when there is neither.
pub fn qos_class(pod: &Pod) -> QosClass {
    let own = spec::spec(pod).and_then(|s| s.resources.as_ref());
    let each: Vec<Option<&ResourceRequirements>> = match own {
        Some(own) if own.limits.is_some() || own.requests.is_some() => vec![Some(own)],
        _ => spec::main_containers(pod)
            .iter()
            .chain(spec::init_containers(pod))
            .map(|c| c.resources.as_ref())
            .collect(),
    };
    let value = |list, name| of(list, name).and_then(milli).filter(|v| *v > 0);
    let (mut any, mut guaranteed) = (false, true);
    for resources in each {
        for name in ["cpu", "memory"] {
            let limit = value(limits(resources), name);
            let request = value(requests(resources), name).or(limit);
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && limit == request;
        }
    }
    match (any, guaranteed) {
        (false, _) => QosClass::BestEffort,
        (true, true) => QosClass::Guaranteed,
        (true, false) => QosClass::Burstable,
    }
}

/// 1024 shares are one CPU; at least 2.
pub fn shares(milli_cpu: i128) -> u64 {
    u64::try_from(milli_cpu * 1024 / 1000).unwrap_or(u64::MAX).clamp(MIN_SHARES, MAX_SHARES)
}

fn quota_us(milli_cpu: i128) -> i64 {
    let quota = milli_cpu * i128::from(CPU_PERIOD_US) / 1000;
    i64::try_from(quota).unwrap_or(i64::MAX).max(MIN_QUOTA_US)
}

/// Values of the pod's own cgroup.
pub fn pod_resources(pod: &Pod, pids_limit: Option<i64>) -> Resources {
    let best_effort = qos_class(pod) == QosClass::BestEffort;
    let cpu_limit = pod_limit_milli(pod, "cpu");
    let request = pod_request_milli(pod, "cpu");
    let memory = pod_limit_milli(pod, "memory").and_then(|m| i64::try_from(m / 1000).ok());
    Resources {
        cpu_shares: Some(if best_effort { MIN_SHARES } else { shares(request) }),
        cpu_quota_us: cpu_limit.map(quota_us),
        cpu_period_us: cpu_limit.map(|_| CPU_PERIOD_US),
        memory_limit_bytes: memory,
        pids_limit,
        oom_score_adj: 0,
    }
}

/// Values of one container's cgroup. `memory_capacity` is the node's, in bytes.
pub fn container_resources(pod: &Pod, container: &Container, memory_capacity: i64) -> Resources {
    let cpu_limit = limit(container, "cpu").and_then(milli).filter(|v| *v > 0);
    let request = request(container, "cpu").and_then(milli).unwrap_or(0);
    Resources {
        cpu_shares: Some(shares(request)),
        cpu_quota_us: cpu_limit.map(quota_us),
        cpu_period_us: cpu_limit.map(|_| CPU_PERIOD_US),
        memory_limit_bytes: limit(container, "memory").and_then(whole).filter(|v| *v > 0),
        pids_limit: None,
        oom_score_adj: oom_score_adj(pod, container, memory_capacity),
    }
}

/// Which process the kernel kills first when memory runs out.
pub fn oom_score_adj(pod: &Pod, container: &Container, memory_capacity: i64) -> i32 {
    if spec::is_critical(pod) {
        return -997;
    }
    match qos_class(pod) {
        QosClass::Guaranteed => -997,
        QosClass::BestEffort => 1000,
        QosClass::Burstable => {
            let own = burstable_score(container, memory_capacity);
            let sidecar = spec::init_containers(pod)
                .iter()
                .any(|c| c.name == container.name && spec::is_sidecar(c));
            if !sidecar {
                return own;
            }
            // A sidecar must not be killed before what it serves.
            let mains = spec::main_containers(pod).iter();
            mains.map(|c| burstable_score(c, memory_capacity)).min().map_or(own, |m| own.min(m))
        }
    }
}

fn burstable_score(container: &Container, memory_capacity: i64) -> i32 {
    let request = request(container, "memory").and_then(whole).unwrap_or(0);
    let used = i128::from(request) * 1000 / i128::from(memory_capacity.max(1));
    i32::try_from(1000 - used).unwrap_or(3).clamp(3, 999)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn quantities_beyond_all_machines_are_the_largest_that_there_are() {
        let resources = json!({ "requests": { "cpu": "9".repeat(35), "memory": "9".repeat(35) } });
        let container = |name| json!({ "name": name, "resources": resources });
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {},
            "spec": { "containers": [container("a"), container("b")], "overhead": { "cpu": "9E" } },
        }))
        .unwrap();
        assert_eq!(pod_resources(&pod, None).cpu_shares, Some(MAX_SHARES));
        let first = &spec::main_containers(&pod)[0];
        assert_eq!(container_resources(&pod, first, 1 << 30).cpu_shares, Some(MAX_SHARES));
        assert_eq!(oom_score_adj(&pod, first, 1 << 30), 3);
    }
}
