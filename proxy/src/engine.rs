//! The one owner of model and backend: takes in what the watches tell and puts it in force.
//!
//! A change that arrives while nothing is going on is put in force at once. Those that arrive while a
//! transaction runs are taken together in the next one, so that transactions grow just as far as the
//! kernel needs.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use kube::runtime::watcher::Event;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::backend::{Applied, Backend, BackendConfig, BackendError, Mode, PodSources};
use crate::config::{LocalSources, NodePortAddresses, ProxyConfig};
use crate::conntrack::{Checks, Cleaner};
use crate::diff::{Plans, advance};
use crate::metrics::{Metrics, now_secs};
use crate::model::objects::{EndpointSlice, Node, Service};
use crate::model::{Model, NodeFacts, ServiceKey, key_of, parse_address};
use crate::watch::Wake;

/// How long the next attempt waits when nothing could be put in force.
const RETRY: Duration = Duration::from_secs(5);
/// How long a single Service that the kernel refused waits for the next attempt.
const RETRY_REFUSED: Duration = Duration::from_secs(30);
const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Sends to the engine from another thread.
#[derive(Clone)]
pub(crate) struct Mailbox {
    sender: Sender<Wake>,
    bell: Arc<EventFd>,
}

impl Mailbox {
    /// False when the engine is gone.
    pub(crate) fn send(&self, wake: Wake) -> bool {
        let sent = self.sender.send(wake).is_ok();
        if let Err(error) = self.bell.write(1) {
            tracing::debug!(%error, "Cannot wake the engine");
        }
        sent
    }
}

/// What health checks may know about the engine.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    inner: Mutex<ProgressState>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ProgressState {
    /// Everything was in force at least once.
    pub(crate) synced: bool,
    /// Since when the oldest change waits.
    pub(crate) waiting_since: Option<Instant>,
    pub(crate) last_update: Option<SystemTime>,
    /// The node is being deleted: load balancers shall stop to send.
    pub(crate) node_leaving: bool,
}

impl Progress {
    pub(crate) fn get(&self) -> ProgressState {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut ProgressState)) {
        change(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Which lists are complete, and what the current ones held so far.
#[derive(Default)]
struct Lists {
    services: Option<HashSet<ServiceKey>>,
    slices: Option<HashSet<ServiceKey>>,
    services_done: bool,
    slices_done: bool,
    node_done: bool,
}

pub(crate) struct Engine {
    config: ProxyConfig,
    model: Model,
    plans: Plans,
    backend: Box<dyn Backend>,
    inbox: Receiver<Wake>,
    bell: Arc<EventFd>,
    lists: Lists,
    node: Option<Node>,
    /// Changes of the node's facts that the backend has not seen yet.
    reconfigure: bool,
    started: bool,
    retry_at: Option<Instant>,
    triggers: Vec<SystemTime>,
    conntrack: Cleaner,
    metrics: Arc<Metrics>,
    progress: Arc<Progress>,
    on_synced: Option<Box<dyn FnOnce() + Send>>,
}

impl Engine {
    /// Opens the backend in the network namespace of the calling thread.
    pub(crate) fn open(
        config: ProxyConfig,
        metrics: Arc<Metrics>,
        progress: Arc<Progress>,
        on_synced: Box<dyn FnOnce() + Send>,
    ) -> anyhow::Result<(Engine, Mailbox)> {
        let (sender, inbox) = channel();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        let mode = choose(config.modes)?;
        let backend = mode.open(backend_config(&config, None))?;
        let engine = Engine {
            model: Model::new(node_facts(&config, None)),
            config,
            plans: Plans::new(),
            backend,
            inbox,
            bell: Arc::clone(&bell),
            lists: Lists::default(),
            node: None,
            reconfigure: false,
            started: false,
            retry_at: None,
            triggers: Vec::new(),
            conntrack: Cleaner::start(metrics.conntrack_deleted.clone())?,
            metrics,
            progress,
            on_synced: Some(on_synced),
        };
        Ok((engine, Mailbox { sender, bell }))
    }

    /// Works until [`Wake::Stop`]. What is in force stays in force.
    pub(crate) fn run(mut self) -> anyhow::Result<()> {
        loop {
            let alarmed = self.wait()?;
            if !self.take_in() {
                return Ok(());
            }
            let disturbed = alarmed && self.backend.disturbed()?;
            if self.lists.services_done && self.lists.slices_done && self.lists.node_done {
                self.put_in_force(disturbed);
            }
        }
    }

    /// Sleeps until there is something to do; true when the backend's alarm rang.
    fn wait(&self) -> anyhow::Result<bool> {
        let timeout = match self.retry_at {
            None => PollTimeout::NONE,
            Some(at) => {
                let rest = at.saturating_duration_since(Instant::now());
                PollTimeout::try_from(rest + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut events = [
            PollFd::new(self.bell.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.backend.alarm(), PollFlags::POLLIN),
        ];
        match poll(&mut events, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let alarmed = events[1].any().unwrap_or(false);
        // Fails only when the bell did not ring.
        if let Err(error) = self.bell.read() {
            tracing::trace!(%error, "Woken without a message");
        }
        Ok(alarmed)
    }

    /// Takes in everything that has arrived; false when it is time to stop.
    fn take_in(&mut self) -> bool {
        while let Ok(wake) = self.inbox.try_recv() {
            match wake {
                Wake::Service(event) => self.take_service(event),
                Wake::Slice(event) => self.take_slice(event),
                Wake::Node(event) => self.take_node(event),
                Wake::Stop => return false,
            }
        }
        for problem in self.model.take_problems() {
            let (kind, object, what) = (problem.kind, problem.object, problem.what);
            tracing::warn!(kind, %object, %what, "Left something out");
        }
        if self.model.pending() > 0 {
            self.progress.update(|state| {
                state.waiting_since.get_or_insert_with(Instant::now);
            });
        }
        true
    }

    fn take_service(&mut self, event: Event<Service>) {
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
                self.metrics.service_changes.inc();
                self.metrics.last_queued.set(now_secs());
                self.model.apply_service(&service);
            }
            Event::Delete(service) => {
                self.metrics.service_changes.inc();
                self.model.delete_service(&key_of(&service.metadata));
            }
        }
    }

    fn take_slice(&mut self, event: Event<EndpointSlice>) {
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
                self.metrics.endpoint_changes.inc();
                self.metrics.last_queued.set(now_secs());
                self.triggers.extend(trigger_time(&slice));
                self.model.apply_slice(&slice);
            }
            Event::Delete(slice) => {
                self.metrics.endpoint_changes.inc();
                self.model.delete_slice(&key_of(&slice.metadata));
            }
        }
    }

    fn take_node(&mut self, event: Event<Node>) {
        match event {
            Event::Init => return,
            Event::InitDone => self.lists.node_done = true,
            Event::Apply(node) | Event::InitApply(node) => {
                let leaving = is_leaving(&node);
                self.progress.update(|state| state.node_leaving = leaving);
                self.node = Some(node);
            }
            // A deleted Node does not change what the kernel shall do.
            Event::Delete(_) => self.progress.update(|state| state.node_leaving = true),
        }
        let facts = node_facts(&self.config, self.node.as_ref());
        if facts != *self.model.node() {
            self.model.set_node(facts);
        }
        self.reconfigure = true;
    }

    fn put_in_force(&mut self, disturbed: bool) {
        let began = Instant::now();
        let reconfigured = std::mem::take(&mut self.reconfigure) && self.configure();
        let due = self.retry_at.is_some_and(|at| at <= began);
        let dirty = self.model.take_dirty();
        let model = &self.model;
        let changes = advance(&mut self.plans, dirty, |key| model.plan(key));
        let result = if !self.started || disturbed || reconfigured || due {
            if disturbed && self.started {
                self.metrics.repairs.inc();
                tracing::warn!("Somebody changed our table, mending it");
            }
            self.backend.adopt(&self.plans)
        } else if changes.is_empty() {
            return self.note_idle();
        } else {
            self.backend.apply(&changes, &self.plans)
        };
        self.retry_at = None;
        match result {
            Ok(applied) => self.note_applied(&applied, began),
            Err(error) => return self.note_failure(&error),
        }
        // Not before the new rules are in force: else the next packet makes the same flow again.
        self.conntrack.check(match std::mem::replace(&mut self.started, true) {
            true => Checks::after(&changes),
            false => Checks::all(&self.plans),
        });
    }

    fn configure(&mut self) -> bool {
        let config = backend_config(&self.config, self.node.as_ref());
        self.backend.configure(config)
    }

    fn note_idle(&self) {
        self.metrics.pending.set(0);
        self.progress.update(|state| state.waiting_since = None);
    }

    fn note_applied(&mut self, applied: &Applied, began: Instant) {
        for (service, error) in &applied.refused {
            tracing::error!(%service, error = %Chain(error), "The kernel refused a Service, retrying");
            self.metrics.sync_failures.inc();
            self.retry_at = Some(Instant::now() + RETRY_REFUSED);
        }
        let elapsed = began.elapsed();
        self.metrics.sync_duration.observe(elapsed.as_secs_f64());
        self.metrics.last_sync.set(now_secs());
        self.metrics.operations.inc_by(applied.operations as u64);
        let now = SystemTime::now();
        for trigger in self.triggers.drain(..) {
            let waited = now.duration_since(trigger).unwrap_or(Duration::ZERO);
            self.metrics.programming_duration.observe(waited.as_secs_f64());
        }
        self.note_idle();
        self.progress.update(|state| {
            state.synced = true;
            state.last_update = Some(now);
        });
        tracing::debug!(operations = applied.operations, ?elapsed, "Put changes in force");
        if let Some(on_synced) = self.on_synced.take() {
            let services = self.plans.len();
            tracing::info!(
                services,
                operations = applied.operations,
                ?elapsed,
                "Services are in force"
            );
            on_synced();
        }
    }

    fn note_failure(&mut self, error: &BackendError) {
        tracing::error!(error = %Chain(error), "Cannot put changes in force, retrying");
        self.metrics.sync_failures.inc();
        self.retry_at = Some(Instant::now() + RETRY);
        self.metrics.pending.set(1);
    }
}

/// Prints an error with its sources.
struct Chain<'a>(&'a (dyn std::error::Error + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

/// The first mode that this kernel can do.
fn choose(modes: &[Mode]) -> anyhow::Result<Mode> {
    let mut reasons = Vec::new();
    for mode in modes {
        match mode.probe() {
            Ok(()) => {
                tracing::info!(%mode, "Programming Services");
                return Ok(*mode);
            }
            Err(error) => {
                tracing::info!(%mode, error = %Chain(&error), "Cannot use a proxy mode here");
                reasons.push(format!("{mode}: {}", Chain(&error)));
            }
        }
    }
    anyhow::bail!("no proxy mode works here: {}", reasons.join("; "))
}

fn trigger_time(slice: &EndpointSlice) -> Option<SystemTime> {
    let text = slice.metadata.annotations.as_ref()?.get(TRIGGER_ANNOTATION)?;
    text.parse::<jiff::Timestamp>().ok().map(SystemTime::from)
}

fn is_leaving(node: &Node) -> bool {
    const TAINT: &str = "ToBeDeletedByClusterAutoscaler";
    let tainted = node.spec.taints.iter().flatten().any(|taint| taint.key == TAINT);
    tainted || node.metadata.deletion_timestamp.is_some()
}

fn node_addresses(config: &ProxyConfig, node: Option<&Node>) -> Vec<std::net::IpAddr> {
    if !config.node_addresses.is_empty() {
        return config.node_addresses.clone();
    }
    let addresses = node.into_iter().flat_map(|node| node.status.addresses.iter().flatten());
    let ips = addresses.filter(|address| matches!(&*address.kind, "InternalIP" | "ExternalIP"));
    ips.filter_map(|address| parse_address(&address.address)).collect()
}

fn zone(node: &Node) -> Option<String> {
    const LABEL: &str = "topology.kubernetes.io/zone";
    node.metadata.labels.as_ref()?.get(LABEL).filter(|zone| !zone.is_empty()).cloned()
}

fn node_facts(config: &ProxyConfig, node: Option<&Node>) -> NodeFacts {
    NodeFacts {
        name: config.node_name.clone(),
        addresses: node_addresses(config, node),
        zone: node.and_then(zone),
        knows_pods: !cluster_cidrs(config, node).is_empty(),
        masquerade_all: config.masquerade_all,
    }
}

fn cluster_cidrs(config: &ProxyConfig, node: Option<&Node>) -> Vec<ipnetwork::IpNetwork> {
    match &config.local_sources {
        LocalSources::Unknown => Vec::new(),
        LocalSources::Cidrs(cidrs) => cidrs.clone(),
        LocalSources::NodeCidrs => {
            let cidrs = node.into_iter().flat_map(|node| node.spec.pod_cidrs.iter().flatten());
            cidrs.filter_map(|cidr| cidr.parse().ok()).collect()
        }
    }
}

fn backend_config(config: &ProxyConfig, node: Option<&Node>) -> BackendConfig {
    let node_port_ranges = match &config.node_port_addresses {
        NodePortAddresses::All => Vec::new(),
        NodePortAddresses::Ranges(ranges) => ranges.clone(),
        NodePortAddresses::Primary => {
            node_addresses(config, node).into_iter().map(ipnetwork::IpNetwork::from).collect()
        }
    };
    let ranges = cluster_cidrs(config, node);
    BackendConfig {
        pods: if ranges.is_empty() { PodSources::Unknown } else { PodSources::Ranges(ranges) },
        node_port_ranges,
        masquerade_bit: config.masquerade_bit,
        ..BackendConfig::default()
    }
}
