//! What runs on this node, for those who serve it (the kubelet API, metrics).

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::watch;

use super::spec;
use crate::runtime::types::{ContainerState, ObservedContainer, ObservedPod};

/// The pods of this node as their workers last saw them. Cheap to clone; all clones show the same.
#[derive(Debug, Clone)]
pub struct PodRegistry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pods: RwLock<HashMap<String, Entry>>,
    /// The pods that nobody has looked at since the start; `None` until every source has told its whole content once.
    awaited: watch::Sender<Option<HashSet<String>>>,
}

#[derive(Debug, Clone)]
struct Entry {
    pod: Arc<Pod>,
    status: Arc<PodStatus>,
    observed: Option<Arc<ObservedPod>>,
}

impl Default for PodRegistry {
    fn default() -> Self {
        let pods = RwLock::default();
        Self { inner: Arc::new(Inner { pods, awaited: watch::Sender::new(None) }) }
    }
}

impl PodRegistry {
    pub fn new() -> Self {
        Self::default()
    }

    /// Every pod with its newest status, which may be ahead of what the API has.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.read(|pods| pods.values().map(Entry::with_status).collect())
    }

    /// The pod of that name; while a namesake is still stopping, the newer one.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        self.find(namespace, name).map(|entry| entry.with_status())
    }

    /// The newest container of that name in a pod.
    pub fn container(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
    ) -> Option<ObservedContainer> {
        self.containers(namespace, pod, container).into_iter().next()
    }

    /// The id of a container that runs now.
    pub fn container_id(&self, namespace: &str, pod: &str, container: &str) -> Option<String> {
        self.container(namespace, pod, container)
            .filter(|c| matches!(c.state, ContainerState::Running { .. }))
            .map(|c| c.id)
    }

    /// The log file of a container's newest run, or of the one before it.
    pub fn log_path(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        previous: bool,
    ) -> Option<PathBuf> {
        let mut runs = self.containers(namespace, pod, container).into_iter();
        if previous {
            runs.next()?;
        }
        runs.next().map(|c| c.log_path)
    }

    /// Resolves once every pod that was there at the start is here, with what runs of it.
    pub fn settled(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut awaited = self.inner.awaited.subscribe();
        async move {
            drop(awaited.wait_for(|pods| pods.as_ref().is_some_and(HashSet::is_empty)).await);
        }
    }

    /// Every source has told its whole content once: `pods`, by UID.
    pub(super) fn set_synced(&self, mut pods: HashSet<String>) {
        self.read(|known| pods.retain(|uid| !known.contains_key(uid)));
        self.inner.awaited.send_replace(Some(pods));
    }

    fn awaits_no_longer(&self, uid: &str) {
        let remove =
            |pods: &mut Option<HashSet<String>>| pods.as_mut().is_some_and(|pods| pods.remove(uid));
        self.inner.awaited.send_if_modified(remove);
    }

    pub(super) fn update(
        &self,
        pod: &Arc<Pod>,
        status: Arc<PodStatus>,
        observed: Option<Arc<ObservedPod>>,
    ) {
        let entry = Entry { pod: pod.clone(), status, observed };
        self.write(|pods| pods.insert(spec::uid(pod).to_owned(), entry));
        self.awaits_no_longer(spec::uid(pod));
    }

    pub(super) fn remove(&self, uid: &str) {
        self.write(|pods| pods.remove(uid));
        self.awaits_no_longer(uid);
    }

    /// Newest first.
    fn containers(&self, namespace: &str, pod: &str, container: &str) -> Vec<ObservedContainer> {
        let observed = self.find(namespace, pod).and_then(|entry| entry.observed);
        let all = observed.iter().flat_map(|o| &o.containers);
        let mut found: Vec<_> = all.filter(|c| c.name == container).cloned().collect();
        found.sort_by_key(|c| std::cmp::Reverse(c.attempt));
        found
    }

    fn find(&self, namespace: &str, name: &str) -> Option<Entry> {
        self.read(|pods| {
            let same =
                |e: &&Entry| spec::name(&e.pod) == name && spec::namespace(&e.pod) == namespace;
            pods.values()
                .filter(same)
                .max_by_key(|e| e.pod.metadata.creation_timestamp.clone().map(|t| t.0))
                .cloned()
        })
    }

    fn read<T>(&self, look: impl FnOnce(&HashMap<String, Entry>) -> T) -> T {
        look(&self.inner.pods.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, change: impl FnOnce(&mut HashMap<String, Entry>) -> T) -> T {
        change(&mut self.inner.pods.write().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Entry {
    fn with_status(&self) -> Arc<Pod> {
        let mut pod = Pod::clone(&self.pod);
        pod.status = Some(PodStatus::clone(&self.status));
        Arc::new(pod)
    }
}
