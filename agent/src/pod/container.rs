//! From a container in a manifest to what the runtime is asked to make. Pure but for the subPath mounts.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{
    Capabilities, Container, EphemeralContainer, Pod, PodSecurityContext, SeccompProfile,
    SecurityContext, VolumeMount,
};

use super::isolation::{self, Kernel};
use super::spec::{self, ContainerKind};
use crate::cgroup::resources;
use crate::env::{self, expand};
use crate::runtime::types::{
    ContainerConfig, ContainerSecurity, HostPort, ImageRef, Mount, ObservedPod, PodNetwork,
    Propagation, SandboxConfig,
};
use crate::volume::{Mounted, subpath};

/// What goes into a container's configuration besides its manifest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ingredients<'a> {
    pub pod: &'a Pod,
    pub container: &'a Container,
    pub kind: ContainerKind,
    pub attempt: u32,
    pub image: &'a ImageRef,
    pub env: &'a [(String, String)],
    pub mounted: &'a Mounted,
    /// `<root>/pods/<uid>`.
    pub pod_dir: &'a Path,
    /// The pod's log folder.
    pub log_dir: &'a Path,
    pub memory_capacity: i64,
    pub observed: Option<&'a ObservedPod>,
}

/// Builds the configuration. The error is `CreateContainerConfigError`'s message.
pub(super) fn config(from: &Ingredients) -> Result<ContainerConfig, String> {
    let container = from.container;
    let lookup = |name: &str| {
        from.env.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    };
    let expanded = |list: Option<&Vec<String>>| {
        expand_all("command or args", list.into_iter().flatten(), lookup)
    };
    let file = format!("{}.log", from.attempt);
    let mut resources = resources::container_resources(from.pod, container, from.memory_capacity);
    if from.kind == ContainerKind::Ephemeral {
        // It comes after its pod was admitted.
        isolation::check_container(container, Kernel::detect()).map_err(|ending| ending.message)?;
        resources.cpu_shares = None;
    }
    Ok(ContainerConfig {
        name: container.name.clone(),
        attempt: from.attempt,
        image_id: from.image.id.clone(),
        image_name: container.image.clone().unwrap_or_default(),
        spec_hash: spec::spec_hash(container),
        command: expanded(container.command.as_ref())?,
        args: expanded(container.args.as_ref())?,
        working_dir: container.working_dir.clone().filter(|dir| !dir.is_empty()),
        env: from.env.to_vec(),
        mounts: mounts(from, lookup)?,
        devices: Vec::new(),
        resources,
        security: security(from.pod, container),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        log_path: from.log_dir.join(&container.name).join(file),
        termination_message_path: container
            .termination_message_path
            .clone()
            .unwrap_or_else(|| "/dev/termination-log".into()),
        termination_message_from_log: container.termination_message_policy.as_deref()
            == Some("FallbackToLogsOnError"),
        grace_period_secs: spec::grace_secs(from.pod),
        annotations: BTreeMap::new(),
        target_container_id: target_id(from)?,
    })
}

/// The container whose processes an ephemeral one shall see.
fn target_id(from: &Ingredients) -> Result<Option<String>, String> {
    if from.kind != ContainerKind::Ephemeral {
        return Ok(None);
    }
    let named = |c: &&EphemeralContainer| c.name == from.container.name;
    let ephemeral = spec::ephemeral_containers(from.pod).iter().find(named);
    let target = ephemeral.and_then(|c| c.target_container_name.as_deref()).unwrap_or_default();
    if target.is_empty() {
        return Ok(None);
    }
    // The newest comes first.
    let seen = from.observed.and_then(|pod| pod.containers.iter().find(|c| c.name == target));
    let id = seen.map(|container| container.id.clone());
    id.map(Some).ok_or_else(|| format!("unable to find target container {target}"))
}

fn mounts(
    from: &Ingredients,
    lookup: impl Fn(&str) -> Option<String> + Copy,
) -> Result<Vec<Mount>, String> {
    let mut mounts = Vec::new();
    for (index, mount) in from.container.volume_mounts.iter().flatten().enumerate() {
        let Some(volume) = from.mounted.get(&mount.name) else {
            return Err(format!(
                "container {} mounts volume \"{}\", which spec.volumes does not have",
                from.container.name, mount.name
            ));
        };
        let host_path = match sub_path(mount, lookup)? {
            None => volume.clone(),
            Some(sub_path) => bind_sub_path(from, mount, index, volume, &sub_path)?,
        };
        mounts.push(Mount {
            host_path,
            container_path: absolute(&mount.mount_path),
            read_only: mount.read_only.unwrap_or(false) || written_by_agent(from.pod, &mount.name),
            propagation: match mount.mount_propagation.as_deref() {
                Some("HostToContainer") => Propagation::HostToContainer,
                Some("Bidirectional") => Propagation::Bidirectional,
                _ => Propagation::Private,
            },
        });
    }
    Ok(mounts)
}

/// Volumes whose files the agent writes while containers run. A container must never write there, whatever its mount
/// says: it could lead the agent, which is root on the node, to any file (CVE-2017-1002102).
fn written_by_agent(pod: &Pod, name: &str) -> bool {
    let volumes = spec::spec(pod).and_then(|spec| spec.volumes.as_deref()).unwrap_or_default();
    volumes.iter().find(|volume| volume.name == name).is_some_and(|volume| {
        volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.downward_api.is_some()
            || volume.projected.is_some()
    })
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// Texts with their references replaced, together no longer than a program can be given.
fn expand_all<'a>(
    what: &str,
    texts: impl Iterator<Item = &'a String>,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Vec<String>, String> {
    let (mut all, mut total) = (Vec::new(), 0);
    for text in texts {
        let text = expand::expand(text, &lookup)
            .map_err(|error| format!("{what}: {text:.60?} {error}"))?;
        total += text.len();
        if total > env::MAX_ALL {
            return Err(format!("{what}: longer than {} bytes in all", env::MAX_ALL));
        }
        all.push(text);
    }
    Ok(all)
}

fn sub_path(
    mount: &VolumeMount,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Option<String>, String> {
    if let Some(text) = mount.sub_path_expr.as_deref().filter(|text| !text.is_empty()) {
        let missing =
            expand::names(text).into_iter().find(|name| lookup(name).is_none_or(|v| v.is_empty()));
        if let Some(name) = missing {
            return Err(format!("subPathExpr {text}: the variable {name} is not set or empty"));
        }
        let path = expand::expand(text, lookup).map_err(|error| format!("subPathExpr {error}"))?;
        return Ok(Some(path));
    }
    Ok(mount.sub_path.clone().filter(|path| !path.is_empty()))
}

fn bind_sub_path(
    from: &Ingredients,
    mount: &VolumeMount,
    index: usize,
    volume: &Path,
    sub_path: &str,
) -> Result<PathBuf, String> {
    let target = from
        .pod_dir
        .join("volume-subpaths")
        .join(&mount.name)
        .join(&from.container.name)
        .join(index.to_string());
    subpath::bind(volume, sub_path, &target).map_err(|error| {
        format!(
            "failed to prepare subPath for volumeMount \"{}\" of container \"{}\": {error}",
            mount.name, from.container.name
        )
    })
}

fn security(pod: &Pod, container: &Container) -> ContainerSecurity {
    let pod_level = spec::spec(pod).and_then(|s| s.security_context.clone()).unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    let capabilities: Capabilities = own.capabilities.clone().unwrap_or_default();
    let privileged = own.privileged.unwrap_or(false);
    let seccomp = own.seccomp_profile.as_ref().or(pod_level.seccomp_profile.as_ref());
    ContainerSecurity {
        privileged,
        run_as_user: own.run_as_user.or(pod_level.run_as_user),
        run_as_group: own.run_as_group.or(pod_level.run_as_group),
        run_as_non_root: own.run_as_non_root.or(pod_level.run_as_non_root).unwrap_or(false),
        supplemental_groups: groups(&pod_level),
        strict_groups: pod_level.supplemental_groups_policy.as_deref() == Some("Strict"),
        add_capabilities: capabilities.add.unwrap_or_default(),
        drop_capabilities: capabilities.drop.unwrap_or_default(),
        read_only_root_fs: own.read_only_root_filesystem.unwrap_or(false),
        no_new_privs: no_new_privs(&own, privileged),
        seccomp: if privileged { None } else { seccomp.and_then(seccomp_name) },
        // Without a user namespace it would give the node away.
        unmasked_proc: privileged && own.proc_mount.as_deref() == Some("Unmasked"),
    }
}

fn groups(pod_level: &PodSecurityContext) -> Vec<i64> {
    let mut groups = pod_level.supplemental_groups.clone().unwrap_or_default();
    groups.extend(pod_level.fs_group);
    groups
}

fn no_new_privs(own: &SecurityContext, privileged: bool) -> bool {
    let adds_admin = own
        .capabilities
        .as_ref()
        .and_then(|c| c.add.as_ref())
        .is_some_and(|add| add.iter().any(|c| c == "CAP_SYS_ADMIN" || c == "SYS_ADMIN"));
    own.allow_privilege_escalation == Some(false) && !privileged && !adds_admin
}

fn seccomp_name(profile: &SeccompProfile) -> Option<String> {
    match profile.type_.as_str() {
        "Localhost" => {
            Some(format!("Localhost/{}", profile.localhost_profile.as_deref().unwrap_or_default()))
        }
        "Unconfined" => None,
        other => Some(other.to_owned()),
    }
}

/// The folder of a pod's logs, as `kubectl logs` and log collectors expect it.
pub(super) fn log_dir(root: &Path, pod: &Pod) -> PathBuf {
    root.join(format!("{}_{}_{}", spec::namespace(pod), spec::name(pod), spec::uid(pod)))
}

/// What the pod's sandbox shall be.
pub(super) fn sandbox(
    pod: &Pod,
    attempt: u32,
    hostname: String,
    cgroup_parent: String,
    exempt_runtime_classes: &[String],
) -> SandboxConfig {
    let spec = spec::spec(pod).cloned().unwrap_or_default();
    let containers = || spec::main_containers(pod).iter().chain(spec::init_containers(pod));
    let privileged = containers()
        .any(|c| c.security_context.as_ref().and_then(|s| s.privileged).unwrap_or(false));
    let network = match spec::host_network(pod) {
        true => PodNetwork::Host,
        false => PodNetwork::Cni { host_ports: host_ports(pod) },
    };
    let sysctls = spec.security_context.as_ref().and_then(|s| s.sysctls.as_ref());
    SandboxConfig {
        pod: spec::id(pod),
        attempt,
        hostname,
        cgroup_parent,
        network,
        host_ipc: spec.host_ipc.unwrap_or(false),
        host_pid: spec.host_pid.unwrap_or(false),
        share_pid: spec.share_process_namespace.unwrap_or(false),
        privileged,
        sysctls: sysctls.into_iter().flatten().map(|s| (s.name.clone(), s.value.clone())).collect(),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        annotations: pod.metadata.annotations.clone().unwrap_or_default(),
        runtime_handler: String::new(),
        exempt_sockets: exempts_sockets(pod, exempt_runtime_classes),
    }
}

/// Whether the service proxy shall leave the pod's sockets alone: it asks for that itself, or its runtime class needs it.
fn exempts_sockets(pod: &Pod, runtime_classes: &[String]) -> bool {
    let class = pod.spec.as_ref().and_then(|spec| spec.runtime_class_name.as_ref());
    spec::annotation(pod, spec::SOCKET_LB) == Some("disabled")
        || class.is_some_and(|class| runtime_classes.contains(class))
}

fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let ports = spec::main_containers(pod).iter().chain(spec::init_containers(pod));
    ports
        .flat_map(|c| c.ports.iter().flatten())
        .filter_map(|port| {
            let host_ip: Option<IpAddr> = port.host_ip.as_deref().and_then(|ip| ip.parse().ok());
            Some(HostPort {
                host_port: u16::try_from(port.host_port?).ok().filter(|p| *p > 0)?,
                container_port: u16::try_from(port.container_port).ok()?,
                protocol: port.protocol.as_deref().unwrap_or("TCP").to_lowercase(),
                host_ip,
            })
        })
        .collect()
}

/// Where a container stands in the manifest, for events.
pub(super) fn field_path(name: &str, kind: ContainerKind) -> String {
    match kind {
        ContainerKind::Init => format!("spec.initContainers{{{name}}}"),
        ContainerKind::Main => format!("spec.containers{{{name}}}"),
        ContainerKind::Ephemeral => format!("spec.ephemeralContainers{{{name}}}"),
    }
}
