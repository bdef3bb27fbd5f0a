//! Writes pod statuses to the API.
//!
//! One small task per pod: while a write is under way newer statuses replace one another, so the API sees the newest and
//! never a queue. What does not matter at once waits a moment for what comes next; Ready changes and ends do not wait.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::status;

/// How long a status that is not urgent waits for the next.
const COALESCE: Duration = Duration::from_millis(200);
const MAX_RETRY: Duration = Duration::from_secs(10);

/// The object that carries a pod's status: the pod itself, or the mirror of a static pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

#[derive(Debug, Clone, Default)]
struct Slot {
    version: u64,
    urgent: u64,
    status: Option<Arc<PodStatus>>,
    target: Option<Target>,
}

/// One pod's way to the API. Dropping it ends the writer.
#[derive(Debug)]
pub(super) struct StatusSlot {
    told: watch::Sender<Slot>,
    written: watch::Receiver<u64>,
}

impl StatusSlot {
    /// `known` is what the API has now.
    pub(super) fn start(client: Option<kube::Client>, known: Option<PodStatus>) -> Self {
        let (told, slot) = watch::channel(Slot::default());
        let (done, written) = watch::channel(0);
        if let Some(client) = client {
            tokio::spawn(
                Writer { client, slot, done, last: known.map(|s| (None, Arc::new(s))) }.run(),
            );
        }
        Self { told, written }
    }

    pub(super) fn set(&self, status: Arc<PodStatus>, target: Option<Target>, urgent: bool) {
        self.told.send_if_modified(|slot| {
            if slot.status.as_ref() == Some(&status) && slot.target == target {
                return false;
            }
            slot.version += 1;
            if urgent {
                slot.urgent = slot.version;
            }
            (slot.status, slot.target) = (Some(status), target);
            true
        });
    }

    /// Waits until the API has what was set last, or the object is gone.
    pub(super) async fn flushed(&self) {
        let version = self.told.borrow().version;
        let mut written = self.written.clone();
        // The writer ends only with the agent, or was never there: nothing to wait for.
        drop(written.wait_for(|done| *done >= version).await);
    }
}

struct Writer {
    client: kube::Client,
    slot: watch::Receiver<Slot>,
    done: watch::Sender<u64>,
    /// What the API is known to have, and on which object (`None`: on the pod as it was first seen).
    last: Option<(Option<Target>, Arc<PodStatus>)>,
}

impl Writer {
    async fn run(mut self) {
        while self.slot.changed().await.is_ok() {
            let seen = self.slot.borrow().clone();
            if seen.urgent <= *self.done.borrow() {
                let urgent = self.slot.wait_for(|slot| slot.urgent > seen.version);
                // Running out of time is the normal case here.
                drop(tokio::time::timeout(COALESCE, urgent).await);
            }
            self.write_newest().await;
        }
    }

    async fn write_newest(&mut self) {
        let mut delay = Duration::from_millis(200);
        loop {
            let slot = self.slot.borrow_and_update().clone();
            let (Some(status), Some(target)) = (slot.status, slot.target) else {
                self.done.send_replace(slot.version);
                return;
            };
            if self.api_has(&target, &status) {
                self.done.send_replace(slot.version);
                return;
            }
            match self.patch(&target, &status).await {
                Ok(()) => {
                    self.last = Some((Some(target), status));
                    self.done.send_replace(slot.version);
                    return;
                }
                // Gone, or another pod has its name now.
                Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => {
                    self.done.send_replace(slot.version);
                    return;
                }
                Err(error) => {
                    tracing::warn!(pod = target.name, %error, "Pod status not written, will retry");
                    // A newer status does not shorten the wait: the API is the problem.
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(MAX_RETRY);
                }
            }
        }
    }

    fn api_has(&self, target: &Target, status: &PodStatus) -> bool {
        self.last.as_ref().is_some_and(|(on, last)| {
            on.as_ref().is_none_or(|on| on == target) && **last == *status
        })
    }

    async fn patch(&self, target: &Target, status: &PodStatus) -> Result<(), kube::Error> {
        let same = self.last.as_ref().filter(|(on, _)| on.as_ref().is_none_or(|on| on == target));
        let body = patch_body(&target.uid, status, same.map(|(_, last)| &**last));
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &target.namespace);
        let (patch, began) = (Patch::Strategic(body), std::time::Instant::now());
        let written = api.patch_status(&target.name, &PatchParams::default(), &patch).await;
        tracing::debug!(pod = target.name, phase = status.phase, elapsed = ?began.elapsed(), "Pod status written");
        written.map(drop)
    }
}

/// The strategic merge patch that turns `last` into `status`. Fields that we no longer set are removed; conditions of others
/// are not in it and so stay.
fn patch_body(uid: &str, status: &PodStatus, last: Option<&PodStatus>) -> Value {
    let value = |status: &PodStatus| serde_json::to_value(status).unwrap_or_default();
    let mut body = value(status);
    let old = last.map(value).unwrap_or_default();
    if let (Some(new), Some(old)) = (body.as_object_mut(), old.as_object()) {
        for key in old.keys().filter(|key| *key != "conditions") {
            new.entry(key.clone()).or_insert(Value::Null);
        }
    }
    // Conditions are merged by type: what one no longer says has to be taken back, too.
    let conditions = body.get_mut("conditions").and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten().filter_map(Value::as_object_mut) {
        for key in ["reason", "message"] {
            condition.entry(key).or_insert(Value::Null);
        }
    }
    // Addresses are merged by key: a list that replaces another has to say so.
    for list in ["podIPs", "hostIPs"] {
        let changed = old.get(list).is_some_and(|old| Some(old) != body.get(list));
        if let (true, Some(items)) = (changed, body.get_mut(list).and_then(Value::as_array_mut)) {
            items.insert(0, json!({ "$patch": "replace" }));
        }
    }
    json!({ "metadata": { "uid": uid }, "status": body })
}

/// Whether others wait for the difference between two statuses.
pub(super) fn is_urgent(old: &PodStatus, new: &PodStatus) -> bool {
    let ready = |s: &PodStatus| status::condition_is_true(s, "Ready");
    ready(old) != ready(new)
        || (old.phase != new.phase && (status::is_terminal(new) || old.phase.is_some()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_that_vanish_are_removed_and_foreign_conditions_left_alone() {
        let status = |v: Value| serde_json::from_value::<PodStatus>(v).unwrap();
        let old = status(json!({
            "phase": "Pending", "message": "m", "podIPs": [{ "ip": "10.0.0.1" }],
            "conditions": [{ "type": "theirs", "status": "True" }],
        }));
        let new = status(json!({ "phase": "Running", "podIPs": [{ "ip": "10.0.0.2" }] }));
        assert_eq!(
            patch_body("u", &new, Some(&old)),
            json!({ "metadata": { "uid": "u" }, "status": {
                "phase": "Running", "message": null,
                "podIPs": [{ "$patch": "replace" }, { "ip": "10.0.0.2" }],
            } })
        );
    }
}
