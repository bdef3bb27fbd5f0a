//! The controllers that a single machine needs, and the scheduler.
//!
//! Each is a pure function (wish, observed, now) -> actions with a thin shell: a [`worker`] takes keys from a
//! [`queue`], looks at the tables of [`cluster`] that the [`informer`]s keep equal to the store, and writes through
//! the same registry that serves the API. Nothing polls: without a change or a deadline no task runs.

mod account;
pub(crate) mod cluster;
mod deployment;
mod endpoints;
mod event_ttl;
mod expectations;
mod garbage;
mod informer;
mod namespaces;
mod nodes;
mod ownership;
pub(crate) mod pods;
mod queue;
pub(crate) mod recorder;
mod replicaset;
mod selector;
pub(crate) mod worker;

use std::future::Future;
use std::sync::Arc;

use k8s_openapi::Metadata;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::account::Accounts;
use self::cluster::{Change, Cluster};
use self::deployment::Deployments;
use self::endpoints::ServiceEndpoints;
use self::garbage::Garbage;
use self::informer::{Informer, Informers};
use self::namespaces::Namespaces;
use self::nodes::{NodeCidrs, NodeLifecycle, PodCollection, Range};
use self::recorder::EventWriter;
use self::replicaset::ReplicaSets;
use self::worker::{Controller, Observer, Worker};
use crate::scheduler::Scheduler;
use crate::{ApiError, Registry};

/// How the controllers run.
#[derive(Debug, Clone, Default)]
pub struct ControllersConfig {
    /// PEM of the CA that pods trust for the API server (`kube-root-ca.crt`). Empty: that ConfigMap is not made.
    pub root_ca_pem: String,
    /// Ranges, one per address family, from which nodes without `spec.podCIDRs` get a part. Empty: none do.
    pub node_ranges: Vec<String>,
}

/// The running controllers.
#[derive(Debug)]
pub struct Tasks {
    cancel: CancellationToken,
    tracker: TaskTracker,
}

impl Tasks {
    /// Stops all controllers and waits until the last has ended.
    pub async fn shutdown(self) {
        self.cancel.cancel();
        self.tracker.wait().await;
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn(work);
    }

    fn add<C: Controller>(&self, observers: &mut Vec<Arc<dyn Observer>>, controller: C) {
        let worker = Worker::new(controller);
        observers.push(worker.clone());
        self.spawn(worker.run(self.cancel.clone()));
    }

    fn follow<T>(&self, informer: Informer<T>, revision: u64)
    where
        T: Metadata<Ty = ObjectMeta> + DeserializeOwned + Send + Sync + 'static,
    {
        self.spawn(informer.run(revision, self.cancel.clone()));
    }
}

/// Starts all controllers and the scheduler over `registry`, on the runtime that this is called on. They end when
/// `cancel` is cancelled.
///
/// # Errors
/// When the API server lacks a kind that a controller needs, or a range cannot be read.
pub fn start(
    registry: &Registry,
    config: ControllersConfig,
    cancel: CancellationToken,
) -> Result<Tasks, ApiError> {
    let ranges = config.node_ranges.iter().map(|text| text.parse::<Range>());
    let ranges: Vec<Range> = ranges.collect::<Result<_, _>>().map_err(ApiError::bad_request)?;
    let tasks = Tasks { cancel, tracker: TaskTracker::new() };
    let cluster = Arc::new(Cluster::default());
    let events = EventWriter::new(registry)?;
    let recorder = |component| events.recorder(component);

    let scheduler = Scheduler::new(registry, &cluster, recorder("default-scheduler"))?;
    let sets = ReplicaSets::new(registry, &cluster, recorder("replicaset-controller"))?;
    let rollouts = Deployments::new(registry, &cluster, recorder("deployment-controller"))?;
    let lifecycle = NodeLifecycle::new(registry, &cluster, recorder("node-controller"))?;
    let cidrs = NodeCidrs::new(registry, recorder("cidr-allocator"), ranges)?;
    let collector = Worker::new(Garbage::new(registry));

    // The order is that of urgency: an observer is told before those behind it.
    let mut observers: Vec<Arc<dyn Observer>> = vec![scheduler.clone()];
    tasks.add(&mut observers, ServiceEndpoints::new(registry, &cluster)?);
    tasks.add(&mut observers, sets);
    tasks.add(&mut observers, rollouts);
    tasks.add(&mut observers, Accounts::new(registry, &cluster, config.root_ca_pem)?);
    tasks.add(&mut observers, Namespaces::new(registry, &cluster)?);
    tasks.add(&mut observers, lifecycle);
    tasks.add(&mut observers, cidrs);
    tasks.add(&mut observers, PodCollection::new(registry, &cluster)?);
    watch(&tasks, registry, &cluster, observers)?;

    tasks.spawn(scheduler.run(tasks.cancel.clone()));
    for kind in garbage::kinds_to_follow() {
        tasks.spawn(Garbage::follow(collector.clone(), kind, tasks.cancel.clone()));
    }
    tasks.spawn(collector.run(tasks.cancel.clone()));
    tasks.spawn(event_ttl::run(registry.clone(), tasks.cancel.clone()));
    tasks.spawn(events.run(tasks.cancel.clone()));
    tasks.tracker.close();
    Ok(tasks)
}

/// Fills all tables, then tells of what is in them, then follows the watches: nobody ever decides on a table that is
/// still empty.
fn watch(
    tasks: &Tasks,
    registry: &Registry,
    cluster: &Arc<Cluster>,
    observers: Vec<Arc<dyn Observer>>,
) -> Result<(), ApiError> {
    let informers = Informers {
        registry: registry.clone(),
        cluster: cluster.clone(),
        observers: observers.into(),
    };
    macro_rules! informers {
        ($($name:ident: $table:ident, $change:ident, $wanted:expr;)*) => {
            $(
                let $name = informers
                    .of(|cluster| &cluster.$table, Change::$change, $wanted)
                    .ok_or_else(|| ApiError::internal(concat!("no kind ", stringify!($change))))?;
            )*
            let revisions = [$($name.list(false),)*];
            $($name.announce();)*
            let mut revisions = revisions.into_iter();
            $(tasks.follow($name, revisions.next().unwrap_or(0));)*
        };
    }
    informers! {
        nodes: nodes, Node, |_| true;
        namespaces: namespaces, Namespace, |_| true;
        pods: pods, Pod, |_| true;
        replica_sets: replica_sets, ReplicaSet, |_| true;
        deployments: deployments, Deployment, |_| true;
        services: services, Service, |_| true;
        slices: endpoint_slices, EndpointSlice, endpoints::is_ours;
        endpoints: endpoints, Endpoints, endpoints::is_our_endpoints;
        leases: leases, Lease, |object| &*object.namespace == "kube-node-lease";
        accounts: accounts, ServiceAccount, |object| &*object.name == "default";
        root_cas: root_cas, RootCa, account::is_root_ca;
    }
    Ok(())
}

/// The revision of a written object, to be seen again in a table.
pub(crate) fn revision_of(meta: &ObjectMeta) -> u64 {
    meta.resource_version.as_deref().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// The patch that adds one owner or takes one (by uid) away, valid only for the object as it was seen.
pub(crate) fn adoption_patch(
    meta: &ObjectMeta,
    add: Option<&OwnerReference>,
    remove: Option<&str>,
) -> serde_json::Value {
    let kept = meta.owner_references.iter().flatten();
    let mut owners: Vec<_> =
        kept.filter(|owner| Some(owner.uid.as_str()) != remove).cloned().collect();
    owners.extend(add.cloned());
    json!({"metadata": {
        "uid": meta.uid,
        "resourceVersion": meta.resource_version,
        "ownerReferences": owners,
    }})
}
