//! The status of a ReplicaSet.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::controllers::pods::{Availability, availability, has_ended, is_active, is_deleting};
use crate::controllers::selector::contains;

/// Why pods could not be created or deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// `FailedCreate` or `FailedDelete`.
    pub(crate) reason: &'static str,
    /// The API server's words.
    pub(crate) message: String,
}

/// Counts the claimed pods. The second value is when a pod will have been ready for long enough, if one waits for that.
pub(crate) fn status(
    set: &ReplicaSet,
    claimed: &[Arc<Pod>],
    failure: Option<&Failure>,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Duration>) {
    let spec = set.spec.as_ref();
    let template_labels = spec
        .and_then(|spec| spec.template.as_ref()?.metadata.as_ref()?.labels.clone())
        .unwrap_or_default();
    let min_ready = spec.and_then(|spec| spec.min_ready_seconds).unwrap_or(0);
    let mut counted = ReplicaSetStatus {
        observed_generation: set.metadata.generation,
        conditions: conditions(set, failure, now),
        ..ReplicaSetStatus::default()
    };
    let (mut labelled, mut ready, mut available) = (0, 0, 0);
    let mut again: Option<Duration> = None;
    for pod in claimed.iter().filter(|pod| is_active(pod)) {
        counted.replicas += 1;
        let labels = pod.metadata.labels.as_ref();
        if labels.is_some_and(|labels| contains(labels, &template_labels)) {
            labelled += 1;
        }
        match availability(pod, min_ready, now) {
            Availability::NotReady => {}
            Availability::In(rest) => {
                ready += 1;
                again = Some(again.map_or(rest, |soonest| soonest.min(rest)));
            }
            Availability::Available => {
                ready += 1;
                available += 1;
            }
        }
    }
    let leaving = claimed.iter().filter(|pod| is_deleting(pod) && !has_ended(pod)).count();
    counted.fully_labeled_replicas = Some(labelled).filter(|count| *count > 0);
    counted.ready_replicas = Some(ready).filter(|count| *count > 0);
    counted.available_replicas = Some(available).filter(|count| *count > 0);
    counted.terminating_replicas = i32::try_from(leaving).ok();
    (counted, again)
}

fn conditions(
    set: &ReplicaSet,
    failure: Option<&Failure>,
    now: Timestamp,
) -> Option<Vec<ReplicaSetCondition>> {
    let held = set.status.as_ref().and_then(|status| status.conditions.clone());
    let mut conditions = held.unwrap_or_default();
    let before = conditions.iter().position(|held| held.type_ == "ReplicaFailure");
    let before = before.map(|at| conditions.remove(at));
    if let Some(failure) = failure {
        // A failure that goes on keeps its condition, else each retry would write and so wake everybody.
        conditions.push(
            before.filter(|held| held.reason.as_deref() == Some(failure.reason)).unwrap_or(
                ReplicaSetCondition {
                    type_: "ReplicaFailure".into(),
                    status: "True".into(),
                    reason: Some(failure.reason.to_owned()),
                    message: Some(failure.message.clone()),
                    last_transition_time: Some(Time(now)),
                },
            ),
        );
    }
    Some(conditions).filter(|conditions| !conditions.is_empty())
}
