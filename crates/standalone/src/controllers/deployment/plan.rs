//! One step of a Deployment: what to create, scale, delete and report, given what exists.
//!
//! Each call takes one step in the order that keeps the bounds (grow the current set, then shrink the old ones); the
//! change that the step causes brings the next call.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

use super::revision::{
    age_order, current, desired_replicas, max_replicas, new_set, note_replicas, note_revision,
    revision,
};
use super::scale::{Bounds, Share, grow_current, is_recreate, scale_proportionally, shrink_old};
use super::status::{Facts, Note, is_complete, pause_note, status};
use crate::controllers::ownership::{Claim, claim, is_controlled_by};
use crate::controllers::pods::has_ended;
use crate::controllers::selector::{is_empty, selects};

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// Take an orphaned ReplicaSet.
    Adopt(Arc<ReplicaSet>),
    /// Let go one that no longer matches.
    Release(Arc<ReplicaSet>),
    /// Create the ReplicaSet of the present template.
    Create(Box<ReplicaSet>),
    /// Write a ReplicaSet (annotations, size).
    Update(Box<ReplicaSet>),
    /// Delete a ReplicaSet beyond the history limit.
    Delete(Arc<ReplicaSet>),
    /// Write the revision into the Deployment's annotations.
    Revision(i64),
    /// Write the status.
    Status(Box<DeploymentStatus>),
    /// Report a change of size.
    Scaled(String),
}

/// What to do now, and when to look again even if nothing happens.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) actions: Vec<Action>,
    pub(crate) again: Option<Duration>,
}

/// What is known about the Deployment's surroundings: the ReplicaSets and pods of its namespace.
pub(crate) struct Observed<'a> {
    pub(crate) sets: &'a [Arc<ReplicaSet>],
    pub(crate) pods: &'a [Arc<Pod>],
}

/// See the module's documentation.
pub(crate) fn plan(deployment: &Deployment, observed: &Observed<'_>, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let Some(spec) = &deployment.spec else { return plan };
    if is_empty(&spec.selector) {
        return plan;
    }
    let mut owned = claim_sets(deployment, observed.sets, &mut plan);
    owned.sort_by_key(|set| age_order(&set.metadata));
    let present = current(deployment, &owned).cloned();
    let present_name = present.as_ref().and_then(|set| set.metadata.name.clone());
    let old: Vec<_> =
        owned.iter().filter(|set| set.metadata.name != present_name).cloned().collect();
    let mut step = Step { deployment, bounds: Bounds::of(spec), present, old, note: None, plan };
    step.note = pause_note(deployment);
    if deployment.metadata.deletion_timestamp.is_none() {
        step.take(observed.pods);
    }
    step.finish(now)
}

fn claim_sets(
    deployment: &Deployment,
    sets: &[Arc<ReplicaSet>],
    plan: &mut Plan,
) -> Vec<Arc<ReplicaSet>> {
    let Some(spec) = &deployment.spec else { return Vec::new() };
    let mut owned = Vec::new();
    for set in sets {
        let matches = selects(&spec.selector, set.metadata.labels.as_ref());
        match claim(&deployment.metadata, &set.metadata, matches) {
            Claim::Keep => owned.push(set.clone()),
            Claim::Adopt => {
                plan.actions.push(Action::Adopt(set.clone()));
                owned.push(set.clone());
            }
            Claim::Release => plan.actions.push(Action::Release(set.clone())),
            Claim::Ignore => {}
        }
    }
    owned
}

struct Step<'a> {
    deployment: &'a Deployment,
    bounds: Bounds,
    present: Option<Arc<ReplicaSet>>,
    /// Oldest first.
    old: Vec<Arc<ReplicaSet>>,
    note: Option<Note>,
    plan: Plan,
}

impl Step<'_> {
    fn take(&mut self, pods: &[Arc<Pod>]) {
        let Some(spec) = &self.deployment.spec else { return };
        let paused = spec.paused == Some(true);
        if paused || self.was_scaled() {
            if self.present.is_some() {
                self.bookkeeping(false);
            }
            self.scale_all();
            if paused {
                self.prune_history();
            }
            return;
        }
        if is_recreate(spec) {
            self.recreate(pods);
        } else {
            self.roll();
        }
        let counted = status(&self.facts(Timestamp::UNIX_EPOCH), None).0;
        if is_complete(self.deployment, &counted) {
            self.prune_history();
        }
    }

    /// Whether `spec.replicas` changed since the sets were last scaled: scaling comes before rolling.
    fn was_scaled(&self) -> bool {
        self.old.iter().chain(&self.present).any(|set| {
            replicas(set) > 0
                && desired_replicas(&set.metadata)
                    .is_some_and(|desired| desired != self.bounds.replicas)
        })
    }

    fn roll(&mut self) {
        let old: Vec<Share> = self.old.iter().map(|set| share(set)).collect();
        let held = self.present.as_ref().map_or(Share::NOTHING, |set| share(set));
        let size = grow_current(self.bounds, held, &old);
        if self.resize_current(size) {
            return;
        }
        for (set, size) in self.old.clone().iter().zip(shrink_old(self.bounds, held, &old)) {
            self.resize(set, size);
        }
    }

    fn recreate(&mut self, pods: &[Arc<Pod>]) {
        let running: Vec<_> = self.old.iter().filter(|set| replicas(set) > 0).cloned().collect();
        for set in &running {
            self.resize(set, 0);
        }
        let remains = |set: &Arc<ReplicaSet>| {
            let uid = set.metadata.uid.as_deref().unwrap_or_default();
            pods.iter().any(|pod| is_controlled_by(&pod.metadata, uid) && !has_ended(pod))
        };
        if running.is_empty() && !self.old.iter().any(remains) {
            self.resize_current(self.bounds.replicas);
        }
    }

    /// Creates the present set or brings it to this size. Returns whether its size changed.
    fn resize_current(&mut self, size: i32) -> bool {
        let Some(set) = self.bookkeeping(true) else { return true };
        let grew = replicas(&set) != size;
        self.resize(&set, size);
        grew
    }

    /// Revision numbers and annotations of the present set. `None` if it is only being created now; it then gets its
    /// size at once, since a second write would cost a round.
    fn bookkeeping(&mut self, create: bool) -> Option<Arc<ReplicaSet>> {
        let newest = self.old.iter().map(|set| revision(&set.metadata)).max().unwrap_or(0) + 1;
        let min_ready = self.deployment.spec.as_ref().and_then(|spec| spec.min_ready_seconds);
        let Some(present) = self.present.clone() else {
            if create {
                self.create_current(newest);
            }
            return None;
        };
        let mut set = ReplicaSet::clone(&present);
        let mut changed = note_revision(&mut set.metadata, &self.deployment.metadata, newest);
        if let Some(spec) = &mut set.spec
            && spec.min_ready_seconds.unwrap_or(0) != min_ready.unwrap_or(0)
        {
            spec.min_ready_seconds = min_ready;
            changed = true;
        }
        let revision = revision(&set.metadata);
        self.note_deployment_revision(revision);
        let set = Arc::new(set);
        if changed {
            self.plan.actions.push(Action::Update(Box::new(ReplicaSet::clone(&set))));
        }
        self.present = Some(set.clone());
        Some(set)
    }

    fn create_current(&mut self, newest: i64) {
        let mut set = new_set(self.deployment, newest);
        let old: Vec<Share> = self.old.iter().map(|set| share(set)).collect();
        let recreate = self.deployment.spec.as_ref().is_some_and(is_recreate);
        let size = if recreate {
            self.bounds.replicas
        } else {
            grow_current(self.bounds, Share::NOTHING, &old)
        };
        if let Some(spec) = &mut set.spec {
            spec.replicas = Some(size);
        }
        note_replicas(&mut set.metadata, self.bounds.replicas, self.bounds.ceiling());
        let name = set.metadata.name.clone().unwrap_or_default();
        self.note = Some(Note {
            status: "True",
            reason: "NewReplicaSetCreated",
            message: format!("Created new replica set {name:?}"),
        });
        self.plan.actions.push(Action::Create(Box::new(set)));
        if size > 0 {
            let text = format!("Scaled up replica set {name} from 0 to {size}");
            self.plan.actions.push(Action::Scaled(text));
        }
        self.note_deployment_revision(newest);
    }

    fn note_deployment_revision(&mut self, newest: i64) {
        if revision(&self.deployment.metadata) != newest {
            self.plan.actions.push(Action::Revision(newest));
        }
    }

    /// Writes a set's size and the numbers it was scaled for, where they differ.
    fn resize(&mut self, set: &ReplicaSet, size: i32) {
        let before = replicas(set);
        let mut scaled = set.clone();
        let noted =
            note_replicas(&mut scaled.metadata, self.bounds.replicas, self.bounds.ceiling());
        if before == size && !noted {
            return;
        }
        if let Some(spec) = &mut scaled.spec {
            spec.replicas = Some(size);
        }
        // One write per set and step: a second one would meet its own conflict.
        let name = set.metadata.name.clone().unwrap_or_default();
        self.plan.actions.retain(|action| {
            !matches!(action, Action::Update(other) if other.metadata.name == scaled.metadata.name)
        });
        self.plan.actions.push(Action::Update(Box::new(scaled)));
        if before != size {
            let way = if size > before { "up" } else { "down" };
            let text = format!("Scaled {way} replica set {name} from {before} to {size}");
            self.plan.actions.push(Action::Scaled(text));
        }
    }

    /// Follows a change of `spec.replicas` with the sets as they are, without going on with the rollout.
    fn scale_all(&mut self) {
        let wanted = self.bounds.replicas;
        let mut active: Vec<_> =
            self.old.iter().chain(&self.present).filter(|set| replicas(set) > 0).cloned().collect();
        if active.len() <= 1 {
            let newest =
                active.pop().or_else(|| self.present.clone()).or_else(|| self.old.last().cloned());
            if let Some(set) = newest {
                self.resize(&set, wanted);
            }
            return;
        }
        if self.present.as_ref().is_some_and(|set| is_saturated(set, wanted)) {
            active.retain(|set| !self.is_present(set));
            for set in active {
                self.resize(&set, 0);
            }
            return;
        }
        if self.deployment.spec.as_ref().is_some_and(is_recreate) {
            return;
        }
        // The largest set gets the rounding rest; of equal ones the newest when growing, the oldest when shrinking.
        let growing = self.bounds.ceiling() > active.iter().map(|set| replicas(set)).sum();
        active.sort_by_key(|set| age_order(&set.metadata));
        if growing {
            active.reverse();
        }
        active.sort_by_key(|set| std::cmp::Reverse(replicas(set)));
        let shares: Vec<Share> = active.iter().map(|set| share(set)).collect();
        for (set, size) in active.iter().zip(scale_proportionally(self.bounds, &shares)) {
            self.resize(set, size);
        }
    }

    fn is_present(&self, set: &ReplicaSet) -> bool {
        self.present.as_ref().is_some_and(|present| present.metadata.name == set.metadata.name)
    }

    /// Deletes the oldest sets beyond the history limit that carry nothing any more.
    fn prune_history(&mut self) {
        let limit = self.deployment.spec.as_ref().and_then(|spec| spec.revision_history_limit);
        let limit = usize::try_from(limit.unwrap_or(10)).unwrap_or(0);
        let mut history: Vec<_> =
            self.old.iter().filter(|set| set.metadata.deletion_timestamp.is_none()).collect();
        history.sort_by_key(|set| (revision(&set.metadata), age_order(&set.metadata)));
        let surplus = history.len().saturating_sub(limit);
        for set in history.into_iter().take(surplus) {
            let status = set.status.clone().unwrap_or_default();
            let seen = status.observed_generation >= set.metadata.generation;
            if seen && status.replicas == 0 && replicas(set) == 0 {
                self.plan.actions.push(Action::Delete(set.clone()));
            }
        }
    }

    fn facts(&self, now: Timestamp) -> Facts<'_> {
        Facts { deployment: self.deployment, current: self.present.as_ref(), old: &self.old, now }
    }

    fn finish(mut self, now: Timestamp) -> Plan {
        let (status, again) = status(&self.facts(now), self.note.as_ref());
        if self.deployment.status.as_ref() != Some(&status) {
            self.plan.actions.push(Action::Status(Box::new(status)));
        }
        self.plan.again = again;
        self.plan
    }
}

fn replicas(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

fn share(set: &ReplicaSet) -> Share {
    let status = set.status.as_ref();
    let is_seen = status.and_then(|status| status.observed_generation) >= set.metadata.generation;
    let held = status.map_or(0, |status| status.replicas).max(replicas(set));
    let available = status.and_then(|status| status.available_replicas).unwrap_or(0);
    Share {
        holds: Some(held).filter(|_| is_seen),
        replicas: replicas(set),
        available,
        scaled_for: max_replicas(&set.metadata).unwrap_or_else(|| replicas(set)),
    }
}

fn is_saturated(set: &ReplicaSet, wanted: i32) -> bool {
    replicas(set) == wanted
        && desired_replicas(&set.metadata) == Some(wanted)
        && share(set).holds.is_some()
        && share(set).available == wanted
}
