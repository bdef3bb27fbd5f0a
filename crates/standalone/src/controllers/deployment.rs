//! Deployments: rolls a template out over ReplicaSets, within bounds, with a history to go back to.

mod plan;
mod revision;
mod scale;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

pub(crate) use self::plan::{Action, Observed, plan};
use super::cluster::{Change, Cluster, Key};
use super::expectations::Expectations;
use super::ownership::{controller_of, controller_reference};
use super::queue::Outcome;
use super::recorder::{Recorder, Tone};
use super::selector::selects;
use super::worker::Controller;
use super::{adoption_patch, revision_of};
use crate::{Api, ApiError, DeleteOptions, PatchType, Preconditions, Registry};

/// The Deployment controller.
pub(crate) struct Deployments {
    cluster: Arc<Cluster>,
    deployments: Api<Deployment>,
    sets: Api<ReplicaSet>,
    recorder: Recorder,
    /// Writes of ReplicaSets that must show before the next step.
    owed_sets: Expectations<Key>,
    /// Writes of the Deployment itself.
    owed_self: Expectations<Key>,
}

impl Deployments {
    pub(crate) fn new(
        registry: &Registry,
        cluster: &Arc<Cluster>,
        recorder: Recorder,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            cluster: cluster.clone(),
            deployments: registry.api()?,
            sets: registry.api()?,
            recorder,
            owed_sets: Expectations::new(),
            owed_self: Expectations::new(),
        })
    }

    async fn perform(
        &self,
        key: &Key,
        deployment: &Deployment,
        action: Action,
    ) -> Result<(), ApiError> {
        match action {
            Action::Adopt(set) => {
                let owner = controller_reference::<Deployment>(&deployment.metadata);
                self.patch_set(key, &set, &adoption_patch(&set.metadata, Some(&owner), None)).await
            }
            Action::Release(set) => {
                let uid = deployment.metadata.uid.as_deref();
                self.patch_set(key, &set, &adoption_patch(&set.metadata, None, uid)).await
            }
            Action::Create(set) => self.create_set(key, deployment, &set).await,
            Action::Update(set) => {
                let written = self.sets.update(&set).await?;
                self.owed_sets.written(key, revision_of(&written.metadata));
                Ok(())
            }
            Action::Delete(set) => self.delete_set(key, &set).await,
            Action::Revision(number) => {
                let annotations = json!({"deployment.kubernetes.io/revision": number.to_string()});
                let patch = json!({"metadata": {"annotations": annotations}});
                let patched =
                    self.deployments.patch(&key.namespace, &key.name, PatchType::Merge, &patch);
                let written = patched.await?;
                self.owed_self.written(key, revision_of(&written.metadata));
                Ok(())
            }
            Action::Status(status) => self.write_status(key, deployment, *status).await,
            Action::Scaled(message) => {
                let meta = &deployment.metadata;
                self.recorder.record::<Deployment>(
                    meta,
                    Tone::Normal,
                    "ScalingReplicaSet",
                    &message,
                );
                Ok(())
            }
        }
    }

    async fn patch_set(
        &self,
        key: &Key,
        set: &ReplicaSet,
        patch: &serde_json::Value,
    ) -> Result<(), ApiError> {
        let name = set.metadata.name.as_deref().unwrap_or_default();
        let written = self.sets.patch(&key.namespace, name, PatchType::Merge, patch).await?;
        self.owed_sets.written(key, revision_of(&written.metadata));
        Ok(())
    }

    /// Creates the set of the present template. When its name is taken by a set with another template, two templates
    /// have met in one hash: the collision count then gives the next attempt another name.
    async fn create_set(
        &self,
        key: &Key,
        deployment: &Deployment,
        set: &ReplicaSet,
    ) -> Result<(), ApiError> {
        let error = match self.sets.create(set).await {
            Ok(written) => {
                self.owed_sets.written(key, revision_of(&written.metadata));
                return Ok(());
            }
            Err(error) => error,
        };
        if error.is_already_exists() {
            let mut status = deployment.status.clone().unwrap_or_default();
            status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
            self.write_status(key, deployment, status).await?;
            return Err(error);
        }
        let text = format!("Failed to create new replica set: {}", error.message);
        let meta = &deployment.metadata;
        self.recorder.record::<Deployment>(meta, Tone::Warning, "FailedCreate", &text);
        Err(error)
    }

    async fn delete_set(&self, key: &Key, set: &ReplicaSet) -> Result<(), ApiError> {
        let name = set.metadata.name.as_deref().unwrap_or_default();
        let preconditions =
            Preconditions { uid: set.metadata.uid.clone(), ..Preconditions::default() };
        let options = DeleteOptions { preconditions, ..DeleteOptions::default() };
        match self.sets.delete(&key.namespace, name, &options).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => {
                self.owed_sets.deleted(key, set.metadata.uid.as_deref().unwrap_or_default());
                Ok(())
            }
        }
    }

    async fn write_status(
        &self,
        key: &Key,
        deployment: &Deployment,
        status: DeploymentStatus,
    ) -> Result<(), ApiError> {
        let mut deployment = deployment.clone();
        // Only this controller writes the status, and it has seen its own last write: no conflict is possible that
        // would say anything.
        deployment.metadata.resource_version = None;
        deployment.status = Some(status);
        let written = self.deployments.update_status(&deployment).await?;
        self.owed_self.written(key, revision_of(&written.metadata));
        Ok(())
    }

    fn is_caught_up(&self, key: &Key) -> bool {
        let sets = self.cluster.replica_sets.in_namespace(&key.namespace);
        let live = |uid: &str| {
            sets.iter().any(|set| {
                set.metadata.uid.as_deref() == Some(uid)
                    && set.metadata.deletion_timestamp.is_none()
            })
        };
        self.owed_sets.are_met(key, self.cluster.replica_sets.revision(), live)
            && self.owed_self.are_met(key, self.cluster.deployments.revision(), |_| false)
    }
}

impl Controller for Deployments {
    const NAME: &'static str = "deployment";
    type Key = Key;

    fn affected(&self, change: &Change, add: &mut dyn FnMut(Key)) {
        match change {
            Change::Deployment(delta) => {
                if let Some(deployment) = delta.latest() {
                    add(Key::of(&deployment.metadata));
                }
            }
            Change::ReplicaSet(delta) => {
                for set in delta.both() {
                    let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
                    match controller_of(&set.metadata) {
                        Some(owner) if owner.kind == "Deployment" => {
                            add(Key::new(namespace, &owner.name));
                        }
                        Some(_) => {}
                        None => self.matching(set, add),
                    }
                }
            }
            // Only a Deployment that recreates waits for pods to be gone.
            Change::Pod(delta) if delta.new.is_none() => {
                let pod = delta.latest().map(|pod| &pod.metadata);
                let owner = pod.and_then(controller_of).filter(|owner| owner.kind == "ReplicaSet");
                let namespace = pod.and_then(|meta| meta.namespace.as_deref()).unwrap_or_default();
                let set = owner.and_then(|owner| {
                    self.cluster.replica_sets.get(&Key::new(namespace, &owner.name))
                });
                if let Some(owner) = set.as_ref().and_then(|set| controller_of(&set.metadata)) {
                    add(Key::new(namespace, &owner.name));
                }
            }
            _ => {}
        }
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, ApiError> {
        let Some(deployment) = self.cluster.deployments.get(key) else {
            self.owed_sets.forget(key);
            self.owed_self.forget(key);
            return Ok(Outcome::Done);
        };
        if !self.is_caught_up(key) {
            return Ok(Outcome::Done);
        }
        let sets = self.cluster.replica_sets.in_namespace(&key.namespace);
        let pods = self.cluster.pods.in_namespace(&key.namespace);
        let observed = Observed { sets: &sets, pods: &pods };
        let plan = plan(&deployment, &observed, Timestamp::now());
        for action in plan.actions {
            self.perform(key, &deployment, action).await?;
        }
        Ok(plan.again.map_or(Outcome::Done, Outcome::Later))
    }
}

impl Deployments {
    /// An orphan concerns every Deployment that would take it.
    fn matching(&self, set: &ReplicaSet, add: &mut dyn FnMut(Key)) {
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        for deployment in self.cluster.deployments.in_namespace(namespace) {
            let matches = deployment
                .spec
                .as_ref()
                .is_some_and(|spec| selects(&spec.selector, set.metadata.labels.as_ref()));
            if matches {
                add(Key::of(&deployment.metadata));
            }
        }
    }
}
