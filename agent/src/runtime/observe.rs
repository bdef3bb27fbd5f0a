//! What there is: containerd's containers and tasks, joined with the exits on our disk.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use containerd_client::services::v1::{
    Container, CreateNamespaceRequest, GetRequest, ListContainersRequest, ListTasksRequest,
    Namespace,
};
use containerd_client::types::v1::{Process, Status as TaskStatus};
use jiff::Timestamp;
use tonic::Code;

use super::connection::Connection;
use super::record::{ContainerRecord, LABEL_POD_UID, Record, SandboxRecord, boot_id};
use super::types::{ContainerState, ImageRef, ObservedContainer, ObservedPod, ObservedSandbox};
use super::{Inner, RuntimeError, container, exit_record};

/// Makes our containerd namespace if it is not there.
pub(crate) async fn ensure_namespace(
    connection: &Connection,
    name: &str,
) -> Result<(), RuntimeError> {
    let namespace = Namespace { name: name.to_owned(), ..Namespace::default() };
    let request = CreateNamespaceRequest { namespace: Some(namespace) };
    match connection.namespaces().create(request).await {
        Err(status) if status.code() != Code::AlreadyExists => {
            Err(RuntimeError::call("create namespace", name)(status))
        }
        _ => Ok(()),
    }
}

pub(crate) async fn all(inner: &Arc<Inner>) -> Result<Vec<ObservedPod>, RuntimeError> {
    let containers = list(inner, Vec::new()).await?;
    let tasks = inner
        .connection
        .tasks()
        .list(ListTasksRequest::default())
        .await
        .map_err(RuntimeError::call("list", "tasks"))?
        .into_inner()
        .tasks;
    let tasks: HashMap<String, Process> =
        tasks.into_iter().map(|task| (task.id.clone(), task)).collect();
    let mut pods = BTreeMap::new();
    for container in containers {
        let task = tasks.get(&container.id).cloned();
        add(inner, &mut pods, &container, task).await?;
    }
    Ok(finish(pods))
}

pub(crate) async fn pod(
    inner: &Arc<Inner>,
    uid: &str,
) -> Result<Option<ObservedPod>, RuntimeError> {
    let filter = format!(r#"labels."{LABEL_POD_UID}"=={uid}"#);
    let mut pods = BTreeMap::new();
    for container in list(inner, vec![filter]).await? {
        if matches!(Record::of(&container), Some(Record::Sandbox(_))) {
            add(inner, &mut pods, &container, None).await?;
            continue;
        }
        let request = GetRequest { container_id: container.id.clone(), ..GetRequest::default() };
        let task = match inner.connection.tasks().get(request).await {
            Ok(reply) => reply.into_inner().process,
            Err(status) if status.code() == Code::NotFound => None,
            Err(status) => return Err(RuntimeError::call("look up", &container.id)(status)),
        };
        add(inner, &mut pods, &container, task).await?;
    }
    Ok(finish(pods).into_iter().next())
}

pub(super) async fn list(
    inner: &Inner,
    filters: Vec<String>,
) -> Result<Vec<Container>, RuntimeError> {
    let reply = inner.connection.containers().list(ListContainersRequest { filters }).await;
    Ok(reply.map_err(RuntimeError::call("list", "containers"))?.into_inner().containers)
}

async fn add(
    inner: &Arc<Inner>,
    pods: &mut BTreeMap<String, ObservedPod>,
    container: &Container,
    task: Option<Process>,
) -> Result<(), RuntimeError> {
    let Some(record) = Record::of(container) else { return Ok(()) };
    let created_at =
        container.created_at.and_then(container::timestamp).unwrap_or(Timestamp::UNIX_EPOCH);
    let entry = pods.entry(record.pod().uid.clone()).or_insert_with(|| ObservedPod {
        pod: record.pod().into(),
        sandboxes: Vec::new(),
        containers: Vec::new(),
    });
    match record {
        Record::Sandbox(record) => {
            let ready = sandbox_is_ready(inner, &container.id, &record)?;
            entry.sandboxes.push(ObservedSandbox {
                id: container.id.clone(),
                attempt: record.attempt,
                ready,
                created_at,
                ips: record.ips,
                host_network: record.host_network,
            });
        }
        Record::Container(record) => {
            let state = state_of(inner, &container.id, &record, task).await?;
            entry.containers.push(ObservedContainer {
                id: container.id.clone(),
                name: record.name,
                attempt: record.attempt,
                sandbox_id: record.sandbox_id,
                spec_hash: record.spec_hash,
                image_name: record.image_name,
                image: ImageRef { id: record.image_id, repo_digest: record.repo_digest },
                state,
                created_at,
                log_path: record.log_path,
            });
        }
    }
    Ok(())
}

/// Ready: its pause process runs.
fn sandbox_is_ready(inner: &Inner, id: &str, record: &SandboxRecord) -> Result<bool, RuntimeError> {
    Ok(record.boot == boot_id() && inner.pauses()?.pid(&record.cgroup(id)).is_some())
}

async fn state_of(
    inner: &Arc<Inner>,
    id: &str,
    record: &ContainerRecord,
    task: Option<Process>,
) -> Result<ContainerState, RuntimeError> {
    // Whatever containerd still has of it: what is on the disk has happened.
    if let Some(exit) = exit_record::read(&inner.options.root_dir, id) {
        return Ok(ContainerState::Exited(exit));
    }
    let started_at = container::started_at(inner, id);
    match task {
        Some(task) if task.status() == TaskStatus::Stopped => {
            container::record_end(inner, id).await?
        }
        Some(task) if task.status() == TaskStatus::Created => return Ok(ContainerState::Created),
        Some(task) => {
            let started_at = started_at.unwrap_or_else(Timestamp::now);
            return Ok(ContainerState::Running { started_at, pid: task.pid });
        }
        None => {}
    }
    if let Some(exit) = exit_record::read(&inner.options.root_dir, id) {
        return Ok(ContainerState::Exited(exit));
    }
    let was_started = started_at.is_some() || record.boot != boot_id();
    if was_started && !inner.starting.contains(id) {
        return Ok(ContainerState::Exited(container::lost(inner, id)));
    }
    Ok(ContainerState::Created)
}

fn finish(pods: BTreeMap<String, ObservedPod>) -> Vec<ObservedPod> {
    let mut pods: Vec<ObservedPod> = pods.into_values().collect();
    for pod in &mut pods {
        pod.sandboxes.sort_by_key(|s| std::cmp::Reverse(s.attempt));
        pod.containers.sort_by(|a, b| a.name.cmp(&b.name).then(b.attempt.cmp(&a.attempt)));
    }
    pods
}

/// The uid of the pod that container `id` belongs to.
pub(crate) async fn pod_of(inner: &Inner, id: &str) -> Option<String> {
    let request = containerd_client::services::v1::GetContainerRequest { id: id.to_owned() };
    let reply = inner.connection.containers().get(request).await.ok()?;
    Some(Record::of(&reply.into_inner().container?)?.pod().uid.clone())
}
