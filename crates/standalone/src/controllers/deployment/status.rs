//! The status of a Deployment, with the conditions that `kubectl rollout status` waits for.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::scale::Bounds;
use crate::controllers::pods::since_then;

const AVAILABLE: &str = "Available";
const PROGRESSING: &str = "Progressing";
const REPLICA_FAILURE: &str = "ReplicaFailure";
pub(crate) const TIMED_OUT: &str = "ProgressDeadlineExceeded";
const NEW_SET_AVAILABLE: &str = "NewReplicaSetAvailable";

/// What the status is computed from.
pub(crate) struct Facts<'a> {
    pub(crate) deployment: &'a Deployment,
    pub(crate) current: Option<&'a Arc<ReplicaSet>>,
    pub(crate) old: &'a [Arc<ReplicaSet>],
    pub(crate) now: Timestamp,
}

/// Something worth telling about the rollout's progress when a set was created, found or could not be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    pub(crate) status: &'static str,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// The status and, while a deadline runs, the time until it ends.
pub(crate) fn status(
    facts: &Facts<'_>,
    note: Option<&Note>,
) -> (DeploymentStatus, Option<Duration>) {
    let mut status = count(facts);
    let mut conditions = held(facts.deployment);
    available(&mut conditions, facts, &status);
    if let Some(note) = note {
        set(&mut conditions, PROGRESSING, note.status, note.reason, &note.message, facts.now);
    }
    let again = progress(&mut conditions, facts, &status);
    replica_failure(&mut conditions, facts);
    status.conditions = Some(conditions).filter(|conditions| !conditions.is_empty());
    (status, again)
}

fn held(deployment: &Deployment) -> Vec<DeploymentCondition> {
    let status = deployment.status.as_ref();
    status.and_then(|status| status.conditions.clone()).unwrap_or_default()
}

fn count(facts: &Facts<'_>) -> DeploymentStatus {
    let all = || facts.old.iter().chain(facts.current);
    let total = |field: fn(&ReplicaSet) -> i32| all().map(|set| field(set)).sum::<i32>();
    let positive = |count: i32| Some(count).filter(|count| *count > 0);
    let wanted = total(|set| set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0));
    let have = total(|set| set.status.as_ref().map_or(0, |status| status.replicas));
    let ready = total(|set| set.status.as_ref().and_then(|s| s.ready_replicas).unwrap_or(0));
    let available =
        total(|set| set.status.as_ref().and_then(|s| s.available_replicas).unwrap_or(0));
    let leaving =
        total(|set| set.status.as_ref().and_then(|s| s.terminating_replicas).unwrap_or(0));
    let updated = facts.current.and_then(|set| set.status.as_ref()).map_or(0, |s| s.replicas);
    DeploymentStatus {
        observed_generation: facts.deployment.metadata.generation,
        replicas: positive(have),
        updated_replicas: positive(updated),
        ready_replicas: positive(ready),
        available_replicas: positive(available),
        unavailable_replicas: positive(wanted - available),
        terminating_replicas: Some(leaving),
        collision_count: facts.deployment.status.as_ref().and_then(|s| s.collision_count),
        conditions: None,
    }
}

fn available(
    conditions: &mut Vec<DeploymentCondition>,
    facts: &Facts<'_>,
    status: &DeploymentStatus,
) {
    let Some(spec) = &facts.deployment.spec else { return };
    if status.available_replicas.unwrap_or(0) >= Bounds::of(spec).floor() {
        let message = "Deployment has minimum availability.";
        set(conditions, AVAILABLE, "True", "MinimumReplicasAvailable", message, facts.now);
    } else {
        let message = "Deployment does not have minimum availability.";
        set(conditions, AVAILABLE, "False", "MinimumReplicasUnavailable", message, facts.now);
    }
}

/// Whether the rollout has reached its end.
pub(crate) fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    let all = [status.updated_replicas, status.replicas, status.available_replicas];
    all.iter().all(|count| count.unwrap_or(0) == wanted)
        && status.observed_generation >= deployment.metadata.generation
}

fn progress(
    conditions: &mut Vec<DeploymentCondition>,
    facts: &Facts<'_>,
    status: &DeploymentStatus,
) -> Option<Duration> {
    let spec = facts.deployment.spec.as_ref()?;
    // The largest number means "no deadline" (apps/v1 defaults and kubectl write it so).
    let Some(deadline) = spec.progress_deadline_seconds.filter(|secs| *secs != i32::MAX) else {
        conditions.retain(|condition| condition.type_ != PROGRESSING);
        return None;
    };
    if spec.paused == Some(true) {
        return None;
    }
    let deadline = Duration::from_secs(u64::try_from(deadline).unwrap_or(0));
    let held = conditions.iter().find(|condition| condition.type_ == PROGRESSING);
    let reason = held.and_then(|held| held.reason.as_deref()).unwrap_or_default().to_owned();
    let settled = status.replicas == status.updated_replicas && reason == NEW_SET_AVAILABLE;
    if settled {
        return None;
    }
    let subject = match facts.current {
        Some(set) => format!("ReplicaSet {:?}", set.metadata.name.as_deref().unwrap_or_default()),
        None => {
            format!(
                "Deployment {:?}",
                facts.deployment.metadata.name.as_deref().unwrap_or_default()
            )
        }
    };
    if is_complete(facts.deployment, status) {
        let message = format!("{subject} has successfully progressed.");
        set(conditions, PROGRESSING, "True", NEW_SET_AVAILABLE, &message, facts.now);
        return None;
    }
    if moved(facts.deployment, status) {
        let message = format!("{subject} is progressing.");
        conditions.retain(|condition| condition.type_ != PROGRESSING || condition.status == "True");
        set(conditions, PROGRESSING, "True", "ReplicaSetUpdated", &message, facts.now);
        touch(conditions, facts.now);
        return Some(deadline);
    }
    let held = conditions.iter().find(|condition| condition.type_ == PROGRESSING)?;
    if held.reason.as_deref() == Some(TIMED_OUT) {
        return None;
    }
    let since = held.last_update_time.as_ref().map_or(facts.now, |time| time.0);
    let waited = since_then(since, facts.now);
    if waited >= deadline && reason != NEW_SET_AVAILABLE {
        let message = format!("{subject} has timed out progressing.");
        set(conditions, PROGRESSING, "False", TIMED_OUT, &message, facts.now);
        return None;
    }
    Some(deadline.saturating_sub(waited).max(Duration::from_millis(100)))
}

/// Whether the rollout got further since the status was last written.
fn moved(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let old = deployment.status.clone().unwrap_or_default();
    let number = |count: Option<i32>| count.unwrap_or(0);
    let outdated =
        |status: &DeploymentStatus| number(status.replicas) - number(status.updated_replicas);
    number(status.updated_replicas) > number(old.updated_replicas)
        || outdated(status) < outdated(&old)
        || number(status.ready_replicas) > number(old.ready_replicas)
        || number(status.available_replicas) > number(old.available_replicas)
}

fn replica_failure(conditions: &mut Vec<DeploymentCondition>, facts: &Facts<'_>) {
    let of = |set: &Arc<ReplicaSet>| {
        let conditions = set.status.as_ref()?.conditions.as_ref()?;
        conditions.iter().find(|condition| condition.type_ == REPLICA_FAILURE).cloned()
    };
    let failure = facts.current.and_then(of).or_else(|| facts.old.iter().find_map(of));
    match failure {
        Some(failure) => set(
            conditions,
            REPLICA_FAILURE,
            &failure.status,
            failure.reason.as_deref().unwrap_or_default(),
            failure.message.as_deref().unwrap_or_default(),
            facts.now,
        ),
        None => conditions.retain(|condition| condition.type_ != REPLICA_FAILURE),
    }
}

/// The note for a Deployment that was paused or resumed, if there is anything to note.
///
/// A resumed rollout starts its deadline anew. A rollout that timed out stays so until it moves.
pub(crate) fn pause_note(deployment: &Deployment) -> Option<Note> {
    let spec = deployment.spec.as_ref()?;
    spec.progress_deadline_seconds.filter(|secs| *secs != i32::MAX)?;
    let conditions = held(deployment);
    let reason = conditions
        .iter()
        .find(|condition| condition.type_ == PROGRESSING)
        .and_then(|condition| condition.reason.clone())
        .unwrap_or_default();
    let paused = spec.paused == Some(true);
    if reason == TIMED_OUT || paused == (reason == "DeploymentPaused") {
        return None;
    }
    let (reason, message) = if paused {
        ("DeploymentPaused", "Deployment is paused")
    } else {
        ("DeploymentResumed", "Deployment is resumed")
    };
    Some(Note { status: "Unknown", reason, message: message.to_owned() })
}

/// Sets a condition; the time of transition is kept while the status stays, and nothing changes while status and
/// reason stay.
fn set(
    conditions: &mut Vec<DeploymentCondition>,
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let held = conditions.iter().position(|condition| condition.type_ == kind);
    let held = held.map(|at| conditions[at].clone());
    if held
        .as_ref()
        .is_some_and(|held| held.status == status && held.reason.as_deref() == Some(reason))
    {
        return;
    }
    let transition = held
        .filter(|held| held.status == status)
        .and_then(|held| held.last_transition_time)
        .unwrap_or(Time(now));
    conditions.retain(|condition| condition.type_ != kind);
    conditions.push(DeploymentCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(transition),
    });
}

/// Each step forward starts the deadline anew.
fn touch(conditions: &mut [DeploymentCondition], now: Timestamp) {
    for condition in conditions.iter_mut().filter(|condition| condition.type_ == PROGRESSING) {
        condition.last_update_time = Some(Time(now));
    }
}
