//! Containers: from a configuration to a process and back to nothing.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::snapshots::{PrepareSnapshotRequest, RemoveSnapshotRequest};
use containerd_client::services::v1::{
    Container, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest,
    DeleteTaskRequest, GetContainerRequest, GetRequest, KillRequest, StartRequest, WaitRequest,
};
use containerd_client::types::v1::{Process, Status as TaskStatus};
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tonic::{Code, Status};

use super::error::gone_is_fine;
use super::record::{ContainerRecord, Record, SandboxRecord};
use super::types::{ContainerConfig, Exit};
use super::{Inner, RuntimeError, exit_record, lease, sandbox, spec, termination, user};
use crate::logd::LogSpec;

/// The snapshotter that containers' root file systems come from.
pub(crate) const SNAPSHOTTER: &str = "overlayfs";

/// Exit code of a container whose process could not be started, as the CRI gives it.
const START_ERROR_CODE: i32 = 128;

/// Exit code where nobody knows it.
const UNKNOWN_CODE: i32 = 137;

/// A new id of 64 hexadecimal digits; `parts` only spread it.
pub(crate) fn new_id(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.update(uuid::Uuid::new_v4());
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) async fn create(
    inner: &Arc<Inner>,
    sandbox_id: &str,
    config: &ContainerConfig,
) -> Result<String, RuntimeError> {
    let pod = sandbox::record(inner, sandbox_id)
        .await?
        .ok_or_else(|| RuntimeError::NotFound { what: "sandbox", id: sandbox_id.to_owned() })?;
    let image = inner.images.resolve(&config.image_id).await?;
    let id = new_id(&[&pod.pod.uid, &config.name, &config.attempt.to_string()]);
    let lease = lease::create(&inner.connection, "container").await?;
    let leased = inner.connection.under_lease(&lease);
    let result = async {
        let prepare = PrepareSnapshotRequest {
            snapshotter: SNAPSHOTTER.into(),
            key: id.clone(),
            parent: image.chain_id.clone(),
            ..PrepareSnapshotRequest::default()
        };
        let mounts = leased
            .snapshots()
            .prepare(prepare)
            .await
            .map_err(RuntimeError::call("prepare a root file system for", &config.name))?
            .into_inner()
            .mounts;
        let root = user::RootFs::of(&mounts);
        let target_pid = match &config.target_container_id {
            Some(target) => Some(running_pid(inner, target).await?),
            None if pod.share_pid => Some(pause_pid(inner, sandbox_id, &pod)?),
            None => None,
        };
        let oci = spec::container(inner, &id, sandbox_id, &pod, config, &image, &root, target_pid)?;
        let stop_signal = image.config.stop_signal.clone().unwrap_or_default();
        let cgroup = spec::cgroup_of(&pod.cgroup_parent, &id);
        let reference = image.reference();
        let record = Record::Container(ContainerRecord::new(
            sandbox_id,
            &pod,
            config,
            &reference,
            stop_signal,
            cgroup,
        ));
        let request = Container {
            id: id.clone(),
            labels: record.labels(),
            image: config.image_name.clone(),
            runtime: Some(sandbox::runtime_of(inner, &pod.runtime_handler)),
            spec: Some(spec::to_any(&oci)?),
            snapshotter: SNAPSHOTTER.into(),
            snapshot_key: id.clone(),
            extensions: record.extensions(),
            ..Container::default()
        };
        let create = CreateContainerRequest { container: Some(request) };
        leased
            .containers()
            .create(create)
            .await
            .map_err(RuntimeError::call("create container", &config.name))?;
        inner.mounts.insert(&id, mounts);
        Ok(())
    }
    .await;
    lease::delete(&inner.connection, &lease).await;
    match result {
        Ok(()) => Ok(id),
        Err(error) => {
            drop(remove(inner, &id).await);
            Err(error)
        }
    }
}

pub(crate) async fn start(inner: &Arc<Inner>, id: &str) -> Result<(), RuntimeError> {
    let record = record(inner, id).await?;
    let mounts = inner.mounts.take_or_ask(&inner.connection, id).await?;
    let log = LogSpec {
        path: record.log_path.clone(),
        max_bytes: inner.options.log_max_bytes,
        max_files: inner.options.log_max_files,
    };
    let pipes = inner.logs.open(id, log, record.tty, record.stdin).await?;
    let _starting = inner.starting.enter(id);
    let _slot = inner.starts.acquire().await;
    let create = CreateTaskRequest {
        container_id: id.to_owned(),
        rootfs: mounts,
        stdin: pipes.stdin,
        stdout: pipes.stdout,
        stderr: pipes.stderr,
        terminal: record.tty,
        ..CreateTaskRequest::default()
    };
    let result = async {
        inner.connection.tasks().create(create).await?;
        mark_started(inner, id).map_err(|error| Status::internal(error.to_string()))?;
        inner
            .connection
            .tasks()
            .start(StartRequest { container_id: id.to_owned(), ..StartRequest::default() })
            .await
    }
    .await;
    let Err(status) = result else { return Ok(()) };
    // The task may exist without a process in it.
    let delete = DeleteTaskRequest { container_id: id.to_owned() };
    drop(inner.connection.tasks().delete(delete).await);
    inner.logs.close(id).await;
    let exit = Exit {
        code: START_ERROR_CODE,
        reason: "StartError".into(),
        message: format!("failed to create containerd task: {}", status.message()),
        started_at: None,
        finished_at: Timestamp::now(),
    };
    exit_record::write(&inner.options.root_dir, id, &exit)?;
    Err(RuntimeError::Start { message: exit.message })
}

pub(crate) async fn stop(
    inner: &Arc<Inner>,
    id: &str,
    grace: Duration,
) -> Result<(), RuntimeError> {
    let record = match record(inner, id).await {
        Err(RuntimeError::NotFound { .. }) => return Ok(()),
        other => other?,
    };
    inner.starting.finished(id).await;
    let signal = user::signal_number(&record.stop_signal);
    if !grace.is_zero() {
        send(inner, id, signal).await?;
        let wait = WaitRequest { container_id: id.to_owned(), ..WaitRequest::default() };
        let mut tasks = inner.connection.tasks();
        if let Ok(ended) = tokio::time::timeout(grace, tasks.wait(wait)).await {
            gone_is_fine(ended.map(tonic::Response::into_inner))
                .map_err(RuntimeError::call("wait for container", id))?;
            return reap(inner, id).await;
        }
    }
    end_task(inner, id, libc::SIGKILL.cast_unsigned()).await
}

/// Sends `signal` and reaps when the process has ended.
pub(crate) async fn end_task(
    inner: &Arc<Inner>,
    id: &str,
    signal: u32,
) -> Result<(), RuntimeError> {
    inner.starting.finished(id).await;
    match task_of(inner, id).await?.map(|task| task.status()) {
        None => return Ok(()),
        // Never started: there is nothing to wait for, and deleting it ends what is there of it.
        Some(TaskStatus::Created | TaskStatus::Stopped) => return reap(inner, id).await,
        Some(_) => {}
    }
    send(inner, id, signal).await?;
    let wait = WaitRequest { container_id: id.to_owned(), ..WaitRequest::default() };
    gone_is_fine(inner.connection.tasks().wait(wait).await.map(tonic::Response::into_inner))
        .map_err(RuntimeError::call("wait for", id))?;
    reap(inner, id).await
}

async fn send(inner: &Inner, id: &str, signal: u32) -> Result<(), RuntimeError> {
    let kill =
        KillRequest { container_id: id.to_owned(), signal, all: false, ..KillRequest::default() };
    match inner.connection.tasks().kill(kill).await {
        Ok(_) => Ok(()),
        // Ended already, or never started.
        Err(status) if matches!(status.code(), Code::NotFound | Code::FailedPrecondition) => Ok(()),
        Err(status) => Err(RuntimeError::call("signal", id)(status)),
    }
}

/// The container's task, if it has one.
pub(super) async fn task_of(inner: &Inner, id: &str) -> Result<Option<Process>, RuntimeError> {
    let request = GetRequest { container_id: id.to_owned(), ..GetRequest::default() };
    match inner.connection.tasks().get(request).await {
        Ok(reply) => Ok(Some(reply.into_inner().process.unwrap_or_default())),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(RuntimeError::call("look up", id)(status)),
    }
}

/// Brings an ended task's exit to the disk and then lets containerd forget the task.
pub(crate) async fn reap(inner: &Arc<Inner>, id: &str) -> Result<(), RuntimeError> {
    record_end(inner, id).await?;
    forget_task(inner, id).await
}

/// Brings an ended task's output into its log and its exit to the disk. A running task, or none, is left alone.
pub(crate) async fn record_end(inner: &Arc<Inner>, id: &str) -> Result<(), RuntimeError> {
    let Some(process) = task_of(inner, id).await? else { return Ok(()) };
    if process.status() == TaskStatus::Stopped
        && exit_record::read(&inner.options.root_dir, id).is_none()
    {
        inner.logs.drain(id).await;
        let exit = exit_of(inner, id, process.exit_status, process.exited_at).await;
        exit_record::write(&inner.options.root_dir, id, &exit)?;
    }
    Ok(())
}

/// Lets containerd forget a task that does not run.
pub(crate) async fn forget_task(inner: &Arc<Inner>, id: &str) -> Result<(), RuntimeError> {
    let delete = DeleteTaskRequest { container_id: id.to_owned() };
    match inner.connection.tasks().delete(delete).await {
        Ok(_) => {}
        Err(status) if status.code() == Code::NotFound => {}
        // The shim went with its last task; containerd notices by itself.
        Err(status) if status.message().contains("ttrpc: closed") => {}
        Err(status) => return Err(RuntimeError::call("delete the task of", id)(status)),
    }
    inner.logs.close(id).await;
    Ok(())
}

async fn exit_of(
    inner: &Inner,
    id: &str,
    status: u32,
    exited_at: Option<prost_types::Timestamp>,
) -> Exit {
    let record = record(inner, id).await.ok();
    let oom = record.as_ref().is_some_and(|record| spec::was_oom_killed(&record.cgroup));
    let code = i32::try_from(status).unwrap_or(UNKNOWN_CODE);
    let reason = match code {
        _ if oom => "OOMKilled",
        0 => "Completed",
        _ => "Error",
    };
    let failed = code != 0 || oom;
    let log = record.filter(|r| r.termination_message_from_log && failed).map(|r| r.log_path);
    Exit {
        code,
        reason: reason.into(),
        message: termination::message(&inner.options.root_dir, id, log.as_deref()),
        started_at: started_at(inner, id),
        finished_at: exited_at.and_then(timestamp).unwrap_or_else(Timestamp::now),
    }
}

/// A container that was started and whose task is gone without anybody having seen how it ended.
pub(crate) fn lost(inner: &Inner, id: &str) -> Exit {
    let exit = Exit {
        code: UNKNOWN_CODE,
        reason: "ContainerStatusUnknown".into(),
        message: "The container could not be located when the pod was looked at".into(),
        started_at: started_at(inner, id),
        finished_at: Timestamp::now(),
    };
    if let Err(error) = exit_record::write(&inner.options.root_dir, id, &exit) {
        tracing::warn!(container = id, %error, "The end of a container cannot be recorded");
    }
    exit
}

pub(crate) async fn remove(inner: &Arc<Inner>, id: &str) -> Result<(), RuntimeError> {
    end_task(inner, id, libc::SIGKILL.cast_unsigned()).await?;
    let request = DeleteContainerRequest { id: id.to_owned() };
    gone_is_fine(
        inner.connection.containers().delete(request).await.map(tonic::Response::into_inner),
    )
    .map_err(RuntimeError::call("remove container", id))?;
    let snapshot = RemoveSnapshotRequest { snapshotter: SNAPSHOTTER.into(), key: id.to_owned() };
    gone_is_fine(
        inner.connection.snapshots().remove(snapshot).await.map(tonic::Response::into_inner),
    )
    .map_err(RuntimeError::call("remove the root file system of", id))?;
    inner.logs.close(id).await;
    exit_record::remove(&inner.options.root_dir, id);
    termination::remove(&inner.options.root_dir, id);
    drop(fs::remove_file(started_marker(inner, id)));
    Ok(())
}

/// The container's record as containerd has it.
pub(crate) async fn record(inner: &Inner, id: &str) -> Result<ContainerRecord, RuntimeError> {
    let not_found = || RuntimeError::NotFound { what: "container", id: id.to_owned() };
    let request = GetContainerRequest { id: id.to_owned() };
    let reply =
        inner.connection.containers().get(request).await.map_err(|status: Status| match status
            .code()
        {
            Code::NotFound => not_found(),
            _ => RuntimeError::call("look up container", id)(status),
        })?;
    match reply.into_inner().container.as_ref().and_then(Record::of) {
        Some(Record::Container(record)) => Ok(record),
        _ => Err(not_found()),
    }
}

async fn running_pid(inner: &Inner, id: &str) -> Result<u32, RuntimeError> {
    let request = GetRequest { container_id: id.to_owned(), ..GetRequest::default() };
    let reply = inner
        .connection
        .tasks()
        .get(request)
        .await
        .map_err(RuntimeError::call("find the process of", id))?;
    let process = reply.into_inner().process.unwrap_or_default();
    if process.status() == TaskStatus::Running {
        Ok(process.pid)
    } else {
        Err(RuntimeError::invalid(format!(
            "container {id}, whose processes shall be shared, is not running"
        )))
    }
}

/// The process whose PID namespace all containers of the pod share.
fn pause_pid(inner: &Inner, id: &str, sandbox: &SandboxRecord) -> Result<u32, RuntimeError> {
    let pid = inner.pauses()?.pid(&sandbox.cgroup(id)).map(i32::cast_unsigned);
    pid.ok_or_else(|| {
        RuntimeError::invalid("the sandbox, whose processes shall be shared, is not running")
    })
}

/// Written before the task is made, in memory: a container with this mark, without a task and without an exit record
/// has run and was lost.
fn mark_started(inner: &Inner, id: &str) -> Result<(), RuntimeError> {
    let path = started_marker(inner, id);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(RuntimeError::system("create", folder))?;
    }
    fs::write(&path, Timestamp::now().to_string()).map_err(RuntimeError::system("write", &path))
}

/// When the container was started, if it was.
pub(crate) fn started_at(inner: &Inner, id: &str) -> Option<Timestamp> {
    fs::read_to_string(started_marker(inner, id)).ok()?.parse().ok()
}

fn started_marker(inner: &Inner, id: &str) -> PathBuf {
    inner.options.run_dir.join("started").join(id)
}

pub(crate) fn timestamp(value: prost_types::Timestamp) -> Option<Timestamp> {
    Timestamp::new(value.seconds, value.nanos).ok()
}
