//! After the end: the final status first, then everything that the pod held, then the API object.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Preconditions};

use super::kill::stop_sandbox;
use super::{Desired, Next, Worker, retry_at};
use crate::events::Severity;
use crate::pod::plan::Plan;
use crate::pod::{container, spec};
use crate::volume::teardown;

/// How far the end has come. Each step is idempotent; after a restart of the agent they are all done again.
#[derive(Debug, Default)]
pub(super) struct FinishState {
    released: bool,
    failures: u32,
}

impl FinishState {
    /// The pod is over and its resources are released: only the object and the records are left.
    pub(super) fn is_complete(&self, desired: &Desired) -> bool {
        self.released && !desired.must_stop()
    }
}

impl Worker {
    /// Nothing of the pod runs and nothing will.
    pub(super) async fn conclude(&mut self, desired: &Desired, plan: &Plan) -> Next {
        tracing::trace!(pod = spec::key(&desired.pod), finished = plan.finished, "Pod is over");
        // The end must be visible in the API before anything that it was made of disappears.
        if !self.finish.released {
            self.status.flushed().await;
            if let Err(problem) = self.release(&desired.pod).await {
                return self.try_later(desired, &problem);
            }
            self.finish.released = true;
        }
        if !desired.must_stop() {
            // Completed, and kept for its logs and status until somebody deletes it.
            return Next::Sleep(None);
        }
        if let Err(problem) = self.forget(&desired.pod).await {
            return self.try_later(desired, &problem);
        }
        if !desired.gone
            && !spec::is_static(&desired.pod)
            && let Err(problem) = self.delete_object(&desired.pod).await
        {
            return self.try_later(desired, &problem);
        }
        self.node.registry.remove(spec::uid(&desired.pod));
        Next::Gone
    }

    fn try_later(&mut self, desired: &Desired, problem: &str) -> Next {
        self.finish.failures += 1;
        tracing::warn!(pod = spec::key(&desired.pod), problem, "Pod not cleaned up, will retry");
        if self.finish.failures == 3 {
            self.node.events.pod(&desired.pod, Severity::Warning, "FailedKillPod", problem);
        }
        Next::Sleep(Some(retry_at(Timestamp::now(), self.finish.failures)))
    }

    /// Gives back what the pod held: volumes, cgroup, booked resources.
    async fn release(&mut self, pod: &Pod) -> Result<(), String> {
        let uid = spec::uid(pod);
        self.node.objects.release(uid);
        self.node.ledger.release(uid);
        self.node.update_class_shares();
        let (dir, cgroups, uid) =
            (self.pod_volumes(pod).pod_dir, self.node.cgroups.clone(), uid.to_owned());
        let work = tokio::task::spawn_blocking(move || {
            teardown::remove_pod_dir(&dir)
                .map_err(|e| format!("cannot remove {}: {e}", dir.display()))?;
            cgroups.remove_pod(&uid).map_err(|e| crate::pod::image::chain(&e))
        });
        work.await.map_err(|e| e.to_string())?
    }

    /// Removes containers, sandboxes and logs.
    async fn forget(&mut self, pod: &Pod) -> Result<(), String> {
        forget_observed(&self.node, self.observed.as_ref()).await?;
        let logs = container::log_dir(&self.node.config.pod_logs_dir, pod);
        match std::fs::remove_dir_all(&logs) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("cannot remove {}: {error}", logs.display()))
            }
            _ => Ok(()),
        }
    }

    async fn delete_object(&self, pod: &Pod) -> Result<(), String> {
        let Some(client) = self.node.client.clone() else { return Ok(()) };
        let uid = pod.metadata.uid.clone();
        delete_now(client, spec::namespace(pod), spec::name(pod), uid)
            .await
            .map_err(|e| e.to_string())
    }
}

/// Removes all containers and sandboxes, which have been stopped.
pub(in crate::pod) async fn forget_observed(
    node: &crate::pod::shared::Node,
    observed: Option<&crate::runtime::types::ObservedPod>,
) -> Result<(), String> {
    let Some(observed) = observed else { return Ok(()) };
    for container in &observed.containers {
        let removed = node.runtime.remove_container(&container.id).await;
        removed.map_err(|e| format!("cannot remove container {}: {e}", container.name))?;
    }
    for sandbox in &observed.sandboxes {
        stop_sandbox(node, &sandbox.id).await?;
        node.runtime.remove_sandbox(&sandbox.id).await.map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Deletes an API object without grace, if it is still the one with that uid.
pub(in crate::pod) async fn delete_now(
    client: kube::Client,
    namespace: &str,
    name: &str,
    uid: Option<String>,
) -> Result<(), kube::Error> {
    let api: Api<Pod> = Api::namespaced(client, namespace);
    let preconditions = Some(Preconditions { uid, resource_version: None });
    let params =
        DeleteParams { grace_period_seconds: Some(0), preconditions, ..DeleteParams::default() };
    match api.delete(name, &params).await {
        // Gone already, or a namesake stands there now.
        Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Ok(()),
    }
}
