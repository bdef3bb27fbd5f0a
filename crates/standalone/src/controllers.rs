//! The controllers that a single machine needs, and the scheduler.
//!
//! Each is a pure function (wish, observed, now) -> actions with a thin shell: a [`worker`] takes keys from a
//! [`queue`], looks at the tables of [`cluster`] that the [`informer`]s keep equal to the store, and writes through
//! the same registry that serves the API. Nothing polls: without a change or a deadline no task runs.

pub(crate) mod cluster;
mod deployment;
mod endpoints;
mod expectations;
mod informer;
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

use self::cluster::{Change, Cluster};
use self::informer::{Informer, Informers};
use self::recorder::EventWriter;
use self::worker::{Controller, Observer, Worker};
use crate::scheduler::Scheduler;
use crate::{ApiError, Registry};

/// How the controllers run.
#[derive(Debug, Clone, Default)]
pub struct ControllersConfig {
    /// PEM of the CA that pods trust for the API server (`kube-root-ca.crt`). Empty: that ConfigMap is not made.
    pub root_ca_pem: String,
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

    fn run<C: Controller>(&self, worker: &Arc<Worker<C>>) {
        self.spawn(worker.clone().run(self.cancel.clone()));
    }

    fn follow<T>(&self, informer: Informer<T>, revision: u64)
    where
        T: Metadata<Ty = ObjectMeta> + DeserializeOwned + Send + Sync + 'static,
    {
        self.spawn(informer.run(revision, self.cancel.clone()));
    }
}

/// Starts all controllers and the scheduler over `registry`. They end when `cancel` is cancelled.
///
/// # Errors
/// When the API server lacks a kind that a controller needs.
pub fn start(
    registry: &Registry,
    config: ControllersConfig,
    cancel: CancellationToken,
) -> Result<Tasks, ApiError> {
    let _ = config;
    let tasks = Tasks { cancel, tracker: TaskTracker::new() };
    let cluster = Arc::new(Cluster::default());
    let events = EventWriter::new(registry)?;
    let recorder = |component| events.recorder(component);

    let scheduler = Scheduler::new(registry, &cluster, recorder("default-scheduler"))?;
    let replica_sets = Worker::new(replicaset::ReplicaSets::new(
        registry,
        &cluster,
        recorder("replicaset-controller"),
    )?);
    let deployments = Worker::new(deployment::Deployments::new(
        registry,
        &cluster,
        recorder("deployment-controller"),
    )?);
    let endpoints = Worker::new(endpoints::ServiceEndpoints::new(registry, &cluster)?);

    // The order is that of urgency: an observer is told before those behind it.
    let observers: Vec<Arc<dyn Observer>> =
        vec![scheduler.clone(), endpoints.clone(), replica_sets.clone(), deployments.clone()];
    watch(&tasks, registry, &cluster, observers)?;

    tasks.spawn(scheduler.run(tasks.cancel.clone()));
    tasks.run(&replica_sets);
    tasks.run(&deployments);
    tasks.run(&endpoints);
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
