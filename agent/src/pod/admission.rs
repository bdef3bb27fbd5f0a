//! May this pod run here? The scheduler's view can be older than ours.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::spec;
use super::status::Ending;
use crate::cgroup::resources;

/// What the admitted pods of this node use.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    used: Mutex<HashMap<String, Use>>,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Use {
    milli: BTreeMap<String, i128>,
    host_ports: Vec<HostPortUse>,
}

type HostPortUse = (String, String, i32);

impl Ledger {
    /// Books what the pod needs, or says why it cannot run here.
    pub(crate) fn admit(
        &self,
        pod: &Pod,
        node: &str,
        allocatable: &BTreeMap<String, Quantity>,
    ) -> Result<(), Ending> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if used.contains_key(spec::uid(pod)) {
            return Ok(());
        }
        let wanted = wanted(pod);
        check_node(pod, node)?;
        check_resources(&wanted, &used, allocatable)?;
        check_ports(&wanted, &used)?;
        used.insert(spec::uid(pod).to_owned(), wanted);
        Ok(())
    }

    /// Books a pod that runs already: it was admitted once and is not asked again.
    pub(crate) fn adopt(&self, pod: &Pod) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.insert(spec::uid(pod).to_owned(), wanted(pod));
    }

    pub(super) fn release(&self, uid: &str) {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// The CPU requests of all admitted burstable pods.
    pub(crate) fn cpu_requests_milli(&self) -> i128 {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.values().filter_map(|u| u.milli.get("cpu")).sum()
    }
}

fn check_node(pod: &Pod, node: &str) -> Result<(), Ending> {
    let wants = spec::spec(pod).and_then(|s| s.node_name.as_deref()).unwrap_or(node);
    if wants != node {
        let message = format!("Pod was rejected: spec.nodeName is {wants}, this node is {node}");
        return Err(Ending { reason: "NodeName".into(), message });
    }
    let os = spec::spec(pod).and_then(|s| s.os.as_ref()).map_or("linux", |os| os.name.as_str());
    if os != "linux" {
        let message = format!("Pod was rejected: spec.os.name is {os}, this node runs linux");
        return Err(Ending { reason: "PodOSNotSupported".into(), message });
    }
    Ok(())
}

fn check_resources(
    wanted: &Use,
    used: &HashMap<String, Use>,
    allocatable: &BTreeMap<String, Quantity>,
) -> Result<(), Ending> {
    for (name, available) in allocatable {
        let capacity = resources::milli(available).unwrap_or(0);
        let taken = |u: &Use| u.milli.get(name).copied().unwrap_or(0);
        let (own, others) = (taken(wanted), used.values().map(taken).sum::<i128>());
        if own > 0 && own + others > capacity {
            // kubelet counts CPU in thousandths here and everything else in whole units.
            let unit = if name == "cpu" { 1 } else { 1000 };
            let message = format!(
                "Pod was rejected: Node didn't have enough resource: {name}, requested: {}, used: {}, capacity: {}",
                own / unit,
                others / unit,
                capacity / unit
            );
            return Err(Ending { reason: format!("OutOf{name}"), message });
        }
    }
    Ok(())
}

fn check_ports(wanted: &Use, used: &HashMap<String, Use>) -> Result<(), Ending> {
    let overlaps = |a: &HostPortUse, b: &HostPortUse| {
        let any = |ip: &str| matches!(ip, "" | "0.0.0.0" | "::");
        a.1 == b.1 && a.2 == b.2 && (any(&a.0) || any(&b.0) || a.0 == b.0)
    };
    let taken = used.values().flat_map(|u| &u.host_ports);
    for other in taken {
        if let Some(port) = wanted.host_ports.iter().find(|port| overlaps(port, other)) {
            let message = format!("Pod was rejected: host port {}/{} is in use", port.2, port.1);
            return Err(Ending { reason: "NodePorts".into(), message });
        }
    }
    Ok(())
}

fn wanted(pod: &Pod) -> Use {
    let mut names: Vec<&str> = vec!["cpu", "memory", "ephemeral-storage"];
    let containers = || spec::main_containers(pod).iter().chain(spec::init_containers(pod));
    for resources in containers().filter_map(|c| c.resources.as_ref()) {
        names.extend(resources.requests.iter().flatten().map(|(name, _)| name.as_str()));
        names.extend(resources.limits.iter().flatten().map(|(name, _)| name.as_str()));
    }
    let mut milli: BTreeMap<String, i128> = names
        .into_iter()
        .map(|name| (name.to_owned(), resources::pod_request_milli(pod, name)))
        .collect();
    milli.insert("pods".into(), 1000);
    Use { milli, host_ports: host_ports(pod) }
}

fn host_ports(pod: &Pod) -> Vec<HostPortUse> {
    let ports = spec::main_containers(pod)
        .iter()
        .chain(spec::init_containers(pod).iter().filter(|c| spec::is_sidecar(c)));
    ports
        .flat_map(|c| c.ports.iter().flatten())
        .filter_map(|port| {
            let number = match spec::host_network(pod) {
                true => Some(port.host_port.unwrap_or(port.container_port)),
                false => port.host_port,
            };
            let number = number.filter(|n| *n > 0)?;
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
            Some((port.host_ip.clone().unwrap_or_default(), protocol, number))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(uid: &str, cpu: &str, host_port: Option<i32>) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": uid, "uid": uid },
            "spec": { "containers": [{
                "name": "c",
                "resources": { "requests": { "cpu": cpu } },
                "ports": [{ "containerPort": 80, "hostPort": host_port }],
            }] },
        }))
        .unwrap()
    }

    fn reason(result: Result<(), Ending>) -> String {
        result.map_or_else(|ending| ending.reason, |()| "ok".into())
    }

    #[test]
    fn a_node_takes_no_more_than_it_has() {
        let ledger = Ledger::default();
        let allocatable = json!({ "cpu": "1", "pods": "3" });
        let allocatable = serde_json::from_value(allocatable).unwrap();
        let admit = |pod: &Pod| reason(ledger.admit(pod, "n", &allocatable));
        assert_eq!(admit(&pod("a", "600m", Some(80))), "ok");
        assert_eq!(admit(&pod("a", "600m", Some(80))), "ok");
        assert_eq!(admit(&pod("b", "600m", None)), "OutOfcpu");
        assert_eq!(admit(&pod("c", "100m", Some(80))), "NodePorts");
        assert_eq!(admit(&pod("d", "100m", Some(81))), "ok");
        assert_eq!(admit(&pod("e", "0", None)), "ok");
        assert_eq!(admit(&pod("f", "0", None)), "OutOfpods");
        ledger.release("e");
        assert_eq!(admit(&pod("f", "0", None)), "ok");
        let mut elsewhere = pod("g", "0", None);
        elsewhere.spec.as_mut().unwrap().node_name = Some("other".into());
        assert_eq!(admit(&elsewhere), "NodeName");
    }
}
