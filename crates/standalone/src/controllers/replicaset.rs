//! ReplicaSets: as many pods as asked for, no more.

mod plan;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use futures_util::future::join_all;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

#[cfg(test)]
use self::plan::rank;
pub(crate) use self::plan::{Plan, batches, plan, pod_from_template};
pub(crate) use self::status::{Failure, status};
use super::cluster::{Change, Cluster, Key};
use super::expectations::Expectations;
use super::ownership::{controller_of, controller_reference};
use super::pods::is_deleting;
use super::queue::Outcome;
use super::recorder::{Recorder, Tone};
use super::selector::selects;
use super::worker::Controller;
use super::{adoption_patch, revision_of};
use crate::{Api, ApiError, DeleteOptions, PatchType, Preconditions, Registry};

/// The ReplicaSet controller.
pub(crate) struct ReplicaSets {
    cluster: Arc<Cluster>,
    sets: Api<ReplicaSet>,
    pods: Api<Pod>,
    recorder: Recorder,
    expectations: Expectations<Key>,
}

impl ReplicaSets {
    pub(crate) fn new(
        registry: &Registry,
        cluster: &Arc<Cluster>,
        recorder: Recorder,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            cluster: cluster.clone(),
            sets: registry.api()?,
            pods: registry.api()?,
            recorder,
            expectations: Expectations::new(),
        })
    }

    /// Whether the tables show all that was written for this set before.
    fn is_caught_up(&self, key: &Key, pods: &[Arc<Pod>]) -> bool {
        self.expectations.are_met(key, self.cluster.pods.revision(), |uid| {
            pods.iter().any(|pod| pod.metadata.uid.as_deref() == Some(uid) && !is_deleting(pod))
        })
    }

    /// Carries the plan out. The error, if any, is the last one; everything was tried.
    async fn perform(&self, key: &Key, set: &ReplicaSet, plan: &Plan) -> Result<(), Failure> {
        let mut result = self
            .claim(key, set, plan)
            .await
            .map_err(|error| Failure { reason: "FailedCreate", message: error.message });
        if result.is_ok() && plan.create > 0 {
            result = self.create(key, set, plan.create).await;
        }
        let deleted = join_all(plan.delete.iter().map(|pod| self.delete(key, set, pod))).await;
        deleted.into_iter().fold(result, Result::and)
    }

    async fn claim(&self, key: &Key, set: &ReplicaSet, plan: &Plan) -> Result<(), ApiError> {
        let owner = controller_reference::<ReplicaSet>(&set.metadata);
        for pod in &plan.adopt {
            let patch = adoption_patch(&pod.metadata, Some(&owner), None);
            self.patch(key, pod, &patch).await?;
        }
        for pod in &plan.release {
            let patch = adoption_patch(&pod.metadata, None, set.metadata.uid.as_deref());
            self.patch(key, pod, &patch).await?;
        }
        Ok(())
    }

    async fn patch(&self, key: &Key, pod: &Pod, patch: &serde_json::Value) -> Result<(), ApiError> {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let written = self.pods.patch(&key.namespace, name, PatchType::Merge, patch).await;
        match written {
            Ok(pod) => {
                self.expectations.written(key, revision_of(&pod.metadata));
                Ok(())
            }
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Creates pods in growing batches, and stops at the first batch in which one is refused.
    async fn create(&self, key: &Key, set: &ReplicaSet, count: usize) -> Result<(), Failure> {
        let pod = pod_from_template(set);
        for size in batches(count) {
            let attempts = join_all((0..size).map(|_| self.create_one(key, set, &pod))).await;
            attempts.into_iter().fold(Ok(()), Result::and)?;
        }
        Ok(())
    }

    async fn create_one(&self, key: &Key, set: &ReplicaSet, pod: &Pod) -> Result<(), Failure> {
        match self.pods.create(pod).await {
            Ok(created) => {
                self.expectations.written(key, revision_of(&created.metadata));
                let name = created.metadata.name.unwrap_or_default();
                self.tell(set, Tone::Normal, "SuccessfulCreate", &format!("Created pod: {name}"));
                Ok(())
            }
            Err(error) => {
                let message = format!("Error creating: {}", error.message);
                self.tell(set, Tone::Warning, "FailedCreate", &message);
                Err(Failure { reason: "FailedCreate", message: error.message })
            }
        }
    }

    async fn delete(&self, key: &Key, set: &ReplicaSet, pod: &Pod) -> Result<(), Failure> {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let preconditions =
            Preconditions { uid: pod.metadata.uid.clone(), ..Preconditions::default() };
        let options = DeleteOptions { preconditions, ..DeleteOptions::default() };
        match self.pods.delete(&key.namespace, name, &options).await {
            Ok(_) => {
                self.expectations.deleted(key, pod.metadata.uid.as_deref().unwrap_or_default());
                self.tell(set, Tone::Normal, "SuccessfulDelete", &format!("Deleted pod: {name}"));
                Ok(())
            }
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => {
                let message = format!("Error deleting: {}", error.message);
                self.tell(set, Tone::Warning, "FailedDelete", &message);
                Err(Failure { reason: "FailedDelete", message: error.message })
            }
        }
    }

    fn tell(&self, set: &ReplicaSet, tone: Tone, reason: &str, message: &str) {
        self.recorder.record::<ReplicaSet>(&set.metadata, tone, reason, message);
    }

    async fn write_status(
        &self,
        set: &ReplicaSet,
        claimed: &[Arc<Pod>],
        failure: Option<&Failure>,
    ) -> Result<Outcome, ApiError> {
        let (status, again) = status(set, claimed, failure, Timestamp::now());
        if set.status.as_ref() != Some(&status) {
            let mut set = set.clone();
            // The counts are true whatever became of the rest of the object; a conflict would only delay them.
            set.metadata.resource_version = None;
            set.status = Some(status);
            self.sets.update_status(&set).await?;
        }
        Ok(again.map_or(Outcome::Done, Outcome::Later))
    }
}

impl Controller for ReplicaSets {
    const NAME: &'static str = "replicaset";
    type Key = Key;

    fn affected(&self, change: &Change, add: &mut dyn FnMut(Key)) {
        match change {
            Change::ReplicaSet(delta) => {
                if let Some(set) = delta.latest() {
                    add(Key::of(&set.metadata));
                }
            }
            Change::Pod(delta) => {
                for pod in delta.both() {
                    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
                    match controller_of(&pod.metadata) {
                        Some(owner) if owner.kind == "ReplicaSet" => {
                            add(Key::new(namespace, &owner.name));
                        }
                        Some(_) => {}
                        None => self.matching(pod, add),
                    }
                }
            }
            _ => {}
        }
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, ApiError> {
        let Some(set) = self.cluster.replica_sets.get(key) else {
            self.expectations.forget(key);
            return Ok(Outcome::Done);
        };
        let pods = self.cluster.pods.in_namespace(&key.namespace);
        let plan = plan(&set, &pods, Timestamp::now());
        if !self.is_caught_up(key, &pods) {
            // The event that closes the gap brings us back here.
            return Ok(Outcome::Done);
        }
        let result = self.perform(key, &set, &plan).await;
        if result.is_ok() && !plan.delete.is_empty() {
            // A status now would count pods as available that were just deleted, and a rollout would rely on them. The
            // events of the deletions bring us back.
            return Ok(Outcome::Done);
        }
        let outcome = self.write_status(&set, &plan.claimed, result.as_ref().err()).await?;
        match result {
            Ok(()) => Ok(outcome),
            Err(failure) => Err(ApiError::internal(failure.message)),
        }
    }
}

impl ReplicaSets {
    /// An orphan concerns every set that would take it.
    fn matching(&self, pod: &Pod, add: &mut dyn FnMut(Key)) {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        for set in self.cluster.replica_sets.in_namespace(namespace) {
            let matches = set
                .spec
                .as_ref()
                .is_some_and(|spec| selects(&spec.selector, pod.metadata.labels.as_ref()));
            if matches {
                add(Key::of(&set.metadata));
            }
        }
    }
}
