//! How an object goes: at once, or by waiting for finalizers or for its node.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{DeleteOptions, Propagation, Registry, WriteOptions, imagine, meta};
use crate::error::ApiError;
use crate::kinds::{self, Kind};
use crate::object::Object;

/// What a deletion does to an object right now.
#[derive(Debug, PartialEq)]
enum Step {
    /// It goes.
    Remove,
    /// It stays, marked.
    Mark(Value),
    /// It is on its way already.
    Nothing,
}

impl Registry {
    /// Deletes; the flag says whether the object is gone.
    pub(crate) async fn delete_with(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
        write: &WriteOptions,
    ) -> Result<(Arc<Object>, bool), ApiError> {
        loop {
            let current = self.get(kind, namespace, name)?;
            let value = current.value();
            check_preconditions(kind, &current, &value, options)?;
            protect(kind, name)?;
            let step = step(kind, &value, options);
            if write.dry_run {
                return Ok((imagine(kind, value, current.revision), step == Step::Remove));
            }
            let outcome = match step {
                Step::Nothing => return Ok((current, false)),
                Step::Remove => self.remove(&current).await?.map(|object| (object, true)),
                Step::Mark(marked) => {
                    let key = current.key();
                    let stored =
                        self.store_version(kind, key, current.revision, Some(marked)).await?;
                    stored.map(|object| (object, false))
                }
            };
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
        }
    }
}

fn protect(kind: &Kind, name: &str) -> Result<(), ApiError> {
    let kept = ["default", "kube-system", "kube-public", "kube-node-lease"];
    if *kind == kinds::NAMESPACE && kept.contains(&name) {
        return Err(ApiError::forbidden(kind, name, "this namespace may not be deleted"));
    }
    Ok(())
}

fn check_preconditions(
    kind: &Kind,
    current: &Object,
    value: &Value,
    options: &DeleteOptions,
) -> Result<(), ApiError> {
    let Some(wanted) = &options.preconditions.uid else {
        return check_revision(kind, current, options);
    };
    let uid = meta::text(value, "uid");
    if uid == wanted {
        return check_revision(kind, current, options);
    }
    let why =
        format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}");
    Err(ApiError::conflict(kind, &current.name, &why))
}

fn check_revision(kind: &Kind, current: &Object, options: &DeleteOptions) -> Result<(), ApiError> {
    match &options.preconditions.resource_version {
        Some(wanted) if *wanted != current.revision.to_string() => {
            let why = format!(
                "Precondition failed: ResourceVersion in precondition: {wanted}, ResourceVersion in object meta: {}",
                current.revision
            );
            Err(ApiError::conflict(kind, &current.name, &why))
        }
        _ => Ok(()),
    }
}

/// Pure: what deleting `value` with `options` does.
fn step(kind: &Kind, value: &Value, options: &DeleteOptions) -> Step {
    let mut new = value.clone();
    let finalizers = finalizers_after(value, options.propagation);
    meta::set_finalizers(&mut new, &finalizers);
    let grace = if *kind == kinds::POD { pod_grace(value, options) } else { 0 };
    let held = !finalizers.is_empty()
        || (*kind == kinds::NAMESPACE
            && value["spec"]["finalizers"].as_array().is_some_and(|list| !list.is_empty()));
    if grace == 0 && !held {
        return Step::Remove;
    }
    if meta::is_terminating(value) {
        let pending = value["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0);
        // A second request may only shorten the time.
        let shorter = *kind == kinds::POD && grace < pending;
        if !shorter && new == *value {
            return Step::Nothing;
        }
        if !shorter {
            return Step::Mark(new);
        }
    }
    let mark = meta::of(&mut new);
    mark.insert("deletionTimestamp".to_owned(), meta::time_after(grace).into());
    mark.insert("deletionGracePeriodSeconds".to_owned(), grace.into());
    if kind.has_generation {
        let generation = value["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
        mark.insert("generation".to_owned(), generation.into());
    }
    if *kind == kinds::NAMESPACE {
        mark.remove("deletionGracePeriodSeconds");
        new["status"]["phase"] = json!("Terminating");
    }
    Step::Mark(new)
}

/// How long a pod gets. A pod that no node runs, or that has ended, needs no time.
fn pod_grace(pod: &Value, options: &DeleteOptions) -> i64 {
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    let ended = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if options.grace_period_seconds != Some(0) && meta::is_terminating(pod) {
        let pending = pod["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0);
        return options.grace_period_seconds.map_or(pending, |wanted| wanted.max(1).min(pending));
    }
    if node.is_empty() || ended {
        return 0;
    }
    let own = pod["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30);
    match options.grace_period_seconds.unwrap_or(own) {
        negative if negative < 0 => 1,
        grace => grace,
    }
}

fn finalizers_after(value: &Value, propagation: Option<Propagation>) -> Vec<String> {
    const FOREGROUND: &str = "foregroundDeletion";
    const ORPHAN: &str = "orphan";
    let mut list: Vec<String> = meta::finalizers(value).into_iter().map(str::to_owned).collect();
    let add = match propagation {
        None => return list,
        Some(Propagation::Foreground) => Some(FOREGROUND),
        Some(Propagation::Orphan) => Some(ORPHAN),
        Some(Propagation::Background) => None,
    };
    list.retain(|f| f != FOREGROUND && f != ORPHAN);
    list.extend(add.map(str::to_owned));
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(node: &str, finalizers: &[&str]) -> Value {
        json!({
            "metadata": {"name": "a", "generation": 1, "finalizers": finalizers},
            "spec": {"nodeName": node, "terminationGracePeriodSeconds": 30},
            "status": {"phase": "Running"},
        })
    }

    fn grace(secs: Option<i64>) -> DeleteOptions {
        DeleteOptions { grace_period_seconds: secs, ..DeleteOptions::default() }
    }

    #[track_caller]
    fn marked(step: Step) -> Value {
        let Step::Mark(value) = step else { panic!("marks, not {step:?}") };
        value
    }

    #[test]
    fn a_pod_on_a_node_gets_its_grace_and_a_later_request_may_only_shorten_it() {
        let first = marked(step(&kinds::POD, &pod("n1", &[]), &grace(None)));
        assert_eq!(first["metadata"]["deletionGracePeriodSeconds"], 30);
        assert_eq!(first["metadata"]["generation"], 2);
        assert_eq!(step(&kinds::POD, &first, &grace(None)), Step::Nothing);
        assert_eq!(step(&kinds::POD, &first, &grace(Some(60))), Step::Nothing);
        let shorter = marked(step(&kinds::POD, &first, &grace(Some(5))));
        assert_eq!(shorter["metadata"]["deletionGracePeriodSeconds"], 5);
        assert_eq!(step(&kinds::POD, &shorter, &grace(Some(0))), Step::Remove);
    }

    #[test]
    fn a_pod_without_node_or_that_ended_goes_at_once() {
        assert_eq!(step(&kinds::POD, &pod("", &[]), &grace(None)), Step::Remove);
        let mut ended = pod("n1", &[]);
        ended["status"]["phase"] = json!("Failed");
        assert_eq!(step(&kinds::POD, &ended, &grace(None)), Step::Remove);
    }

    #[test]
    fn finalizers_hold_an_object() {
        let held = marked(step(&kinds::POD, &pod("", &["x/y"]), &grace(Some(0))));
        assert_eq!(held["metadata"]["deletionGracePeriodSeconds"], 0);
        let options = DeleteOptions {
            propagation: Some(Propagation::Foreground),
            ..DeleteOptions::default()
        };
        let set = json!({"metadata": {"name": "rs"}, "spec": {}});
        let waiting = marked(step(&kinds::REPLICA_SET, &set, &options));
        assert_eq!(waiting["metadata"]["finalizers"], json!(["foregroundDeletion"]));
        let background = DeleteOptions {
            propagation: Some(Propagation::Background),
            ..DeleteOptions::default()
        };
        assert_eq!(step(&kinds::REPLICA_SET, &waiting, &background), Step::Remove);
    }
}
