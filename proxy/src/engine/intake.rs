//! Takes in what the watches tell: into the model, and what concerns the whole node.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipnetwork::IpNetwork;
use kube::runtime::watcher::Event;

use super::progress::Progress;
use crate::backend::BackendConfig;
use crate::clock::Now;
use crate::config::ProxyConfig;
use crate::metrics::Metrics;
use crate::model::objects::{EndpointSlice, Node, Service, ServiceCidr};
use crate::model::{Family, Model, ServiceKey, key_of};
use crate::node;
use crate::watch::Wake;

const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Which lists are complete, and what the current ones held so far.
#[derive(Default)]
struct Lists {
    services: Option<HashSet<ServiceKey>>,
    slices: Option<HashSet<ServiceKey>>,
    cidrs: BTreeMap<String, Vec<IpNetwork>>,
    services_done: bool,
    slices_done: bool,
    node_done: bool,
}

/// A change of endpoints whose time of cause is known.
pub(crate) struct Trigger {
    pub(crate) service: Option<ServiceKey>,
    pub(crate) family: Family,
    /// How old it was when it arrived, by another machine's clock: the only time that clocks are compared.
    before: Duration,
    arrived: Instant,
}

impl Trigger {
    /// Time since the cause.
    pub(crate) fn age(&self, now: Now) -> Duration {
        self.before + now.steady.saturating_duration_since(self.arrived)
    }
}

pub(crate) struct Intake {
    pub(crate) config: ProxyConfig,
    pub(crate) model: Model,
    lists: Lists,
    node: Option<Node>,
    /// The facts about the node may have changed.
    pub(super) reconfigure: bool,
    pub(super) triggers: Vec<Trigger>,
    metrics: Arc<Metrics>,
    progress: Arc<Progress>,
}

impl Intake {
    pub(super) fn new(config: ProxyConfig, metrics: Arc<Metrics>, progress: Arc<Progress>) -> Self {
        Intake {
            model: Model::new(node::facts(&config, None)),
            config,
            lists: Lists::default(),
            node: None,
            reconfigure: false,
            triggers: Vec::new(),
            metrics,
            progress,
        }
    }

    /// All that there is was listed: what is not in the model does not exist.
    pub(super) fn is_complete(&self) -> bool {
        self.lists.services_done && self.lists.slices_done && self.lists.node_done
    }

    pub(super) fn node_name(&self) -> &str {
        &self.config.node_name
    }

    pub(super) fn backend_config(&self) -> BackendConfig {
        let mut ranges: Vec<IpNetwork> = self.lists.cidrs.values().flatten().copied().collect();
        ranges.sort_unstable();
        ranges.dedup();
        node::backend_config(&self.config, self.node.as_ref(), ranges)
    }

    /// False when it is time to stop.
    pub(super) fn take(&mut self, wake: Wake, now: Now) -> bool {
        match wake {
            Wake::Service(event) => self.take_service(event, now),
            Wake::Slice(event) => self.take_slice(event, now),
            Wake::Node(event) => self.take_node(event),
            Wake::Cidr(event) => self.take_cidr(event),
            Wake::Stop => return false,
        }
        true
    }

    /// Takes note that something waits.
    pub(super) fn note_pending(&self, now: Now) {
        if self.model.pending() > 0 {
            self.progress.update(|state| {
                state.waiting_since.get_or_insert(now.steady);
            });
        }
    }

    fn take_service(&mut self, event: Event<Service>, now: Now) {
        if is_change(&event, self.lists.services_done) {
            Family::BOTH.into_iter().for_each(|family| self.metrics.queued(family, now));
            self.metrics.service_changes.inc();
            self.metrics.services_pending.inc();
        }
        match event {
            Event::Init => self.lists.services = Some(HashSet::new()),
            Event::InitApply(service) => {
                self.lists.services.get_or_insert_default().insert(key_of(&service.metadata));
                self.model.apply_service(&service);
            }
            Event::InitDone => {
                let listed = self.lists.services.take().unwrap_or_default();
                self.model.retain_services(&listed);
                self.lists.services_done = true;
            }
            Event::Apply(service) => {
                self.model.apply_service(&service);
            }
            Event::Delete(service) => {
                self.model.delete_service(&key_of(&service.metadata));
            }
        }
    }

    fn take_slice(&mut self, event: Event<EndpointSlice>, now: Now) {
        if is_change(&event, self.lists.slices_done) {
            if let Event::Apply(slice) | Event::InitApply(slice) | Event::Delete(slice) = &event {
                self.metrics.queued(family_of(slice), now);
            }
            self.metrics.endpoint_changes.inc();
            self.metrics.endpoints_pending.inc();
        }
        match event {
            Event::Init => self.lists.slices = Some(HashSet::new()),
            Event::InitApply(slice) => {
                self.lists.slices.get_or_insert_default().insert(key_of(&slice.metadata));
                self.model.apply_slice(&slice);
            }
            Event::InitDone => {
                let listed = self.lists.slices.take().unwrap_or_default();
                self.model.retain_slices(&listed);
                self.lists.slices_done = true;
            }
            Event::Apply(slice) => {
                self.triggers.extend(trigger(&slice, now));
                self.model.apply_slice(&slice);
            }
            Event::Delete(slice) => {
                self.model.delete_slice(&key_of(&slice.metadata));
            }
        }
    }

    fn take_node(&mut self, event: Event<Node>) {
        match event {
            Event::Init => return,
            Event::InitDone => self.lists.node_done = true,
            Event::Apply(node) | Event::InitApply(node) => {
                let leaving = node::is_leaving(&node);
                self.progress.update(|state| state.node_leaving = leaving);
                self.node = Some(node);
            }
            // A deleted Node does not change what the kernel shall do.
            Event::Delete(_) => self.progress.update(|state| state.node_leaving = true),
        }
        self.model.set_node(node::facts(&self.config, self.node.as_ref()));
        self.reconfigure = true;
    }

    /// Ranges that were there before a new list are kept until the list is complete.
    fn take_cidr(&mut self, event: Event<ServiceCidr>) {
        let name = |cidr: &ServiceCidr| cidr.metadata.name.clone().unwrap_or_default();
        match event {
            Event::Init | Event::InitDone => {}
            Event::Apply(cidr) | Event::InitApply(cidr) => {
                let texts = cidr.spec.cidrs.iter().flatten();
                let ranges = texts.filter_map(|text| text.parse().ok()).collect();
                self.lists.cidrs.insert(name(&cidr), ranges);
            }
            Event::Delete(cidr) => {
                self.lists.cidrs.remove(&name(&cidr));
            }
        }
        self.reconfigure = true;
    }
}

/// Whether an object is new or different: as far as that is known without looking. What a first list holds
/// is new, what a later one repeats is not.
fn is_change<K>(event: &Event<K>, listed: bool) -> bool {
    match event {
        Event::Apply(_) | Event::Delete(_) => true,
        Event::InitApply(_) => !listed,
        Event::Init | Event::InitDone => false,
    }
}

fn family_of(slice: &EndpointSlice) -> Family {
    if slice.address_type == "IPv6" { Family::V6 } else { Family::V4 }
}

fn trigger(slice: &EndpointSlice, now: Now) -> Option<Trigger> {
    let text = slice.metadata.annotations.as_ref()?.get(TRIGGER_ANNOTATION)?;
    let at = text.parse::<jiff::Timestamp>().ok().map(SystemTime::from)?;
    let labels = slice.metadata.labels.as_ref();
    let service = labels.and_then(|labels| labels.get("kubernetes.io/service-name"));
    let namespace = slice.metadata.namespace.as_deref().unwrap_or("");
    Some(Trigger {
        service: service.map(|name| ServiceKey::new(namespace, name)),
        family: family_of(slice),
        before: now.since(at),
        arrived: now.steady,
    })
}
