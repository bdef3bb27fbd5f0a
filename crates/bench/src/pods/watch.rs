//! When pods became Ready and when they were gone, as anybody sees it who watches.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures_util::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::{Client, ResourceExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::manifest::{LABEL, NAMESPACE};

/// Something that a measurement waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Milestone {
    Ready,
    Gone,
}

/// A pod that reached something, and when the event arrived here.
#[derive(Debug)]
struct Seen {
    name: String,
    what: Milestone,
    at: Instant,
}

/// A watch on the pods of the bench.
#[derive(Debug)]
pub(crate) struct PodWatch {
    seen: mpsc::UnboundedReceiver<Seen>,
    task: JoinHandle<()>,
    api: Api<Pod>,
}

impl PodWatch {
    /// Watches from now on.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub(crate) async fn start(client: &Client) -> Result<PodWatch> {
        let api: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
        let selector = format!("{LABEL}=yes");
        let list = api.list(&ListParams::default().labels(&selector)).await?;
        if let Some(left) = list.items.first() {
            bail!("pod {} is left from another run", left.name_any());
        }
        let version = list.metadata.resource_version.context("a list without a version")?;
        let (sender, seen) = mpsc::unbounded_channel();
        let watched = api.clone();
        let task = tokio::spawn(async move {
            if let Err(error) = follow(&watched, &selector, version, &sender).await {
                eprintln!("the watch on pods ended: {error:#}");
            }
        });
        Ok(PodWatch { seen, task, api })
    }

    /// Waits until all pods called `names` have reached `what`; the moment of each, in the order of arrival.
    ///
    /// # Errors
    /// When they do not within `limit`; with what the API server says about the first that did not.
    pub(crate) async fn all(
        &mut self,
        names: &[String],
        what: Milestone,
        limit: Duration,
    ) -> Result<Vec<Instant>> {
        let mut missing: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let mut moments = Vec::with_capacity(names.len());
        let deadline = tokio::time::Instant::now() + limit;
        while let Some(first) = missing.first() {
            let Ok(seen) = tokio::time::timeout_at(deadline, self.seen.recv()).await else {
                let why = self.describe(first).await?;
                bail!("pod {first} is not {what:?} after {limit:?}; {why}");
            };
            let seen = seen.context("the watch on pods has ended")?;
            if seen.what == what && missing.remove(seen.name.as_str()) {
                moments.push(seen.at);
            }
        }
        Ok(moments)
    }

    /// What the API server knows about a pod, for an error.
    async fn describe(&self, name: &str) -> Result<String> {
        let status = self.api.get_opt(name).await?.and_then(|p| p.status);
        let events: Api<Event> = Api::namespaced(self.api.clone().into_client(), NAMESPACE);
        let events = events.list(&ListParams::default()).await?.items;
        let of_pod = events.into_iter().filter(|e| e.involved_object.name.as_deref() == Some(name));
        let messages: Vec<String> = of_pod.filter_map(|e| e.message).collect();
        let status = serde_json::to_string(&status)?;
        Ok(format!("its events: {}; its status: {status}", messages.join("; ")))
    }
}

impl Drop for PodWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(
    api: &Api<Pod>,
    selector: &str,
    mut version: String,
    sender: &mpsc::UnboundedSender<Seen>,
) -> Result<()> {
    let params = WatchParams::default().labels(selector);
    loop {
        // A server ends a watch now and then; the next one begins where it ended.
        let mut events = api.watch(&params, &version).await?.boxed();
        while let Some(event) = events.try_next().await? {
            let at = Instant::now();
            let (pod, what) = match event {
                WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                    let ready = is_ready(&pod).then_some(Milestone::Ready);
                    (pod, ready)
                }
                WatchEvent::Deleted(pod) => (pod, Some(Milestone::Gone)),
                WatchEvent::Bookmark(mark) => {
                    version = mark.metadata.resource_version;
                    continue;
                }
                WatchEvent::Error(status) => bail!("{status}"),
            };
            version = pod.resource_version().unwrap_or(version);
            if let Some(what) = what
                && sender.send(Seen { name: pod.name_any(), what, at }).is_err()
            {
                return Ok(());
            }
        }
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn running_is_not_ready() {
        let pod = |conditions: serde_json::Value| -> Pod {
            serde_json::from_value(
                json!({"status": {"phase": "Running", "conditions": conditions}}),
            )
            .unwrap()
        };
        assert!(!is_ready(&pod(json!([]))));
        assert!(!is_ready(&pod(json!([{"type": "Ready", "status": "False"}]))));
        assert!(!is_ready(&pod(json!([{"type": "ContainersReady", "status": "True"}]))));
        assert!(is_ready(&pod(json!([{"type": "Ready", "status": "True"}]))));
    }
}
