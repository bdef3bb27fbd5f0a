//! What a pod asks for and what a node has, in numbers that can be added and compared.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::quantity;

/// Amounts by resource name: `cpu` in milli-cores, everything else in whole units.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Amounts(pub(crate) BTreeMap<String, i64>);

impl Amounts {
    /// Reads a resource list; a quantity that cannot be read counts as nothing, since validation has refused it before.
    pub(crate) fn from_list(list: Option<&BTreeMap<String, Quantity>>) -> Self {
        let read = |(name, quantity): (&String, &Quantity)| {
            let amount = if name == "cpu" { milli(&quantity.0) } else { whole(&quantity.0) };
            (name.clone(), amount.unwrap_or(0))
        };
        Self(list.into_iter().flatten().map(read).collect())
    }

    /// The amount of one resource, zero where it is not named.
    pub(crate) fn get(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Adds `other` to this.
    pub(crate) fn add(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let sum = self.0.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*amount);
        }
    }

    /// Takes `other` away from this.
    pub(crate) fn subtract(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let sum = self.0.entry(name.clone()).or_default();
            *sum = sum.saturating_sub(*amount);
        }
    }

    /// Raises each amount to at least that of `other`.
    fn raise_to(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let held = self.0.entry(name.clone()).or_default();
            *held = (*held).max(*amount);
        }
    }
}

/// What a pod reserves on its node: the larger of what runs for good and of what each init step needs, plus overhead.
///
/// Sidecars (init containers with `restartPolicy: Always`) run for good from their place in the order on.
pub(crate) fn pod_request(pod: &Pod) -> Amounts {
    let Some(spec) = &pod.spec else { return Amounts::default() };
    let mut running = Amounts::default();
    for container in &spec.containers {
        running.add(&container_request(container));
    }
    let mut sidecars = Amounts::default();
    let mut peak = Amounts::default();
    for init in spec.init_containers.iter().flatten() {
        let request = container_request(init);
        if init.restart_policy.as_deref() == Some("Always") {
            sidecars.add(&request);
            peak.raise_to(&sidecars);
        } else {
            let mut step = sidecars.clone();
            step.add(&request);
            peak.raise_to(&step);
        }
    }
    running.add(&sidecars);
    running.raise_to(&peak);
    if let Some(resources) = &spec.resources {
        // Pod-level requests replace the sum of the containers for the resources that they name.
        running.0.extend(requests(resources).0);
    }
    running.add(&Amounts::from_list(spec.overhead.as_ref()));
    running
}

fn container_request(container: &Container) -> Amounts {
    container.resources.as_ref().map(requests).unwrap_or_default()
}

/// Requests, with limits standing in where only a limit is given (as the API server's defaults do).
fn requests(resources: &ResourceRequirements) -> Amounts {
    let mut amounts = Amounts::from_list(resources.limits.as_ref());
    amounts.0.extend(Amounts::from_list(resources.requests.as_ref()).0);
    amounts
}

/// A quantity in thousandths, rounded up.
fn milli(text: &str) -> Option<i64> {
    rounded_up(text, 1_000_000)
}

/// A quantity in whole units, rounded up.
fn whole(text: &str) -> Option<i64> {
    rounded_up(text, 1_000_000_000)
}

fn rounded_up(text: &str, nanos_per_unit: i128) -> Option<i64> {
    let units = quantity::nano(text)?.checked_add(nanos_per_unit - 1)?.div_euclid(nanos_per_unit);
    i64::try_from(units).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_round_up_and_know_every_suffix() {
        let table = [
            ("100m", Some(100)),
            ("1", Some(1000)),
            ("0.1", Some(100)),
            ("1.5", Some(1500)),
            ("1n", Some(1)),
            ("2k", Some(2_000_000)),
            ("1e3", Some(1_000_000)),
            ("1Ki", Some(1_024_000)),
            ("-1", Some(-1000)),
            ("", None),
            ("x", None),
            ("1Q", None),
        ];
        for (text, want) in table {
            assert_eq!(milli(text), want, "{text}");
        }
        assert_eq!(whole("128Mi"), Some(134_217_728));
        assert_eq!(whole("1500m"), Some(2));
        assert_eq!(whole("1E"), Some(1_000_000_000_000_000_000));
    }

    #[test]
    fn an_init_step_counts_only_while_it_is_larger_and_a_sidecar_always() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"spec": {
            "overhead": {"cpu": "10m"},
            "initContainers": [
                {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "50m"}}},
                {"name": "init", "resources": {"requests": {"cpu": "300m", "memory": "10"}}}],
            "containers": [
                {"name": "a", "resources": {"requests": {"cpu": "100m"}}},
                {"name": "b", "resources": {"limits": {"cpu": "100m", "memory": "64"}}}]}}))
        .unwrap();
        let request = pod_request(&pod);
        assert_eq!((request.get("cpu"), request.get("memory")), (360, 64));
    }
}
