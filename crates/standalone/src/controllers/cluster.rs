//! What the controllers know of the API: typed copies of the objects, fed by watches, shared by all controllers.
//!
//! A table may lag behind the store by the events that are still on their way. Whoever writes and then decides on
//! such a table again must wait until it has caught up: see [`super::expectations`].

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use k8s_openapi::Metadata;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Names an object within its kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    pub(crate) fn of(meta: &ObjectMeta) -> Self {
        Self::new(
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
        )
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// What happened to an object: its state before and after.
#[derive(Debug)]
pub(crate) struct Delta<T> {
    pub(crate) old: Option<Arc<T>>,
    pub(crate) new: Option<Arc<T>>,
}

impl<T> Delta<T> {
    /// The object as it is, or as it last was.
    pub(crate) fn latest(&self) -> Option<&Arc<T>> {
        self.new.as_ref().or(self.old.as_ref())
    }

    /// Both states, as far as there are.
    pub(crate) fn both(&self) -> impl Iterator<Item = &Arc<T>> {
        self.old.iter().chain(&self.new)
    }
}

/// Any change that controllers look at.
#[derive(Debug)]
pub(crate) enum Change {
    Pod(Delta<Pod>),
    Node(Delta<Node>),
    ReplicaSet(Delta<ReplicaSet>),
    Deployment(Delta<Deployment>),
    Service(Delta<Service>),
    EndpointSlice(Delta<EndpointSlice>),
    Endpoints(Delta<Endpoints>),
    Namespace(Delta<Namespace>),
    Lease(Delta<Lease>),
    ServiceAccount(Delta<ServiceAccount>),
    /// A ConfigMap `kube-root-ca.crt`.
    RootCa(Delta<ConfigMap>),
}

/// All tables.
#[derive(Debug, Default)]
pub(crate) struct Cluster {
    pub(crate) pods: Table<Pod>,
    pub(crate) nodes: Table<Node>,
    pub(crate) replica_sets: Table<ReplicaSet>,
    pub(crate) deployments: Table<Deployment>,
    pub(crate) services: Table<Service>,
    pub(crate) endpoint_slices: Table<EndpointSlice>,
    pub(crate) endpoints: Table<Endpoints>,
    pub(crate) namespaces: Table<Namespace>,
    /// Those of nodes.
    pub(crate) leases: Table<Lease>,
    /// Those called `default`.
    pub(crate) accounts: Table<ServiceAccount>,
    pub(crate) root_cas: Table<ConfigMap>,
}

/// The objects of one kind.
#[derive(Debug)]
pub(crate) struct Table<T> {
    state: RwLock<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    objects: BTreeMap<Key, Arc<T>>,
    revision: u64,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { state: RwLock::new(State { objects: BTreeMap::new(), revision: 0 }) }
    }
}

impl<T: Metadata<Ty = ObjectMeta>> Table<T> {
    pub(crate) fn get(&self, key: &Key) -> Option<Arc<T>> {
        self.read(|state| state.objects.get(key).cloned())
    }

    pub(crate) fn in_namespace(&self, namespace: &str) -> Vec<Arc<T>> {
        let first = Key::new(namespace, "");
        self.read(|state| {
            let from_first = state.objects.range(first..);
            from_first
                .take_while(|(key, _)| key.namespace == namespace)
                .map(|(_, object)| object.clone())
                .collect()
        })
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.read(|state| state.objects.values().cloned().collect())
    }

    pub(crate) fn keys(&self) -> Vec<Key> {
        self.read(|state| state.objects.keys().cloned().collect())
    }

    /// Up to which revision of the store the changes of this kind are here.
    pub(crate) fn revision(&self) -> u64 {
        self.read(|state| state.revision)
    }

    /// Puts in, replaces or (with `None`) takes out one object, as of `revision`; gives back what was there before.
    pub(crate) fn set(&self, key: Key, object: Option<Arc<T>>, revision: u64) -> Option<Arc<T>> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.revision = state.revision.max(revision);
        match object {
            Some(object) => state.objects.insert(key, object),
            None => state.objects.remove(&key),
        }
    }

    /// Notes that nothing happened to this kind up to `revision`.
    pub(crate) fn caught_up(&self, revision: u64) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.revision = state.revision.max(revision);
    }

    fn read<R>(&self, look: impl FnOnce(&State<T>) -> R) -> R {
        // Each change is one map operation, so a panic elsewhere cannot have left half of one behind.
        look(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }
}
