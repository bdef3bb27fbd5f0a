//! Runs sandboxes and containers through containerd's native API.
//!
//! The rest of the agent knows only the types of [`types`] and the methods of [`Runtime`]: what a sandbox and a container
//! shall be, what is there now, and that something changed. containerd is the store: everything that must survive a
//! restart of the agent is in container labels and extensions; how a container ended is in a small file of its own,
//! written before containerd is told to forget the task.

mod attach;
pub(crate) mod connection;
pub(crate) mod container;
mod error;
mod events;
mod exec;
mod exit_record;
mod images;
pub(crate) mod lease;
mod observe;
mod orphan_shims;
mod pause;
mod record;
mod sandbox;
mod spec;
pub(crate) mod termination;
pub mod types;
pub(crate) mod user;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_client::services::v1::snapshots::MountsRequest;
use containerd_client::types::Mount;
use tokio::sync::{Notify, Semaphore, broadcast};

pub use attach::{AttachSession, Output};
pub use error::RuntimeError;
pub use exec::{ExecRequest, ExecSession, TerminalSize};
pub use pause::PauseError;
pub use sandbox::{HostsText, SandboxFiles};
pub(crate) use sandbox::{blocking, chain};

use crate::config::CgroupDriver;
use crate::image::garbage::{Disk, Present};
use crate::image::{ImageStore, RegistryCredentials};
use crate::logd;
use connection::Connection;
use pause::Pauses;
use types::{ContainerConfig, ImageRef, ObservedPod, ObservedSandbox, RuntimeEvent, SandboxConfig};

/// How many runtime operations that start processes run side by side. More only makes all of them wait for the
/// processors: a start is runc's work, and runc's work is CPU time.
fn start_slots() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get).max(2) * 2
}

/// Where and how this node runs containers.
#[derive(Debug, Clone)]
pub struct RuntimeOptions {
    /// containerd's socket.
    pub socket: PathBuf,
    /// The containerd namespace that holds this node's containers.
    pub namespace: String,
    /// What survives a reboot.
    pub root_dir: PathBuf,
    /// What does not.
    pub run_dir: PathBuf,
    pub cni_conf_dir: PathBuf,
    pub cni_bin_dirs: Vec<PathBuf>,
    pub cgroup_driver: CgroupDriver,
    /// The network namespace to reach registries from.
    pub pull_netns: Option<PathBuf>,
    /// Folder of registry configurations (`certs.d`).
    pub registry_config_dir: PathBuf,
    /// Name or path of the OCI runtime's program; empty for containerd's default.
    pub default_runtime: String,
    /// A log file is rotated when it has grown to this size.
    pub log_max_bytes: u64,
    /// How many files a container's log may consist of.
    pub log_max_files: u32,
}

/// The way to containerd. Cheap to clone.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    options: RuntimeOptions,
    connection: Connection,
    events: broadcast::Sender<RuntimeEvent>,
    images: ImageStore,
    logs: logd::Client,
    /// Not there where only images are looked after.
    pauses: Option<Pauses>,
    /// The agent may not lower its children's `oom_score_adj` below this (no CAP_SYS_RESOURCE): runc would fail.
    oom_floor: i32,
    starts: Semaphore,
    /// Containers whose task this process is making just now.
    starting: Starting,
    mounts: MountCache,
}

impl Runtime {
    /// Connects to containerd and begins to follow its events.
    ///
    /// # Errors
    /// When containerd does not answer or is older than 1.6; the error says what to do.
    pub async fn connect(options: RuntimeOptions) -> Result<Runtime, RuntimeError> {
        let pauses = Pauses::open(&options.run_dir, spec::oom_score_floor())?;
        sandbox::make_exempt_folder(&options.run_dir)?;
        let runtime = Runtime::open(options, Some(pauses)).await?;
        runtime.inner.logs.start()?;
        lease::delete_unfinished(&runtime.inner.connection).await?;
        sandbox::sweep(&runtime.inner).await?;
        sandbox::adopt(&runtime.inner).await?;
        tokio::spawn(events::follow(Arc::downgrade(&runtime.inner)));
        tokio::spawn(orphan_shims::end(Arc::downgrade(&runtime.inner)));
        Ok(runtime)
    }

    /// Connects without anything that containers need: for commands that only look after images.
    ///
    /// # Errors
    /// As [`Runtime::connect`].
    pub async fn connect_for_images(options: RuntimeOptions) -> Result<Runtime, RuntimeError> {
        Runtime::open(options, None).await
    }

    async fn open(
        options: RuntimeOptions,
        pauses: Option<Pauses>,
    ) -> Result<Runtime, RuntimeError> {
        let connection = Connection::open(&options.socket, &options.namespace).await?;
        let version = version_of(&connection).await?;
        check_version(&version)?;
        observe::ensure_namespace(&connection, &options.namespace).await?;
        let (events, _) = broadcast::channel(1024);
        let inner = Inner {
            oom_floor: spec::oom_score_floor(),
            starts: Semaphore::new(start_slots()),
            starting: Starting::default(),
            mounts: MountCache::default(),
            images: ImageStore::new(connection.clone(), &options),
            logs: logd::Client::new(&options.run_dir),
            pauses,
            options,
            connection,
            events,
        };
        Ok(Runtime { inner: Arc::new(inner) })
    }

    /// Changes of pods. A receiver that falls behind must look at everything again.
    pub fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.inner.events.subscribe()
    }

    /// Everything that the runtime has.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub async fn observe_all(&self) -> Result<Vec<ObservedPod>, RuntimeError> {
        observe::all(&self.inner).await
    }

    /// What the runtime has of one pod.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub async fn observe(&self, uid: &str) -> Result<Option<ObservedPod>, RuntimeError> {
        observe::pod(&self.inner, uid).await
    }

    /// Makes a sandbox: namespaces, network, files, its pause process. Then containers may be created in it.
    ///
    /// # Errors
    /// What could not be made; everything else has been undone.
    pub async fn run_sandbox(
        &self,
        config: &SandboxConfig,
        files: SandboxFiles,
    ) -> Result<ObservedSandbox, RuntimeError> {
        sandbox::run(&self.inner, config, files).await
    }

    /// Ends a sandbox's pause process and takes its network down. One that is gone is a success.
    ///
    /// # Errors
    /// What could not be ended; calling again goes on from there.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        sandbox::stop(&self.inner, id).await
    }

    /// Forgets a stopped sandbox. One that is gone is a success.
    ///
    /// # Errors
    /// What could not be removed.
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        sandbox::remove(&self.inner, id).await
    }

    /// Makes a container in a sandbox and returns its id.
    ///
    /// # Errors
    /// [`RuntimeError::Invalid`] when the configuration cannot work.
    pub async fn create_container(
        &self,
        sandbox_id: &str,
        config: &ContainerConfig,
    ) -> Result<String, RuntimeError> {
        container::create(&self.inner, sandbox_id, config).await
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// [`RuntimeError::Start`] when its process cannot be started; that is also recorded as its end.
    pub async fn start_container(&self, id: &str) -> Result<(), RuntimeError> {
        container::start(&self.inner, id).await
    }

    /// Sends the stop signal, waits for at most `grace`, then kills. One that has ended is a success.
    ///
    /// # Errors
    /// When containerd cannot end it.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), RuntimeError> {
        container::stop(&self.inner, id, grace).await
    }

    /// Forgets a container and its writable layer. One that is gone is a success.
    ///
    /// # Errors
    /// What could not be removed.
    pub async fn remove_container(&self, id: &str) -> Result<(), RuntimeError> {
        container::remove(&self.inner, id).await
    }

    /// Runs a further process in a running container.
    ///
    /// # Errors
    /// When the container is not running or the program cannot be started.
    pub async fn exec(&self, id: &str, request: ExecRequest) -> Result<ExecSession, RuntimeError> {
        exec::run(&self.inner, id, request).await
    }

    /// Connects to the first process of a running container.
    ///
    /// # Errors
    /// When the container is not running.
    pub async fn attach(&self, id: &str, with_stdin: bool) -> Result<AttachSession, RuntimeError> {
        attach::open(&self.inner, id, with_stdin).await
    }

    /// The image of this name, if it is here.
    ///
    /// # Errors
    /// When the name is none, or containerd does not answer.
    pub async fn image_status(&self, image: &str) -> Result<Option<ImageRef>, RuntimeError> {
        self.inner.images.status(image).await
    }

    /// Fetches an image from its registry; requests for the same image share one fetch.
    ///
    /// # Errors
    /// Why it could not be fetched, in words for the pod's events.
    pub async fn pull_image(
        &self,
        image: &str,
        credentials: &[RegistryCredentials],
    ) -> Result<ImageRef, RuntimeError> {
        self.inner.images.pull(image, credentials).await
    }

    /// Takes over every image of an OCI archive and returns their names.
    ///
    /// # Errors
    /// When the file is no OCI archive.
    pub async fn import_image(&self, archive: &Path) -> Result<Vec<String>, RuntimeError> {
        self.inner.images.import(archive).await
    }

    /// Names and sizes of the images that are here.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub async fn list_images(&self) -> Result<Vec<crate::image::ListedImage>, RuntimeError> {
        self.inner.images.list().await
    }

    /// All images, with what speaks for keeping them.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub async fn present_images(&self) -> Result<Vec<Present>, RuntimeError> {
        images::present(&self.inner).await
    }

    /// Removes an image with all of its names, and returns these. When this returns, its space is free.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub async fn remove_image(&self, id: &str) -> Result<Vec<String>, RuntimeError> {
        self.inner.images.remove(id).await
    }

    /// Removes one name of an image, and the image with its last tag; `reference` may also be its id. Returns the names
    /// that were removed.
    ///
    /// # Errors
    /// [`RuntimeError::NotFound`], or [`RuntimeError::Image`] when a container uses it and `force` is not given.
    pub async fn remove_reference(
        &self,
        reference: &str,
        force: bool,
    ) -> Result<Vec<String>, RuntimeError> {
        images::remove_reference(&self.inner, reference, force).await
    }

    /// The file system that images and containers are on.
    ///
    /// # Errors
    /// When containerd does not say where that is, or the kernel not how full.
    pub async fn image_disk(&self) -> Result<Disk, RuntimeError> {
        images::disk(&self.inner).await
    }

    /// containerd's version, as `1.6.20`.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub async fn version(&self) -> Result<String, RuntimeError> {
        version_of(&self.inner.connection).await
    }
}

impl Inner {
    fn pauses(&self) -> Result<&Pauses, RuntimeError> {
        let none = || RuntimeError::invalid("this connection is for images only");
        self.pauses.as_ref().ok_or_else(none)
    }
}

/// Ids of tasks in the making: they are neither lost nor not yet started.
#[derive(Default)]
struct Starting {
    ids: Mutex<HashSet<String>>,
    one_less: Notify,
}

impl Starting {
    fn contains(&self, id: &str) -> bool {
        self.ids.lock().is_ok_and(|ids| ids.contains(id))
    }

    /// Returns when the task of `id` is not in the making (any more): what shall end it must not come before it.
    async fn finished(&self, id: &str) {
        loop {
            let changed = self.one_less.notified();
            tokio::pin!(changed);
            // From here on no notification is missed.
            changed.as_mut().enable();
            if !self.contains(id) {
                return;
            }
            changed.await;
        }
    }

    /// Counts `id` in until the value is dropped, also when the caller is cancelled.
    fn enter<'a>(&'a self, id: &str) -> StartingGuard<'a> {
        if let Ok(mut ids) = self.ids.lock() {
            ids.insert(id.to_owned());
        }
        StartingGuard { starting: self, id: id.to_owned() }
    }
}

struct StartingGuard<'a> {
    starting: &'a Starting,
    id: String,
}

impl Drop for StartingGuard<'_> {
    fn drop(&mut self) {
        if let Ok(mut ids) = self.starting.ids.lock() {
            ids.remove(&self.id);
        }
        self.starting.one_less.notify_waiters();
    }
}

/// Root file system mounts between a container's creation and its start, which spares asking for them again.
#[derive(Default)]
struct MountCache(Mutex<HashMap<String, Vec<Mount>>>);

impl MountCache {
    fn insert(&self, id: &str, mounts: Vec<Mount>) {
        if let Ok(mut cache) = self.0.lock() {
            cache.insert(id.to_owned(), mounts);
        }
    }

    async fn take_or_ask(
        &self,
        connection: &Connection,
        id: &str,
    ) -> Result<Vec<Mount>, RuntimeError> {
        let cached = self.0.lock().ok().and_then(|mut cache| cache.remove(id));
        if let Some(mounts) = cached {
            return Ok(mounts);
        }
        let request =
            MountsRequest { snapshotter: container::SNAPSHOTTER.into(), key: id.to_owned() };
        let reply = connection.snapshots().mounts(request).await;
        Ok(reply
            .map_err(RuntimeError::call("find the root file system of", id))?
            .into_inner()
            .mounts)
    }
}

async fn version_of(connection: &Connection) -> Result<String, RuntimeError> {
    let reply = connection
        .version()
        .version(())
        .await
        .map_err(RuntimeError::call("tell", "its version"))?;
    let version = reply.into_inner().version;
    // Debian's build says "1.6.20~ds1".
    let number = version.trim_start_matches('v').split(['~', '-', '+']).next().unwrap_or_default();
    Ok(number.to_owned())
}

fn check_version(version: &str) -> Result<(), RuntimeError> {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let (major, minor) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if (major, minor) >= (1, 6) {
        return Ok(());
    }
    Err(RuntimeError::invalid(format!(
        "containerd {version} is too old: keelson needs 1.6 or newer"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_before_1_6_is_refused_by_number() {
        for good in ["1.6.20", "1.7.0", "2.3.4"] {
            check_version(good).unwrap();
        }
        let error = check_version("1.4.13").unwrap_err().to_string();
        assert!(error.contains("1.4.13") && error.contains("1.6"), "{error}");
    }
}
