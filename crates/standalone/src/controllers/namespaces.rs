//! The deletion of namespaces: everything inside goes, then the namespace.

mod report;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::jiff::Timestamp;

use self::report::{Remains, conditions};
use super::cluster::{Change, Cluster, Key};
use super::queue::Outcome;
use super::worker::Controller;
use crate::kinds::{self, Kind};
use crate::{Api, ApiError, DeleteOptions, Object, Propagation, Registry, Selector};

/// While something in a namespace that is being deleted does not go by itself (pods have their grace period, finalizers
/// their owner), the namespace is looked at again this often. Pods that go are noticed at once.
const AGAIN: Duration = Duration::from_secs(1);
/// How many objects are deleted side by side.
const PARALLEL: usize = 16;

/// The namespace controller.
pub(crate) struct Namespaces {
    registry: Registry,
    cluster: Arc<Cluster>,
    namespaces: Api<Namespace>,
}

impl Namespaces {
    pub(crate) fn new(registry: &Registry, cluster: &Arc<Cluster>) -> Result<Self, ApiError> {
        let namespaces = registry.api()?;
        Ok(Self { registry: registry.clone(), cluster: cluster.clone(), namespaces })
    }

    /// Deletes what is there and says what then still is.
    async fn empty(&self, namespace: &str) -> Result<Remains, ApiError> {
        let mut remains = Remains::default();
        for kind in kinds::all().iter().copied().filter(|kind| kind.namespaced) {
            let (objects, _) = self.registry.list(kind, namespace, &Selector::default());
            for some in objects.chunks(PARALLEL) {
                try_join_all(some.iter().map(|object| self.delete(kind, object))).await?;
            }
            let (left, _) = self.registry.list(kind, namespace, &Selector::default());
            remains.add(kind, &left);
        }
        Ok(remains)
    }

    async fn delete(&self, kind: &'static Kind, object: &Object) -> Result<(), ApiError> {
        if report::is_deleting(object) {
            return Ok(());
        }
        let options = DeleteOptions {
            propagation: Some(Propagation::Background),
            ..DeleteOptions::default()
        };
        match self.registry.delete(kind, &object.namespace, &object.name, &options).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    async fn report(&self, namespace: &Namespace, remains: &Remains) -> Result<(), ApiError> {
        let mut namespace = namespace.clone();
        namespace.metadata.resource_version = None;
        let status = namespace.status.get_or_insert_default();
        let wanted =
            conditions(status.conditions.take().unwrap_or_default(), remains, Timestamp::now());
        status.phase = Some("Terminating".to_owned());
        status.conditions = Some(wanted);
        match self.namespaces.update_status(&namespace).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }
}

impl Controller for Namespaces {
    const NAME: &'static str = "namespace";
    type Key = Key;

    fn affected(&self, change: &Change, add: &mut dyn FnMut(Key)) {
        let namespace = match change {
            Change::Namespace(delta) => delta.new.clone(),
            Change::Pod(delta) if delta.new.is_none() => {
                let pod = delta.latest();
                let name =
                    pod.and_then(|pod| pod.metadata.namespace.as_deref()).unwrap_or_default();
                self.cluster.namespaces.get(&Key::new("", name))
            }
            _ => None,
        };
        if let Some(namespace) = namespace.filter(|namespace| is_leaving(namespace)) {
            add(Key::of(&namespace.metadata));
        }
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, ApiError> {
        let Some(namespace) = self.cluster.namespaces.get(key).filter(|held| is_leaving(held))
        else {
            return Ok(Outcome::Done);
        };
        let remains = self.empty(&key.name).await?;
        if remains.is_empty() {
            return match self.registry.finalize_namespace(&key.name).await {
                Err(error) if !error.is_not_found() => Err(error),
                _ => Ok(Outcome::Done),
            };
        }
        self.report(&namespace, &remains).await?;
        Ok(Outcome::Later(AGAIN))
    }
}

/// Whether the namespace is being deleted and waits for us.
fn is_leaving(namespace: &Namespace) -> bool {
    let finalizers = namespace.spec.as_ref().and_then(|spec| spec.finalizers.as_deref());
    namespace.metadata.deletion_timestamp.is_some()
        && finalizers.unwrap_or_default().iter().any(|name| name == "kubernetes")
}
