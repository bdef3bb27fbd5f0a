//! Which container a request means, out of the status of its pod, with the kubelet's words for why
//! there is none. Pure.

use std::sync::Arc;

use http::StatusCode;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

/// Why a request cannot be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    pub text: String,
}

impl Refusal {
    pub fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }
}

/// A pod by namespace and name and, if given, UID.
///
/// # Errors
/// When no such pod is on this node.
pub fn pod(
    pods: &[Arc<Pod>],
    namespace: &str,
    name: &str,
    uid: Option<&str>,
) -> Result<Arc<Pod>, Refusal> {
    let matches = |pod: &&Arc<Pod>| {
        let meta = &pod.metadata;
        meta.namespace.as_deref() == Some(namespace)
            && meta.name.as_deref() == Some(name)
            && uid.is_none_or(|uid| meta.uid.as_deref() == Some(uid))
    };
    let found = pods.iter().find(matches).cloned();
    found.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, format!("pod {name:?} does not exist")))
}

/// The runtime's id of the container whose log is meant.
///
/// # Errors
/// When the pod has no such container or it has no log yet.
pub fn container_for_logs(pod: &Pod, container: &str, previous: bool) -> Result<String, Refusal> {
    let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
    if !has_container(pod, container) {
        let text = format!("container {container:?} not found in pod {pod_name:?}");
        return Err(Refusal::new(StatusCode::NOT_FOUND, text));
    }
    let of_pod = |text: String| {
        let text = format!("container {container:?} in pod {pod_name:?} {text}");
        Refusal::new(StatusCode::BAD_REQUEST, text)
    };
    let Some(status) = status_of(pod, container) else {
        return Err(of_pod("is not available".to_owned()));
    };
    let state = status.state.clone().unwrap_or_default();
    let last = status.last_state.clone().unwrap_or_default().terminated;
    let last_id = last.as_ref().and_then(|last| last.container_id.as_deref()).and_then(runtime_id);
    if previous {
        let text =
            format!("previous terminated container {container:?} in pod {pod_name:?} not found");
        return last_id.ok_or_else(|| Refusal::new(StatusCode::BAD_REQUEST, text));
    }
    let own_id = status.container_id.as_deref().and_then(runtime_id);
    if state.running.is_some() {
        return own_id.ok_or_else(|| of_pod("is not available".to_owned()));
    }
    if let Some(terminated) = state.terminated {
        let id = terminated.container_id.as_deref().and_then(runtime_id);
        return id.or(last_id).ok_or_else(|| of_pod("is terminated".to_owned()));
    }
    if last.is_some() {
        return last_id.ok_or_else(|| of_pod("is terminated".to_owned()));
    }
    let reason = state.waiting.and_then(|waiting| waiting.reason);
    Err(of_pod(match reason.as_deref() {
        Some("ErrImagePull") => "is waiting to start: image can't be pulled".to_owned(),
        Some("ImagePullBackOff") => {
            "is waiting to start: trying and failing to pull image".to_owned()
        }
        Some(reason) => format!("is waiting to start: {reason}"),
        None => "is waiting to start - no logs yet".to_owned(),
    }))
}

/// The runtime's id of a container that runs, for exec and attach.
///
/// # Errors
/// When the pod has no such container or it does not run.
pub fn running_container(pod: &Pod, container: &str) -> Result<String, Refusal> {
    let running = status_of(pod, container)
        .filter(|status| status.state.as_ref().is_some_and(|state| state.running.is_some()));
    running.and_then(|status| status.container_id.as_deref()).and_then(runtime_id).ok_or_else(
        || {
            let text = format!("container not found ({container:?})");
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text)
        },
    )
}

/// As [`running_container`], in the words that the kubelet has for attach.
///
/// # Errors
/// See there.
pub fn container_to_attach_to(pod: &Pod, container: &str) -> Result<String, Refusal> {
    running_container(pod, container).map_err(|refusal| {
        let (name, namespace) = (&pod.metadata.name, &pod.metadata.namespace);
        let (name, namespace) = (name.as_deref().unwrap_or(""), namespace.as_deref().unwrap_or(""));
        let text = format!("container {container} not found in pod {name}_{namespace}");
        Refusal { text, ..refusal }
    })
}

fn has_container(pod: &Pod, container: &str) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| &c.name);
    let init = spec.init_containers.iter().flatten().map(|c| &c.name);
    spec.containers.iter().map(|c| &c.name).chain(init).chain(ephemeral).any(|n| n == container)
}

fn status_of<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let lists = [
        &status.container_statuses,
        &status.init_container_statuses,
        &status.ephemeral_container_statuses,
    ];
    lists.into_iter().flatten().flatten().find(|status| status.name == container)
}

/// `containerd://<id>` is `<id>`.
fn runtime_id(container_id: &str) -> Option<String> {
    let id = container_id.split_once("://").map_or(container_id, |(_, id)| id);
    (!id.is_empty()).then(|| id.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod_with(status: Value) -> Pod {
        let mut status = status;
        for (key, value) in [
            ("name", json!("c")),
            ("ready", json!(false)),
            ("restartCount", json!(0)),
            ("image", json!("")),
            ("imageID", json!("")),
        ] {
            status[key] = value;
        }
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"containers": [{"name": "c"}, {"name": "new"}]},
            "status": {"containerStatuses": [status]},
        }))
        .unwrap()
    }

    fn logs(status: Value, previous: bool) -> Result<String, String> {
        container_for_logs(&pod_with(status), "c", previous).map_err(|refusal| refusal.text)
    }

    #[test]
    fn the_log_that_is_meant() {
        let running = json!({"state": {"running": {}}, "containerID": "containerd://new",
            "lastState": {"terminated": {"exitCode": 1, "containerID": "containerd://old"}}});
        assert_eq!(logs(running.clone(), false).unwrap(), "new");
        assert_eq!(logs(running, true).unwrap(), "old");
        let crashed = json!({"state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 1, "containerID": "containerd://old"}}});
        assert_eq!(logs(crashed, false).unwrap(), "old");
    }

    #[test]
    fn why_there_is_none_in_the_kubelets_words() {
        let waiting = |reason: &str| json!({"state": {"waiting": {"reason": reason}}});
        for (status, previous, want) in [
            (
                waiting("ContainerCreating"),
                false,
                "container \"c\" in pod \"p\" is waiting to start: ContainerCreating",
            ),
            (
                waiting("ErrImagePull"),
                false,
                "container \"c\" in pod \"p\" is waiting to start: image can't be pulled",
            ),
            (
                waiting("ImagePullBackOff"),
                false,
                "container \"c\" in pod \"p\" is waiting to start: trying and failing to pull image",
            ),
            (json!({}), false, "container \"c\" in pod \"p\" is waiting to start - no logs yet"),
            (
                json!({"state": {"running": {}}, "containerID": "containerd://x"}),
                true,
                "previous terminated container \"c\" in pod \"p\" not found",
            ),
            (
                json!({"state": {"terminated": {"exitCode": 1}}}),
                false,
                "container \"c\" in pod \"p\" is terminated",
            ),
        ] {
            assert_eq!(logs(status, previous).unwrap_err(), want);
        }
        let pod = pod_with(json!({}));
        let text = |name: &str| container_for_logs(&pod, name, false).unwrap_err().text;
        assert_eq!(text("x"), "container \"x\" not found in pod \"p\"");
        assert_eq!(text("new"), "container \"new\" in pod \"p\" is not available");
    }

    #[test]
    fn only_a_running_container_can_be_entered() {
        let pod = pod_with(json!({"state": {"terminated": {"exitCode": 0}}}));
        let refusal = running_container(&pod, "c").unwrap_err();
        assert_eq!(refusal.text, "container not found (\"c\")");
        let refusal = container_to_attach_to(&pod, "c").unwrap_err();
        assert_eq!(refusal.text, "container c not found in pod p_n");
        let pods = [Arc::new(pod)];
        assert!(super::pod(&pods, "n", "p", Some("u")).is_ok());
        assert_eq!(super::pod(&pods, "n", "p", Some("v")).unwrap_err().status, 404);
    }
}
