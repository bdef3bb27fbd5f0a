//! What a sandbox or a container is, as it is kept in containerd beside the OCI specification.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::LazyLock;

use containerd_client::services::v1::Container;
use prost_types::Any;
use serde::{Deserialize, Serialize};

use super::types::{ContainerConfig, ImageRef, PodId, SandboxConfig};

/// Labels, under the names that tools know. A label and its key together have at most 4096 bytes.
pub(crate) const LABEL_POD_UID: &str = "io.kubernetes.pod.uid";
const LABEL_POD_NAME: &str = "io.kubernetes.pod.name";
const LABEL_POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
const LABEL_CONTAINER_NAME: &str = "io.kubernetes.container.name";
pub(crate) const LABEL_KIND: &str = "io.keelson.kind";

/// The extension that holds the whole record.
const EXTENSION: &str = "io.keelson.record/1";

/// A sandbox or a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "kind")]
pub(crate) enum Record {
    Sandbox(SandboxRecord),
    Container(ContainerRecord),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SandboxRecord {
    pub(crate) pod: PodKey,
    pub(crate) attempt: u32,
    pub(crate) host_network: bool,
    pub(crate) host_ipc: bool,
    pub(crate) host_pid: bool,
    pub(crate) share_pid: bool,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) hostname: String,
    pub(crate) cgroup_parent: String,
    /// The boot in which it was made: a sandbox does not live longer.
    pub(crate) boot: String,
    pub(crate) host_ports: serde_json::Value,
    #[serde(default)]
    pub(crate) runtime_handler: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ContainerRecord {
    pub(crate) pod: PodKey,
    pub(crate) name: String,
    pub(crate) attempt: u32,
    pub(crate) sandbox_id: String,
    pub(crate) spec_hash: String,
    pub(crate) image_name: String,
    pub(crate) image_id: String,
    pub(crate) repo_digest: String,
    pub(crate) log_path: PathBuf,
    pub(crate) stop_signal: String,
    pub(crate) tty: bool,
    pub(crate) stdin: bool,
    #[serde(default)]
    pub(crate) stdin_once: bool,
    #[serde(default)]
    pub(crate) termination_message_from_log: bool,
    pub(crate) cgroup: String,
    pub(crate) boot: String,
}

/// [`PodId`] as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PodKey {
    namespace: String,
    name: String,
    pub(crate) uid: String,
}

impl From<&PodId> for PodKey {
    fn from(id: &PodId) -> Self {
        Self { namespace: id.namespace.clone(), name: id.name.clone(), uid: id.uid.clone() }
    }
}

impl From<&PodKey> for PodId {
    fn from(key: &PodKey) -> Self {
        Self { namespace: key.namespace.clone(), name: key.name.clone(), uid: key.uid.clone() }
    }
}

impl Record {
    pub(crate) fn pod(&self) -> &PodKey {
        match self {
            Self::Sandbox(sandbox) => &sandbox.pod,
            Self::Container(container) => &container.pod,
        }
    }

    /// Labels to find it by.
    pub(crate) fn labels(&self) -> HashMap<String, String> {
        let pod = self.pod();
        let (kind, name) = match self {
            Self::Sandbox(_) => ("sandbox", "POD"),
            Self::Container(container) => ("container", container.name.as_str()),
        };
        [
            (LABEL_POD_UID, pod.uid.as_str()),
            (LABEL_POD_NAME, pod.name.as_str()),
            (LABEL_POD_NAMESPACE, pod.namespace.as_str()),
            (LABEL_CONTAINER_NAME, name),
            (LABEL_KIND, kind),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
    }

    pub(crate) fn extensions(&self) -> HashMap<String, Any> {
        // Plain values only: this cannot fail.
        let value = serde_json::to_vec(self).unwrap_or_default();
        [(EXTENSION.to_owned(), Any { type_url: EXTENSION.to_owned(), value })].into()
    }

    /// The record of a container that we made; `None` for anything else in the namespace.
    pub(crate) fn of(container: &Container) -> Option<Record> {
        let any = container.extensions.get(EXTENSION)?;
        serde_json::from_slice(&any.value)
            .inspect_err(|error| tracing::warn!(container = container.id, %error, "A record in containerd is damaged"))
            .ok()
    }
}

impl SandboxRecord {
    pub(crate) fn new(
        config: &SandboxConfig,
        ips: Vec<IpAddr>,
        host_ports: serde_json::Value,
    ) -> Self {
        Self {
            pod: (&config.pod).into(),
            attempt: config.attempt,
            host_network: config.network == super::types::PodNetwork::Host,
            host_ipc: config.host_ipc,
            host_pid: config.host_pid,
            share_pid: config.share_pid,
            ips,
            hostname: config.hostname.clone(),
            cgroup_parent: config.cgroup_parent.clone(),
            boot: boot_id(),
            host_ports,
            runtime_handler: config.runtime_handler.clone(),
        }
    }

    /// The cgroup of the sandbox's own process.
    pub(crate) fn cgroup(&self, id: &str) -> String {
        super::spec::cgroup_of(&self.cgroup_parent, id)
    }
}

impl ContainerRecord {
    pub(crate) fn new(
        sandbox_id: &str,
        sandbox: &SandboxRecord,
        config: &ContainerConfig,
        image: &ImageRef,
        stop_signal: String,
        cgroup: String,
    ) -> Self {
        Self {
            pod: sandbox.pod.clone(),
            name: config.name.clone(),
            attempt: config.attempt,
            sandbox_id: sandbox_id.to_owned(),
            spec_hash: config.spec_hash.clone(),
            image_name: config.image_name.clone(),
            image_id: image.id.clone(),
            repo_digest: image.repo_digest.clone(),
            log_path: config.log_path.clone(),
            stop_signal,
            tty: config.tty,
            stdin: config.stdin,
            stdin_once: config.stdin_once,
            termination_message_from_log: config.termination_message_from_log,
            cgroup,
            boot: boot_id(),
        }
    }
}

/// Names this boot of the machine. Asked for with every look at a pod, and the same for the life of the process.
pub(crate) fn boot_id() -> String {
    static BOOT_ID: LazyLock<String> = LazyLock::new(|| {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap_or_default()
            .trim()
            .to_owned()
    });
    BOOT_ID.clone()
}
