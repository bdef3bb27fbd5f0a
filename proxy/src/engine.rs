//! The one owner of model and backend: takes in what the watches tell and puts it in force.
//!
//! A change that arrives while nothing is going on is put in force at once. Those that arrive while a
//! transaction runs are taken together in the next one, so that transactions grow just as far as the
//! kernel needs.

mod intake;
mod progress;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::addresses::{self, Changes, of_node_ports};
use crate::backend::{Applied, Backend, BackendConfig, BackendError, Counting, Mode};
use crate::clock::Now;
use crate::config::ProxyConfig;
use crate::conntrack::{Checks, Cleaner};
use crate::diff::{Change, Plans, advance};
use crate::events::{Notice, Notices};
use crate::fill::{self, Alarms};
use crate::health_checks::HealthChecks;
use crate::last_known::LastKnown;
use crate::loopback6::Loopback6;
use crate::metrics::Metrics;
use crate::model::{Family, ServiceKey};
use crate::switch::with_sources;
use crate::watch::Wake;
use intake::Intake;
pub(crate) use progress::Progress;

/// How long the next attempt waits when nothing could be put in force.
const RETRY: Duration = Duration::from_secs(5);
/// How long an alarm is not listened to that cannot be read.
const DEAF: Duration = Duration::from_secs(5);
/// How long a single Service that the kernel refused waits for the next attempt.
const RETRY_REFUSED: Duration = Duration::from_secs(30);

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

/// What the engine tells others.
pub(crate) struct Listeners {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) notices: Notices,
    pub(crate) health_checks: HealthChecks,
    pub(crate) loopback6: Loopback6,
    /// Called when everything is in force for the first time.
    pub(crate) on_synced: Box<dyn FnOnce() + Send>,
}

pub(crate) struct Engine {
    intake: Intake,
    plans: Plans,
    mode: Mode,
    backend: Box<dyn Backend>,
    clock: Box<dyn Fn() -> Now + Send>,
    /// What an earlier mode left was looked for.
    alone: bool,
    /// Looks for it; changes must not wait for the programs that this takes.
    leaving: Option<JoinHandle<()>>,
    inbox: Receiver<Wake>,
    bell: Arc<EventFd>,
    address_changes: Option<Changes>,
    own_addresses: Vec<IpAddr>,
    started: bool,
    retry_at: Option<Instant>,
    /// The backend's alarm is not listened to before: it would ring all the time.
    deaf_until: Option<Instant>,
    conntrack: Cleaner,
    last_known: LastKnown,
    metrics: Arc<Metrics>,
    progress: Arc<Progress>,
    notices: Notices,
    alarms: Alarms,
    health_checks: HealthChecks,
    loopback6: Loopback6,
    on_synced: Option<Box<dyn FnOnce() + Send>>,
}

impl Engine {
    /// Opens the backend in the network namespace of the calling thread.
    pub(crate) fn open(
        config: ProxyConfig,
        mode: Mode,
        listeners: Listeners,
    ) -> anyhow::Result<(Engine, Mailbox)> {
        if let Some(limits) = &config.conntrack {
            limits.apply();
        }
        let backend = |config| Ok(mode.open(config)?);
        Engine::with_backend(config, mode, backend, listeners)
    }

    fn with_backend(
        config: ProxyConfig,
        mode: Mode,
        backend: impl FnOnce(BackendConfig) -> anyhow::Result<Box<dyn Backend>>,
        listeners: Listeners,
    ) -> anyhow::Result<(Engine, Mailbox)> {
        let (sender, inbox) = channel();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        let Listeners { metrics, progress, notices, health_checks, loopback6, on_synced } =
            listeners;
        let last_known = LastKnown::new(config.state_file.clone(), &config.node_name);
        let intake = Intake::new(config, Arc::clone(&metrics), Arc::clone(&progress));
        let engine = Engine {
            backend: backend(intake.backend_config())?,
            mode,
            clock: Box::new(Now::read),
            alone: false,
            leaving: None,
            intake,
            plans: Plans::new(),
            inbox,
            bell: Arc::clone(&bell),
            address_changes: Changes::follow(),
            own_addresses: own_addresses(),
            started: false,
            retry_at: None,
            deaf_until: None,
            conntrack: Cleaner::start(Arc::clone(&metrics))?,
            last_known,
            metrics,
            progress,
            notices,
            alarms: Alarms::default(),
            health_checks,
            loopback6,
            on_synced: Some(on_synced),
        };
        Ok((engine, Mailbox { sender, bell }))
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// What the kernel counts of Services, where it does.
    pub(crate) fn counting(&self) -> Option<Arc<dyn Counting>> {
        self.backend.counting()
    }

    /// Works until [`Wake::Stop`]. What is in force stays in force.
    pub(crate) fn run(mut self) -> anyhow::Result<()> {
        self.start_from_last_known();
        loop {
            let now = (self.clock)().steady;
            self.progress.update(|state| state.last_beat = Some(now));
            let alarmed = self.wait()?;
            if !self.take_in((self.clock)()) {
                self.last_known.write_now(&self.plans, &self.intake.backend_config());
                if self.leaving.take().is_some_and(|thread| thread.join().is_err()) {
                    tracing::error!("The thread that leaves other modes panicked");
                }
                return Ok(());
            }
            let disturbed = alarmed && self.is_disturbed();
            self.take_figures();
            if self.intake.is_complete() {
                self.put_in_force(disturbed);
            }
        }
    }

    /// Whether somebody changed what is in force. Who cannot tell is not asked again at once, and everything is compared
    /// meanwhile.
    fn is_disturbed(&mut self) -> bool {
        self.backend.disturbed().unwrap_or_else(|error| {
            tracing::error!(
                error = with_sources(&error),
                "Cannot tell what others changed, retrying"
            );
            self.metrics.refused.inc();
            self.deaf_until = Some((self.clock)().steady + DEAF);
            true
        })
    }

    /// After a reboot the kernel has nothing, and the API server may be a pod that needs Services itself.
    /// After a mere restart the kernel knows better than any file.
    fn start_from_last_known(&mut self) {
        let Some((plans, config)) = self.last_known.read_after_reboot() else { return };
        self.backend.configure(config);
        match self.backend.adopt(&plans) {
            Ok(applied) => {
                let services = plans.len();
                let operations = applied.operations;
                tracing::info!(services, operations, "The last known Services are in force");
                self.plans = plans;
            }
            Err(error) => {
                tracing::error!(
                    error = with_sources(&error),
                    "Cannot program the last known Services"
                );
            }
        }
    }

    /// Sleeps until there is something to do; true when the backend's alarm rang.
    fn wait(&mut self) -> anyhow::Result<bool> {
        let now = (self.clock)();
        self.deaf_until = self.deaf_until.filter(|until| *until > now.steady);
        let timeout = self.timeout(now);
        let bell = self.bell.as_fd();
        let changes = self.address_changes.as_ref().map(Changes::fd);
        // An alarm that is not listened to: the bell once more.
        let alarm = if self.deaf_until.is_none() { self.backend.alarm() } else { bell };
        let fds = [bell, alarm, changes.unwrap_or(bell)];
        let mut events = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut events, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let rang = |event: Option<&PollFd<'_>>| event.and_then(PollFd::any).unwrap_or(false);
        let alarmed = self.deaf_until.is_none() && rang(events.get(1));
        let moved = rang(events.get(2));
        if let Some(changes) = self.address_changes.as_mut().filter(|_| moved) {
            changes.read();
            self.own_addresses = own_addresses();
        }
        // Fails only when the bell did not ring.
        if let Err(error) = self.bell.read() {
            tracing::trace!(%error, "Woken without a message");
        }
        Ok(alarmed)
    }

    /// How long there is nothing to do unless somebody calls.
    fn timeout(&self, now: Now) -> PollTimeout {
        let retries = [self.retry_at, self.deaf_until].into_iter().flatten();
        match retries.chain(self.last_known.due()).min() {
            None => PollTimeout::try_from(progress::BEAT).unwrap_or(PollTimeout::MAX),
            Some(at) => {
                let rest = at.saturating_duration_since(now.steady).min(progress::BEAT);
                PollTimeout::try_from(rest + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
        }
    }

    /// Takes in everything that has arrived; false when it is time to stop.
    fn take_in(&mut self, now: Now) -> bool {
        while let Ok(wake) = self.inbox.try_recv() {
            if !self.intake.take(wake, now) {
                return false;
            }
        }
        for problem in self.intake.model.take_problems() {
            let (kind, object, what) = (problem.kind, &problem.object, &problem.what);
            tracing::warn!(kind, %object, %what, "Left something out");
            self.metrics.left_out.inc();
            self.notices.send(Notice::left_out(problem));
        }
        self.intake.note_pending(now);
        true
    }

    fn put_in_force(&mut self, disturbed: bool) {
        let began = (self.clock)().steady;
        let reconfigured = std::mem::take(&mut self.intake.reconfigure)
            && self.backend.configure(self.intake.backend_config());
        let due = self.retry_at.is_some_and(|at| at <= began);
        let dirty = self.dirty();
        let model = &self.intake.model;
        let at = of_node_ports(&self.intake.backend_config().node_port_ranges, &self.own_addresses);
        self.health_checks.update(dirty.iter().map(|key| (key, model.health_check(key))), at);
        let changes = advance(&mut self.plans, dirty, |key| model.plan(key));
        let all = !self.started || disturbed || reconfigured || due;
        if all || !changes.is_empty() {
            // Also if that is refused now: it is what shall be.
            self.last_known.note_changes((self.clock)(), &changes);
        }
        let result = if all {
            self.backend.adopt(&self.plans)
        } else if changes.is_empty() {
            self.keep_last_known();
            return self.note_idle();
        } else {
            self.backend.apply(&changes, &self.plans)
        };
        self.retry_at = None;
        self.take_figures();
        let whole = match result {
            Ok(applied) => {
                // An alarm may also mean that somebody changed what is beside ours.
                if disturbed && self.started && applied.operations > 0 {
                    self.metrics.repairs.inc();
                    tracing::warn!(
                        operations = applied.operations,
                        "Somebody changed what we programmed; it is mended"
                    );
                }
                self.note_applied(&applied, &changes, all, began);
                applied.refused.is_empty()
            }
            Err(error) => {
                self.note_failure(&error);
                return self.keep_last_known();
            }
        };
        let own = &self.intake.model.node().addresses;
        self.loopback6.update(&changes, &self.intake.backend_config(), own);
        self.keep_last_known();
        // Not before the new rules are in force: else the next packet makes the same flow again.
        self.conntrack.check(match std::mem::replace(&mut self.started, true) {
            true => Checks::after(&changes),
            false => Checks::all(&self.plans),
        });
        // A Service that this mode cannot have keeps what an earlier mode gave it.
        if whole && !std::mem::replace(&mut self.alone, true) {
            self.leave_others();
        }
    }

    /// What the backend has counted, what it was refused, and how full its maps are.
    fn take_figures(&mut self) {
        for what in self.backend.take_troubles() {
            tracing::error!(%what, "The kernel refused a part of the node, retrying");
            self.metrics.refused.inc();
            self.notices.send(Notice::about_node(self.intake.node_name(), "KernelRefused", what));
        }
        let figures = self.backend.take_figures();
        self.metrics.take_in(&figures);
        self.metrics.note_fills(&figures.maps);
        for fill in self.alarms.raise(&figures.maps) {
            let (map, entries, max_entries) = (fill.map, fill.entries, fill.max_entries);
            tracing::warn!(
                map,
                entries,
                max_entries,
                "A BPF map is nearly full and may not become larger"
            );
            self.notices.send(Notice::about_node(
                self.intake.node_name(),
                "MapNearlyFull",
                fill::note(&fill),
            ));
        }
    }

    fn leave_others(&mut self) {
        let (mode, ebpf) = (self.mode, self.intake.backend_config().ebpf);
        let leave = move || {
            crate::switch::leave_others(mode, &ebpf);
            crate::switch::look_for_kube_proxy();
        };
        match std::thread::Builder::new().name("proxy-leaving".to_owned()).spawn(leave) {
            Ok(thread) => self.leaving = Some(thread),
            Err(error) => tracing::warn!(%error, "Cannot look for what another mode left"),
        }
    }

    /// The Services to plan; at the start also those that only the file of the last boot knows.
    fn dirty(&mut self) -> HashSet<ServiceKey> {
        let mut dirty = self.intake.model.take_dirty();
        if !self.started {
            dirty.extend(self.plans.keys().cloned());
        }
        dirty
    }

    fn keep_last_known(&mut self) {
        let now = (self.clock)();
        self.last_known.write_if_due(now, &self.plans, &self.intake.backend_config());
    }

    fn note_idle(&self) {
        self.metrics.services_pending.set(0);
        self.metrics.endpoints_pending.set(0);
        self.progress.update(|state| state.waiting_since = None);
    }

    fn note_applied(&mut self, applied: &Applied, changes: &[Change], all: bool, began: Instant) {
        let now = (self.clock)();
        for (service, error) in &applied.refused {
            tracing::error!(%service, error = with_sources(error), "The kernel refused a Service, retrying");
            self.metrics.refused.inc();
            self.notices.send(Notice::refused(service, &with_sources(error)));
            self.retry_at = Some(now.steady + RETRY_REFUSED);
        }
        let elapsed = now.steady.saturating_duration_since(began);
        let families = if all { Family::BOTH.to_vec() } else { touched(changes) };
        for family in families {
            self.metrics.synced(family, all, elapsed, now);
        }
        self.metrics.operations.inc_by(applied.operations as u64);
        self.metrics.count_without_local(changes);
        for trigger in self.intake.triggers.drain(..) {
            let after = trigger.age(now);
            if trigger.service.is_none_or(|service| self.plans.contains_key(&service)) {
                self.metrics.programmed(trigger.family, after);
            }
        }
        self.note_idle();
        self.progress.update(|state| {
            state.synced = true;
            state.last_update = Some(now.wall);
        });
        tracing::debug!(operations = applied.operations, ?elapsed, "Put changes in force");
        if let Some(on_synced) = self.on_synced.take() {
            let (services, operations) = (self.plans.len(), applied.operations);
            tracing::info!(services, operations, ?elapsed, "Services are in force");
            on_synced();
        }
    }

    fn note_failure(&mut self, error: &BackendError) {
        tracing::error!(error = with_sources(error), "Cannot put changes in force, retrying");
        self.metrics.refused.inc();
        self.retry_at = Some((self.clock)().steady + RETRY);
    }
}

fn own_addresses() -> Vec<IpAddr> {
    addresses::own().unwrap_or_else(|error| {
        tracing::warn!(%error, "Cannot list the node's addresses");
        Vec::new()
    })
}

fn touched(changes: &[Change]) -> Vec<Family> {
    let ports = changes.iter().flat_map(|change| {
        let plans = change.before.iter().chain(&change.plan);
        plans.flat_map(|plan| plan.ports.iter().map(|port| port.family))
    });
    let found: HashSet<Family> = ports.collect();
    Family::BOTH.into_iter().filter(|family| found.contains(family)).collect()
}
