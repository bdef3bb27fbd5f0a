//! Gives every pod its worker, and workers what the sources say.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use keelson_supervise::Heartbeat;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinSet;

use super::bell::Bell;
use super::shared::Node;
use super::source::{SourceKind, Update};
use super::worker::{Desired, Worker};
use super::{mirror, orphans, spec, status};
use crate::runtime::types::RuntimeEvent;

/// The safety net below events: everything looks again this often.
const RESYNC: Duration = Duration::from_secs(300);
const MIRROR_RETRY: Duration = Duration::from_secs(5);

struct Handle {
    desired: watch::Sender<Desired>,
    bell: Arc<Bell>,
    source: SourceKind,
}

pub(super) struct Dispatcher {
    node: Arc<Node>,
    workers: HashMap<String, Handle>,
    running: JoinSet<String>,
    /// Mirror pods by `namespace/name`.
    mirrors: HashMap<String, Arc<Pod>>,
    /// Static pods whose predecessor of the same name is still stopping, by `namespace/name`.
    pending: HashMap<String, Arc<Pod>>,
    /// Sources that have not told their whole content yet.
    unsynced: HashSet<SourceKind>,
    mirrors_stale: bool,
}

/// How often the dispatcher shows that it gets on.
const BEAT: Duration = Duration::from_secs(10);
/// The time for all mirror pods together.
const MIRROR_LIMIT: Duration = Duration::from_secs(30);
/// A dispatcher that is silent for so long hangs: health checks fail, and the watchdog has the agent restarted.
pub(super) const SILENCE: Duration = Duration::from_secs(120);

impl Dispatcher {
    pub(super) fn new(node: Arc<Node>, sources: HashSet<SourceKind>) -> Self {
        Self {
            node,
            workers: HashMap::new(),
            running: JoinSet::new(),
            mirrors: HashMap::new(),
            pending: HashMap::new(),
            unsynced: sources,
            mirrors_stale: true,
        }
    }

    pub(super) async fn run(mut self, mut updates: mpsc::Receiver<Update>, heartbeat: Heartbeat) {
        let mut beat = tokio::time::interval(BEAT);
        let mut events = self.node.runtime.events();
        let cancel = self.node.cancel.clone();
        let mut resync = tokio::time::interval(RESYNC);
        let mut mirror_retry = tokio::time::interval(MIRROR_RETRY);
        mirror_retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // Every arm is cancellation-safe: channels, intervals and join_next lose nothing.
            tokio::select! {
                () = cancel.cancelled() => break,
                Some(update) = updates.recv() => self.update(update),
                event = events.recv() => self.runtime_event(event),
                Some(ended) = self.running.join_next(), if !self.running.is_empty() => {
                    if let Ok(uid) = ended { self.ended(&uid) }
                }
                _ = beat.tick() => heartbeat.beat(),
                _ = resync.tick() => self.ring_all(),
                _ = mirror_retry.tick(), if self.mirrors_stale => self.mirrors_in_time().await,
            }
            if self.mirrors_stale && self.synced() {
                self.mirrors_in_time().await;
            }
        }
        heartbeat.retire();
        // Workers see the same token; wait so that no step is cut in half.
        while self.running.join_next().await.is_some() {}
    }

    /// An API server that hangs must not hold up the pods.
    async fn mirrors_in_time(&mut self) {
        if tokio::time::timeout(MIRROR_LIMIT, self.reconcile_mirrors()).await.is_err() {
            tracing::warn!(limit = ?MIRROR_LIMIT, "Mirror pods not written in time, will retry");
            self.mirrors_stale = true;
        }
    }

    fn synced(&self) -> bool {
        self.unsynced.is_empty()
    }

    fn update(&mut self, update: Update) {
        match update {
            Update::Changed(source, pod) => self.changed(source, pod),
            Update::Gone(pod) => self.gone(&pod),
            Update::All(source, pods) => self.all(source, pods),
        }
    }

    fn all(&mut self, source: SourceKind, pods: Vec<Arc<Pod>>) {
        let uids: HashSet<&str> = pods.iter().map(|pod| spec::uid(pod)).collect();
        let vanished: Vec<Arc<Pod>> = self
            .workers
            .values()
            .filter(|w| w.source == source)
            .map(|w| w.desired.borrow().pod.clone())
            .filter(|pod| !uids.contains(spec::uid(pod)))
            .collect();
        if source == SourceKind::Api {
            self.mirrors.clear();
            self.mirrors_stale = true;
        }
        vanished.iter().for_each(|pod| self.gone(pod));
        pods.into_iter().for_each(|pod| self.changed(source, pod));
        if self.unsynced.remove(&source) && self.synced() {
            let known: HashSet<String> = self.workers.keys().cloned().collect();
            self.node.registry.set_synced(known.clone());
            // What runs and is wanted by nobody: only now can that be known.
            keelson_supervise::spawn("pod cleanup", orphans::remove(self.node.clone(), known));
        }
    }

    fn changed(&mut self, source: SourceKind, pod: Arc<Pod>) {
        if source == SourceKind::Api && spec::is_mirror(&pod) {
            self.mirror_changed(pod);
            return;
        }
        if let Some(handle) = self.workers.get(spec::uid(&pod)) {
            let mirror = self.mirrors.get(&spec::key(&pod)).cloned();
            handle.desired.send_if_modified(|desired| {
                let carrier =
                    |m: &Option<Arc<Pod>>| m.as_ref().and_then(|m| m.metadata.uid.clone());
                let same =
                    is_same(&desired.pod, &pod) && carrier(&desired.mirror) == carrier(&mirror);
                (desired.pod, desired.mirror) = (pod, mirror);
                !same
            });
            return;
        }
        if source == SourceKind::Manifests {
            self.mirrors_stale = true;
            let key = spec::key(&pod);
            let namesake = |w: &Handle| spec::key(&w.desired.borrow().pod) == key;
            if self.workers.values().any(namesake) {
                self.pending.insert(key, pod);
                return;
            }
        }
        self.start(source, pod);
    }

    fn start(&mut self, source: SourceKind, pod: Arc<Pod>) {
        let uid = spec::uid(&pod).to_owned();
        let mirror = self.mirrors.get(&spec::key(&pod)).cloned();
        let (desired, receiver) = watch::channel(Desired { pod, gone: false, mirror });
        let bell = Arc::new(Bell::default());
        let (node, rung, name) = (self.node.clone(), bell.clone(), uid.clone());
        self.running.spawn(async move {
            // A worker observes everything when it starts: one that panicked is simply started again.
            let work = || Worker::new(node.clone(), receiver.clone(), rung.clone()).run();
            keelson_supervise::restarting("pod worker", work).await;
            name
        });
        self.workers.insert(uid, Handle { desired, bell, source });
    }

    fn gone(&mut self, pod: &Arc<Pod>) {
        if spec::is_mirror(pod) && !spec::is_static(pod) {
            let key = spec::key(pod);
            if self.mirrors.get(&key).is_some_and(|known| known.metadata.uid == pod.metadata.uid) {
                self.mirrors.remove(&key);
                self.mirrors_stale = true;
                self.tell_mirror(&key);
            }
            return;
        }
        self.pending.retain(|_, waiting| spec::uid(waiting) != spec::uid(pod));
        if let Some(handle) = self.workers.get(spec::uid(pod)) {
            handle.desired.send_modify(|desired| desired.gone = true);
        }
        if spec::is_static(pod) {
            self.mirrors_stale = true;
        }
    }

    fn ended(&mut self, uid: &str) {
        let Some(handle) = self.workers.remove(uid) else { return };
        let old = handle.desired.borrow().clone();
        let key = spec::key(&old.pod);
        if let Some(next) = self.pending.remove(&key) {
            self.start(SourceKind::Manifests, next);
        }
        self.mirrors_stale |= handle.source == SourceKind::Manifests;
    }

    fn runtime_event(&mut self, event: Result<RuntimeEvent, broadcast::error::RecvError>) {
        match event {
            Ok(RuntimeEvent::Pod { uid }) => {
                if let Some(handle) = self.workers.get(&uid) {
                    handle.bell.ring();
                }
            }
            // Missed some: anything may have changed.
            Ok(RuntimeEvent::Resync) | Err(broadcast::error::RecvError::Lagged(_)) => {
                self.ring_all()
            }
            // The runtime ends with the agent.
            Err(broadcast::error::RecvError::Closed) => {}
        }
    }

    fn ring_all(&self) {
        self.workers.values().for_each(|handle| handle.bell.ring());
    }

    fn mirror_changed(&mut self, pod: Arc<Pod>) {
        let key = spec::key(&pod);
        self.mirrors_stale |= self.static_pod(&key).is_none_or(|own| !mirror::matches(&pod, &own));
        self.mirrors.insert(key.clone(), pod);
        self.tell_mirror(&key);
    }

    fn tell_mirror(&self, key: &str) {
        let mirror = self.mirrors.get(key).cloned();
        for handle in self.workers.values().filter(|h| h.source == SourceKind::Manifests) {
            let own = spec::key(&handle.desired.borrow().pod) == key;
            if own {
                handle.desired.send_if_modified(|desired| {
                    let carrier =
                        |m: &Option<Arc<Pod>>| m.as_ref().and_then(|m| m.metadata.uid.clone());
                    let same = carrier(&desired.mirror) == carrier(&mirror);
                    desired.mirror = mirror.clone();
                    !same
                });
            }
        }
    }

    fn static_pod(&self, key: &str) -> Option<Arc<Pod>> {
        let statics = self.workers.values().filter(|h| h.source == SourceKind::Manifests);
        let mut wanted =
            statics.filter(|h| !h.desired.borrow().gone).map(|h| h.desired.borrow().pod.clone());
        wanted.find(|pod| spec::key(pod) == key)
    }

    /// Makes mirrors that are missing, deletes those that are wrong or whose static pod is gone.
    async fn reconcile_mirrors(&mut self) {
        let Some(client) = self.node.client.clone().filter(|_| self.synced()) else { return };
        let mut failed = false;
        let mut tell = |what: &str, key: &str, result: Result<(), kube::Error>| {
            if let Err(error) = result {
                tracing::warn!(pod = key, what, %error, "Mirror pod not in order, will retry");
                failed = true;
            }
        };
        for (key, known) in &self.mirrors {
            let keep = self.static_pod(key).is_some_and(|own| mirror::matches(known, &own));
            if !keep {
                tell("delete", key, mirror::delete(client.clone(), known).await);
            }
        }
        let statics = self.workers.values().filter(|h| h.source == SourceKind::Manifests);
        let wanted: Vec<_> = statics
            .filter(|h| !h.desired.borrow().gone)
            .map(|h| h.desired.borrow().pod.clone())
            .collect();
        for pod in wanted {
            let key = spec::key(&pod);
            let node = &self.node.config.node_name;
            if !self.mirrors.contains_key(&key) {
                tell("create", &key, mirror::create(client.clone(), node, &pod).await);
            }
        }
        self.mirrors_stale = failed;
    }
}

/// Whether two versions of a pod differ in nothing that a worker acts on. Our own status writes come back through the watch;
/// waking for them would double the work of every start.
fn is_same(old: &Pod, new: &Pod) -> bool {
    let foreign = |pod: &Pod| {
        let conditions = pod.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
        status::foreign_conditions(conditions)
    };
    let mut meta = old.metadata.clone();
    meta.resource_version.clone_from(&new.metadata.resource_version);
    meta == new.metadata && old.spec == new.spec && foreign(old) == foreign(new)
}
