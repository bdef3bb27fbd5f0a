//! The Service model: from API objects to the desired state, without any I/O.
//!
//! ```text
//! Services ─┐                     ┌─ ServicePlan (per Service: ports ─ endpoints, frontends)
//!           ├─ Model ─ dirty keys ┤
//! Slices  ──┘                     └─ backends only translate plans
//! ```
//!
//! Everything that Kubernetes says about Services is decided here and only here. A change marks the
//! Services that it concerns; only those are planned anew, so work follows the change.

mod endpoints;
pub mod objects;
mod plan;
mod routes;
mod service;
mod slice;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use objects::{EndpointSlice, Service};
use service::ServiceFacts;
use slice::{SliceFacts, SliceReader};

pub use endpoints::{Reason, Verdict};
pub use plan::{
    At, Endpoint, Family, Frontend, FrontendKey, Masquerade, PortPlan, Protocol, Route, Scope,
    ServiceKey, ServicePlan, Target,
};
pub use service::parse_address;

/// What the model must know about the node it plans for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node's name: endpoints that carry it are local.
    pub name: String,
    /// The node's addresses.
    pub addresses: Vec<IpAddr>,
    /// The node's zone, by which hints are followed.
    pub zone: Option<String>,
    /// Pods can be told from other sources (the cluster's pod ranges are known).
    pub knows_pods: bool,
    /// Masquerade all traffic to ClusterIPs.
    pub masquerade_all: bool,
}

/// Who asks for a frontend. Nearly always one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Claim {
    One(ServiceKey),
    /// In order of precedence: the oldest Service first.
    Several(BTreeSet<(i64, ServiceKey)>),
}

/// All Services and EndpointSlices that were seen, and which Services need planning.
#[derive(Debug, Default)]
pub struct Model {
    node: NodeFacts,
    reader: SliceReader,
    services: HashMap<ServiceKey, ServiceFacts>,
    slices: HashMap<ServiceKey, Vec<SliceFacts>>,
    slice_owners: HashMap<Box<str>, ServiceKey>,
    claims: HashMap<FrontendKey, Claim>,
    dirty: HashSet<ServiceKey>,
    problems: Vec<Problem>,
}

/// What a load balancer's health check shall learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The healthCheckNodePort.
    pub port: u16,
    /// Ready endpoints on this node: IPv4, IPv6.
    pub ready_here: [usize; 2],
}

/// Something in an object that had to be left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Kind of the object.
    pub kind: &'static str,
    /// `namespace/name`.
    pub object: String,
    /// Field and what is wrong with it.
    pub what: String,
}

impl Model {
    #[must_use]
    pub fn new(node: NodeFacts) -> Self {
        Model { node, ..Model::default() }
    }

    /// Takes note of new facts about the node; all Services are planned anew when they differ.
    ///
    /// A new node name is not among them: which endpoints are local was decided when they came.
    pub fn set_node(&mut self, node: NodeFacts) {
        if self.node != node {
            self.node = node;
            self.dirty.extend(self.services.keys().cloned());
        }
    }

    #[must_use]
    pub fn node(&self) -> &NodeFacts {
        &self.node
    }

    /// A Service was added or changed.
    pub fn apply_service(&mut self, service: &Service) {
        let key = key_of(&service.metadata);
        let (facts, problems) = service::read_service(service);
        self.note("Service", &key, problems);
        let Some(facts) = facts else { return self.delete_service(&key) };
        if self.services.get(&key) == Some(&facts) {
            return;
        }
        if let Some(old) = self.services.remove(&key) {
            self.release(&key, &old);
        }
        self.claim(&key, &facts);
        self.services.insert(key.clone(), facts);
        self.dirty.insert(key);
    }

    /// A Service is gone.
    pub fn delete_service(&mut self, key: &ServiceKey) {
        if let Some(old) = self.services.remove(key) {
            self.release(key, &old);
            self.dirty.insert(key.clone());
        }
    }

    /// An EndpointSlice was added or changed; it may have moved to another Service.
    pub fn apply_slice(&mut self, slice: &EndpointSlice) {
        let name = key_of(&slice.metadata);
        let (facts, problems) = self.reader.read(slice, &self.node.name);
        self.note("EndpointSlice", &name, problems);
        let (Some(owner), Some(facts)) = (slice::owner(slice), facts) else {
            return self.delete_slice(&name);
        };
        let full_name = name.to_string().into_boxed_str();
        if self.slice_owners.get(&full_name).is_some_and(|old| *old != owner) {
            self.delete_slice(&name);
        }
        let slices = self.slices.entry(owner.clone()).or_default();
        match slices.iter_mut().find(|found| found.name == facts.name) {
            Some(same) if *same == facts => return,
            Some(old) => *old = facts,
            None => slices.push(facts),
        }
        self.slice_owners.insert(full_name, owner.clone());
        if self.services.contains_key(&owner) {
            self.dirty.insert(owner);
        }
    }

    /// An EndpointSlice (`namespace/name`) is gone.
    pub fn delete_slice(&mut self, name: &ServiceKey) {
        let full_name = name.to_string();
        let Some(owner) = self.slice_owners.remove(full_name.as_str()) else { return };
        let short = full_name.rsplit('/').next().unwrap_or_default();
        if let Some(slices) = self.slices.get_mut(&owner) {
            slices.retain(|slice| *slice.name != *short);
            if slices.is_empty() {
                self.slices.remove(&owner);
            }
        }
        if self.services.contains_key(&owner) {
            self.dirty.insert(owner);
        }
    }

    /// A complete list of Services arrived: those that are not in it are gone.
    pub fn retain_services(&mut self, listed: &HashSet<ServiceKey>) {
        let gone: Vec<_> =
            self.services.keys().filter(|key| !listed.contains(*key)).cloned().collect();
        for key in gone {
            self.delete_service(&key);
        }
    }

    /// A complete list of EndpointSlices arrived: those that are not in it are gone.
    pub fn retain_slices(&mut self, listed: &HashSet<ServiceKey>) {
        let listed: HashSet<String> = listed.iter().map(ServiceKey::to_string).collect();
        let names = self.slice_owners.keys().filter(|name| !listed.contains(&***name));
        let gone: Vec<Box<str>> = names.cloned().collect();
        for name in gone {
            let (namespace, name) = name.split_once('/').unwrap_or(("", &name));
            self.delete_slice(&ServiceKey::new(namespace, name));
        }
    }

    /// The Services that changed since the last call.
    pub fn take_dirty(&mut self) -> HashSet<ServiceKey> {
        std::mem::take(&mut self.dirty)
    }

    /// How many Services wait to be planned.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.dirty.len()
    }

    /// What was wrong in the objects since the last call.
    pub fn take_problems(&mut self) -> Vec<Problem> {
        std::mem::take(&mut self.problems)
    }

    /// What is to be in force for a Service; nothing when it does not exist.
    #[must_use]
    pub fn plan(&self, key: &ServiceKey) -> Option<ServicePlan> {
        let service = self.services.get(key)?;
        let slices = self.slices.get(key).map_or(&[][..], Vec::as_slice);
        let owns = |frontend: &FrontendKey| match self.claims.get(frontend) {
            Some(Claim::One(owner)) => owner == key,
            Some(Claim::Several(all)) => all.first().is_some_and(|(_, owner)| owner == key),
            None => false,
        };
        Some(routes::plan_service(service, slices, &self.node, owns))
    }

    /// Where and what load balancers are told about a Service; nothing when it has no such port.
    #[must_use]
    pub fn health_check(&self, key: &ServiceKey) -> Option<HealthCheck> {
        let port = self.services.get(key)?.health_check_port?;
        let slices = self.slices.get(key).map_or(&[][..], Vec::as_slice);
        let ready_here = Family::BOTH.map(|family| slice::ready_here(slices, family));
        Some(HealthCheck { port, ready_here })
    }

    /// What was made of each endpoint of a Service port, and why.
    #[must_use]
    pub fn explain_endpoints(&self, key: &ServiceKey) -> Vec<Verdict> {
        let Some(service) = self.services.get(key) else { return Vec::new() };
        let slices = self.slices.get(key).map_or(&[][..], Vec::as_slice);
        endpoints::explain(service, slices, &self.node)
    }

    /// All Services that have a plan.
    pub fn services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.services.keys()
    }

    fn claim(&mut self, key: &ServiceKey, facts: &ServiceFacts) {
        for frontend in routes::frontend_keys(facts) {
            let claim = match self.claims.remove(&frontend) {
                None => Claim::One(key.clone()),
                Some(Claim::One(only)) if only == *key => Claim::One(only),
                Some(Claim::One(other)) => {
                    let since = self.services.get(&other).map_or(0, |facts| facts.created);
                    self.conflict(&frontend, key, &other);
                    Claim::Several(BTreeSet::from([(since, other), (facts.created, key.clone())]))
                }
                Some(Claim::Several(mut all)) => {
                    all.insert((facts.created, key.clone()));
                    Claim::Several(all)
                }
            };
            if let Claim::Several(all) = &claim {
                self.dirty.extend(all.iter().map(|(_, claimant)| claimant.clone()));
            }
            self.claims.insert(frontend, claim);
        }
    }

    fn conflict(&mut self, frontend: &FrontendKey, key: &ServiceKey, other: &ServiceKey) {
        let what = format!("{frontend} is also asked for by {other}; the older Service has it");
        self.problems.push(Problem { kind: "Service", object: key.to_string(), what });
    }

    fn release(&mut self, key: &ServiceKey, facts: &ServiceFacts) {
        for frontend in routes::frontend_keys(facts) {
            let left = match self.claims.remove(&frontend) {
                Some(Claim::One(owner)) if owner != *key => Some(Claim::One(owner)),
                Some(Claim::Several(mut all)) => {
                    all.remove(&(facts.created, key.clone()));
                    self.dirty.extend(all.iter().map(|(_, claimant)| claimant.clone()));
                    match all.len() {
                        1 => all.pop_first().map(|(_, only)| Claim::One(only)),
                        _ => Some(Claim::Several(all)),
                    }
                }
                _ => None,
            };
            if let Some(left) = left {
                self.claims.insert(frontend, left);
            }
        }
    }

    fn note(&mut self, kind: &'static str, object: &ServiceKey, problems: Vec<String>) {
        self.problems.extend(problems.into_iter().map(|what| Problem {
            kind,
            object: object.to_string(),
            what,
        }));
    }
}

/// `namespace/name` of an object.
#[must_use]
pub fn key_of(meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> ServiceKey {
    ServiceKey::new(meta.namespace.as_deref().unwrap_or(""), meta.name.as_deref().unwrap_or(""))
}
