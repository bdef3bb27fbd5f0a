//! Sandboxes: namespaces that the agent makes and pins itself, the pod's network in them, a pause process that holds
//! them, and the files that all containers of the pod share.
//!
//! Containers join the namespaces by path. containerd keeps the sandbox's record as a container without a task, so that
//! every question about a pod is answered from one place.

mod exempt;
mod network;

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use containerd_client::services::v1::container::Runtime as OciRuntime;
use containerd_client::services::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest,
    ListContainersRequest,
};
use jiff::Timestamp;
use keelson_netlink::netns::{self, Kind, Netns};
use keelson_netlink::route::Rtnl;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

pub(crate) use exempt::make_folder as make_exempt_folder;

use super::error::gone_is_fine;
use super::pause::{self, sysctl};
use super::record::{LABEL_KIND, Record, SandboxRecord};
use super::types::{ObservedSandbox, PodNetwork, RuntimeEvent, SandboxConfig};
use super::{Inner, RuntimeError, container, spec};

/// A pod's `/dev/shm`, as the CRI sizes it.
const SHM_OPTIONS: &str = "mode=1777,size=64m";

/// The runtime that a sandbox's record names in containerd.
const NO_TASK: &str = "io.keelson.pause.v1";

/// What the files say that all containers of a pod share.
#[derive(Clone, Default)]
pub struct SandboxFiles {
    /// `/etc/hosts` for a pod with these addresses, which are known only when the network is up.
    pub hosts: Option<HostsText>,
    /// `/etc/resolv.conf`.
    pub resolv_conf: String,
}

/// Composes `/etc/hosts` from the pod's addresses.
pub type HostsText = Arc<dyn Fn(&[IpAddr]) -> String + Send + Sync>;

/// The folder of one sandbox and what is in it.
pub(crate) struct SandboxDir(PathBuf);

impl SandboxDir {
    pub(crate) fn of(inner: &Inner, id: &str) -> SandboxDir {
        SandboxDir(inner.options.run_dir.join("sandboxes").join(id))
    }
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
    pub(crate) fn namespace(&self, name: &str) -> PathBuf {
        self.0.join("ns").join(name)
    }
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
    pub(crate) fn shm(&self) -> PathBuf {
        self.0.join("shm")
    }
}

pub(crate) async fn run(
    inner: &Arc<Inner>,
    config: &SandboxConfig,
    files: SandboxFiles,
) -> Result<ObservedSandbox, RuntimeError> {
    let id = container::new_id(&[&config.pod.uid, "POD", &config.attempt.to_string()]);
    match make(inner, &id, config, files).await {
        Ok(sandbox) => Ok(sandbox),
        Err(error) => {
            undo(inner, &id, config).await;
            Err(error)
        }
    }
}

async fn make(
    inner: &Arc<Inner>,
    id: &str,
    config: &SandboxConfig,
    files: SandboxFiles,
) -> Result<ObservedSandbox, RuntimeError> {
    let ips = {
        let (inner, id, config) = (Arc::clone(inner), id.to_owned(), config.clone());
        blocking(move || prepare(&inner, &id, &config, &files)).await?
    };
    let record = SandboxRecord::new(config, ips, network::port_mappings(config));
    let request = Container {
        id: id.to_owned(),
        labels: Record::Sandbox(record.clone()).labels(),
        // containerd wants both; nothing is ever run by them.
        runtime: Some(OciRuntime { name: NO_TASK.into(), options: None }),
        spec: Some(spec::to_any(&serde_json::json!({ "ociVersion": "1.0.2" }))?),
        extensions: Record::Sandbox(record.clone()).extensions(),
        ..Container::default()
    };
    let create = CreateContainerRequest { container: Some(request) };
    inner
        .connection
        .containers()
        .create(create)
        .await
        .map_err(RuntimeError::call("create sandbox", id))?;
    start_pause(inner, id, &record).await?;
    Ok(ObservedSandbox {
        id: id.to_owned(),
        attempt: config.attempt,
        ready: true,
        created_at: Timestamp::now(),
        ips: record.ips,
        host_network: record.host_network,
    })
}

/// The record is in containerd before the process exists: whoever finds the one finds the other.
async fn start_pause(
    inner: &Arc<Inner>,
    id: &str,
    record: &SandboxRecord,
) -> Result<(), RuntimeError> {
    let process = {
        let (inner, id, record) = (Arc::clone(inner), id.to_owned(), record.clone());
        blocking(move || {
            inner.pauses()?.start(&SandboxDir::of(&inner, &id), &record, &record.cgroup(&id))
        })
        .await?
    };
    tokio::spawn(watch(Arc::downgrade(inner), process, record.pod.uid.clone()));
    Ok(())
}

/// Has the pod looked at when its pause process has ended.
async fn watch(inner: Weak<Inner>, process: OwnedFd, uid: String) {
    pause::ended(process).await;
    if let Some(inner) = inner.upgrade() {
        // Nobody listening is not an error.
        drop(inner.events.send(RuntimeEvent::Pod { uid }));
    }
}

/// Watches the pause processes that an earlier agent started.
pub(crate) async fn adopt(inner: &Arc<Inner>) -> Result<(), RuntimeError> {
    let filters = vec![format!(r#"labels."{LABEL_KIND}"==sandbox"#)];
    let reply = inner.connection.containers().list(ListContainersRequest { filters }).await;
    let sandboxes = reply.map_err(RuntimeError::call("list", "sandboxes"))?.into_inner().containers;
    let pauses = inner.pauses()?;
    for sandbox in sandboxes {
        let Some(Record::Sandbox(record)) = Record::of(&sandbox) else { continue };
        if let Some(process) = pauses.process(&record.cgroup(&sandbox.id)) {
            tokio::spawn(watch(Arc::downgrade(inner), process, record.pod.uid));
        }
    }
    Ok(())
}

/// Everything that needs the kernel and the file system but not containerd. Blocking.
fn prepare(
    inner: &Inner,
    id: &str,
    config: &SandboxConfig,
    files: &SandboxFiles,
) -> Result<Vec<IpAddr>, RuntimeError> {
    let dir = SandboxDir::of(inner, id);
    let namespaces = dir.file("ns");
    fs::create_dir_all(&namespaces).map_err(RuntimeError::system("create", &namespaces))?;
    pin_namespaces(&dir, config)?;
    if config.exempt_sockets && config.network != PodNetwork::Host {
        // Before anything runs in it, so that the proxy knows in time.
        exempt::mark(&dir)?;
    }
    let ips = match &config.network {
        PodNetwork::Host => Vec::new(),
        PodNetwork::Cni { .. } => network::add(inner, id, &dir, config)?,
    };
    let write = |name: &str, text: &str| {
        fs::write(dir.file(name), text).map_err(RuntimeError::system("write", dir.file(name)))
    };
    write("hostname", &format!("{}\n", config.hostname))?;
    write("resolv.conf", &files.resolv_conf)?;
    if let Some(hosts) = &files.hosts {
        write("hosts", &hosts(&ips))?;
    }
    if !config.host_ipc {
        let shm = dir.shm();
        fs::create_dir_all(&shm).map_err(RuntimeError::system("create", &shm))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("shm"), &shm, Some("tmpfs"), flags, Some(SHM_OPTIONS))
            .map_err(|e| RuntimeError::system("mount a tmpfs on", &shm)(e.into()))?;
    }
    Ok(ips)
}

fn pin_namespaces(dir: &SandboxDir, config: &SandboxConfig) -> Result<(), RuntimeError> {
    let (net, ipc, uts) = (dir.namespace("net"), dir.namespace("ipc"), dir.namespace("uts"));
    let host_network = config.network == PodNetwork::Host;
    let mut wanted: Vec<(Kind, &Path)> = Vec::new();
    if !host_network {
        wanted.push((Kind::Net, &net));
        wanted.push((Kind::Uts, &uts));
    }
    if !config.host_ipc {
        wanted.push((Kind::Ipc, &ipc));
    }
    let own = sysctl::Own { network: !host_network, ipc: !config.host_ipc };
    let sysctls = sysctl::files(&sysctls(config), own).map_err(RuntimeError::invalid)?;
    let pinned = if wanted.is_empty() {
        Ok(())
    } else {
        netns::pin(&wanted, || {
            sysctl::write(&sysctls)?;
            if host_network {
                return Ok(());
            }
            nix::unistd::sethostname(&config.hostname)?;
            Rtnl::open().and_then(|mut rtnl| rtnl.set_up("lo")).map_err(std::io::Error::other)
        })
    };
    pinned
        .map_err(|error| RuntimeError::Network { pod: pod_name(config), message: chain(&error) })?;
    if host_network {
        // containerd may live in another network namespace than the node does.
        fs::write(&net, "").map_err(RuntimeError::system("create", &net))?;
        mount(Some("/proc/self/ns/net"), &net, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|e| {
                RuntimeError::system("pin the node's network namespace to", &net)(e.into())
            })?;
    }
    Ok(())
}

fn sysctls(config: &SandboxConfig) -> BTreeMap<String, String> {
    let mut sysctls = config.sysctls.clone();
    if config.network != PodNetwork::Host {
        // As the CRI has it since 2.0: nothing in a pod's own network needs root for a low port or a ping.
        sysctls.entry("net.ipv4.ip_unprivileged_port_start".into()).or_insert_with(|| "0".into());
        sysctls.entry("net.ipv4.ping_group_range".into()).or_insert_with(|| "0 2147483647".into());
    }
    sysctls
}

/// How containerd shall run a container.
pub(crate) fn runtime_of(inner: &Inner, handler: &str) -> OciRuntime {
    let binary = if handler.is_empty() { &inner.options.default_runtime } else { handler };
    OciRuntime { name: "io.containerd.runc.v2".into(), options: spec::runc_options(inner, binary) }
}

/// The sandbox's record as containerd has it.
pub(crate) async fn record(inner: &Inner, id: &str) -> Result<Option<SandboxRecord>, RuntimeError> {
    let request = GetContainerRequest { id: id.to_owned() };
    match inner.connection.containers().get(request).await {
        Ok(reply) => {
            Ok(reply.into_inner().container.as_ref().and_then(Record::of).and_then(|r| match r {
                Record::Sandbox(sandbox) => Some(sandbox),
                Record::Container(_) => None,
            }))
        }
        Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
        Err(status) => Err(RuntimeError::call("look up sandbox", id)(status)),
    }
}

pub(crate) async fn stop(inner: &Arc<Inner>, id: &str) -> Result<(), RuntimeError> {
    // Without a record there was no pause process yet.
    let Some(record) = record(inner, id).await? else { return take_down(inner, id, None).await };
    inner.pauses()?.end(&record.cgroup(id)).await?;
    take_down(inner, id, Some(record)).await
}

/// Takes the network down and unpins the namespaces.
async fn take_down(
    inner: &Arc<Inner>,
    id: &str,
    record: Option<SandboxRecord>,
) -> Result<(), RuntimeError> {
    let (inner, id) = (Arc::clone(inner), id.to_owned());
    blocking(move || {
        let dir = SandboxDir::of(&inner, &id);
        let has_network = record.as_ref().is_none_or(|r| !r.host_network);
        if has_network {
            let pod = record.as_ref().map_or_else(|| id.clone(), |r| r.pod.uid.clone());
            // A crash can leave the file without the namespace on it.
            let netns = Some(dir.namespace("net")).filter(|path| Netns::open(path).is_ok());
            network::remove(&inner, &id, netns)
                .map_err(|message| RuntimeError::Network { pod, message })?;
        }
        release(&dir)
    })
    .await
}

/// Unpins the namespaces and unmounts what the sandbox's folder holds.
fn release(dir: &SandboxDir) -> Result<(), RuntimeError> {
    exempt::unmark(dir)?;
    for name in ["net", "ipc", "uts"] {
        let pin = dir.namespace(name);
        netns::delete(&pin).map_err(|e| RuntimeError::invalid(chain(&e)))?;
    }
    // Not mounted is as good as unmounted.
    umount2(&dir.shm(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).ok();
    Ok(())
}

pub(crate) async fn remove(inner: &Arc<Inner>, id: &str) -> Result<(), RuntimeError> {
    stop(inner, id).await?;
    if let Some(record) = record(inner, id).await? {
        let (inner, cgroup) = (Arc::clone(inner), record.cgroup(id));
        blocking(move || inner.pauses()?.forget(&cgroup)).await?;
    }
    let request = DeleteContainerRequest { id: id.to_owned() };
    gone_is_fine(
        inner.connection.containers().delete(request).await.map(tonic::Response::into_inner),
    )
    .map_err(RuntimeError::call("remove sandbox", id))?;
    super::exit_record::remove(&inner.options.root_dir, id);
    let dir = SandboxDir::of(inner, id);
    match fs::remove_dir_all(dir.path()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(RuntimeError::system("remove", dir.path())(e))
        }
        _ => Ok(()),
    }
}

/// Takes down what is left of sandboxes that an earlier agent began and containerd never heard of.
pub(crate) async fn sweep(inner: &Arc<Inner>) -> Result<(), RuntimeError> {
    let folder = inner.options.run_dir.join("sandboxes");
    for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
        let id = entry.file_name().to_string_lossy().into_owned();
        if record(inner, &id).await?.is_some() {
            continue;
        }
        tracing::info!(sandbox = id, "Removing what is left of an unfinished sandbox");
        if let Err(error) = take_down(inner, &id, None).await {
            // Also one of the host's network, which has nothing to take down, ends here without a configuration.
            tracing::warn!(sandbox = id, %error, "An unfinished sandbox was not taken down wholly");
            release(&SandboxDir::of(inner, &id))?;
        }
        let path = entry.path();
        fs::remove_dir_all(&path).map_err(RuntimeError::system("remove", &path))?;
    }
    Ok(())
}

/// After a failure: as if it had never been tried.
async fn undo(inner: &Arc<Inner>, id: &str, config: &SandboxConfig) {
    let cgroup = spec::cgroup_of(&config.cgroup_parent, id);
    if let Ok(pauses) = inner.pauses() {
        drop(pauses.end(&cgroup).await);
        drop(pauses.forget(&cgroup));
    }
    let request = DeleteContainerRequest { id: id.to_owned() };
    drop(inner.connection.containers().delete(request).await);
    let record = (config.network == PodNetwork::Host)
        .then(|| SandboxRecord::new(config, Vec::new(), serde_json::Value::Null));
    let result = take_down(inner, id, record).await;
    if let Err(error) = result {
        tracing::warn!(sandbox = id, %error, "A sandbox that could not be made was not undone wholly");
    }
    drop(fs::remove_dir_all(SandboxDir::of(inner, id).path()));
}

fn pod_name(config: &SandboxConfig) -> String {
    format!("{}/{}", config.pod.namespace, config.pod.name)
}

/// An error with all its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Runs `work` where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RuntimeError> + Send + 'static,
) -> Result<T, RuntimeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(RuntimeError::invalid(format!("the operation was cancelled: {error}"))),
    }
}
