//! OCI specifications: what runc is told about a container. Pure, but for what is
//! read once from the machine (capabilities of the agent, devices of a privileged container).

mod device;
mod seccomp;

use std::fs;
use std::path::Path;

use oci_spec::runtime::Spec;
use prost::Message;
use prost_types::Any;
use serde_json::{Value, json};

use super::record::SandboxRecord;
use super::sandbox::SandboxDir;
use super::types::{ContainerConfig, Mount, Propagation};
use super::user::{self, RootFs, User};
use super::{Inner, RuntimeError, termination};
use crate::config::CgroupDriver;
use crate::image::ResolvedImage;

const ANNOTATION_TYPE: &str = "io.kubernetes.cri.container-type";
const ANNOTATION_NAME: &str = "io.kubernetes.cri.container-name";

/// What a container may do unless it says otherwise: the list that container engines share.
const DEFAULT_CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Every capability that Linux has, by number.
const ALL_CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Bit of CAP_SYS_RESOURCE in a capability mask.
const CAP_SYS_RESOURCE: u32 = 24;

const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/scsi",
];

const READ_ONLY: &[&str] =
    &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A container of a pod.
#[allow(
    clippy::too_many_arguments,
    reason = "each is one thing that the specification is made from"
)]
pub(crate) fn container(
    inner: &Inner,
    id: &str,
    sandbox_id: &str,
    sandbox: &SandboxRecord,
    config: &ContainerConfig,
    image: &ResolvedImage,
    root: &RootFs,
    target_pid: Option<u32>,
) -> Result<Value, RuntimeError> {
    let security = &config.security;
    let user = user::resolve(image.config.user.as_deref().unwrap_or_default(), security, root)?;
    let dir = SandboxDir::of(inner, sandbox_id);
    let mut namespaces = vec![json!({ "type": "mount" })];
    match target_pid {
        Some(pid) => {
            namespaces.push(json!({ "type": "pid", "path": format!("/proc/{pid}/ns/pid") }))
        }
        None if sandbox.host_pid => {}
        None => namespaces.push(json!({ "type": "pid" })),
    }
    namespaces.extend(shared_namespaces(&dir, sandbox));
    let privileged = security.privileged;
    let no_paths: &[&str] = &[];
    let unmasked = privileged || security.unmasked_proc;
    let seccomp = match security.seccomp.as_deref() {
        _ if privileged => None,
        None | Some("Unconfined") => None,
        Some("RuntimeDefault") => Some(seccomp::runtime_default(&capabilities(config))),
        Some(profile) => Some(seccomp::localhost(profile, &inner.options.root_dir)?),
    };
    let mut devices = device::rules(privileged);
    let mut nodes = if privileged { device::all() } else { Vec::new() };
    for path in &config.devices {
        let (node, rule) = device::one(path)?;
        nodes.push(node);
        devices.push(rule);
    }
    let resources = &config.resources;
    let mut linux = json!({
        "namespaces": namespaces,
        "cgroupsPath": cgroups_path(inner, &sandbox.cgroup_parent, id),
        "resources": {
            "cpu": { "shares": resources.cpu_shares, "quota": resources.cpu_quota_us,
                "period": resources.cpu_period_us },
            "memory": { "limit": resources.memory_limit_bytes, "swap": resources.memory_limit_bytes },
            "devices": devices,
        },
        "devices": nodes,
        "maskedPaths": if unmasked { no_paths } else { MASKED },
        "readonlyPaths": if unmasked { no_paths } else { READ_ONLY },
    });
    if let Some(limit) = resources.pids_limit {
        linux["resources"]["pids"] = json!({ "limit": limit });
    }
    if let Some(seccomp) = seccomp {
        linux["seccomp"] = seccomp;
    }
    if config.mounts.iter().any(|mount| mount.propagation == Propagation::Bidirectional) {
        linux["rootfsPropagation"] = "rshared".into();
    } else if config.mounts.iter().any(|mount| mount.propagation == Propagation::HostToContainer) {
        linux["rootfsPropagation"] = "rslave".into();
    }
    let mut all_annotations = config.annotations.clone();
    all_annotations.extend(annotations(&config.name));
    Ok(without_nulls(json!({
        "ociVersion": "1.0.2",
        "process": process(inner, sandbox, config, image, &user)?,
        "root": { "path": "rootfs", "readonly": security.read_only_root_fs },
        "mounts": mounts(&dir, sandbox, config, &termination::prepare(&inner.options.root_dir, id)?),
        "annotations": all_annotations,
        "linux": linux,
    })))
}

fn process(
    inner: &Inner,
    sandbox: &SandboxRecord,
    config: &ContainerConfig,
    image: &ResolvedImage,
    user: &User,
) -> Result<Value, RuntimeError> {
    let args = arguments(config, image);
    if args.is_empty() {
        return Err(RuntimeError::invalid(
            "no command specified: neither the container nor its image has one",
        ));
    }
    let capabilities = capabilities(config);
    let bounding: &[String] = &capabilities;
    // A user other than root gets no capabilities of its own, only the bound of what a setuid program may have.
    let effective: &[String] = if user.uid == 0 { &capabilities } else { &[] };
    let cwd = config.working_dir.clone().filter(|dir| !dir.is_empty());
    let cwd = cwd.or_else(|| image.config.working_dir.clone().filter(|dir| !dir.is_empty()));
    Ok(json!({
        "terminal": config.tty,
        "args": args,
        "cwd": cwd.unwrap_or_else(|| "/".into()),
        "env": environment(sandbox, config, image, user),
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
        "capabilities": { "bounding": bounding, "effective": effective, "permitted": effective,
            "inheritable": [], "ambient": [] },
        "noNewPrivileges": config.security.no_new_privs,
        "oomScoreAdj": config.resources.oom_score_adj.max(inner.oom_floor),
    }))
}

fn arguments(config: &ContainerConfig, image: &ResolvedImage) -> Vec<String> {
    let (command, args) = if config.command.is_empty() {
        let args = if config.args.is_empty() { &image.config.cmd } else { &config.args };
        (&image.config.entrypoint, args)
    } else {
        (&config.command, &config.args)
    };
    command.iter().chain(args).cloned().collect()
}

/// HOSTNAME, then the image's environment, then the pod's; of equal names the last one counts.
fn environment(
    sandbox: &SandboxRecord,
    config: &ContainerConfig,
    image: &ResolvedImage,
    user: &User,
) -> Vec<String> {
    let mut pairs: Vec<(String, String)> = vec![
        ("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()),
        ("HOSTNAME".into(), sandbox.hostname.clone()),
    ];
    if config.tty {
        pairs.push(("TERM".into(), "xterm".into()));
    }
    let of_image = image.config.env.iter().filter_map(|line| line.split_once('='));
    pairs.extend(of_image.map(|(name, value)| (name.to_owned(), value.to_owned())));
    pairs.extend(config.env.iter().cloned());
    if !pairs.iter().any(|(name, _)| name == "HOME") {
        pairs.push(("HOME".into(), user.home.clone()));
    }
    let mut lines: Vec<String> = Vec::with_capacity(pairs.len());
    for (position, (name, value)) in pairs.iter().enumerate() {
        if !pairs[position + 1..].iter().any(|(later, _)| later == name) {
            lines.push(format!("{name}={value}"));
        }
    }
    lines
}

fn capabilities(config: &ContainerConfig) -> Vec<String> {
    let security = &config.security;
    if security.privileged {
        return ALL_CAPABILITIES.iter().map(|&name| name.to_owned()).collect();
    }
    let full = |name: &String| {
        let upper = name.to_ascii_uppercase();
        if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") }
    };
    let add: Vec<String> = security.add_capabilities.iter().map(full).collect();
    let drop: Vec<String> = security.drop_capabilities.iter().map(full).collect();
    let has =
        |list: &[String], name: &str| list.iter().any(|entry| entry == name || entry == "CAP_ALL");
    let default = |name: &str| DEFAULT_CAPABILITIES.contains(&name) && !has(&drop, name);
    // What is added by name survives a drop of ALL.
    let wanted = |name: &str| {
        add.iter().any(|a| a == name)
            || (has(&add, name) && !drop.iter().any(|d| d == name))
            || default(name)
    };
    ALL_CAPABILITIES.iter().filter(|name| wanted(name)).map(|&name| name.to_owned()).collect()
}

fn mounts(
    dir: &SandboxDir,
    sandbox: &SandboxRecord,
    config: &ContainerConfig,
    last_words: &Path,
) -> Value {
    let sys = if config.security.privileged { "rw" } else { "ro" };
    let mut all = vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }),
        json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] }),
        json!({ "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", sys] }),
        json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", sys] }),
    ];
    let taken = |path: &str| config.mounts.iter().any(|mount| mount.container_path == path);
    let mut bind = |destination: &str, source: &Path| {
        if !taken(destination) && source.exists() {
            all.push(json!({ "destination": destination, "type": "bind", "source": source,
                "options": ["rbind", "rprivate", "rw"] }));
        }
    };
    let shm = if sandbox.host_ipc { Path::new("/dev/shm").to_owned() } else { dir.shm() };
    bind("/dev/shm", &shm);
    bind("/etc/hostname", &dir.file("hostname"));
    bind("/etc/resolv.conf", &dir.file("resolv.conf"));
    bind("/etc/hosts", &dir.file("hosts"));
    bind(&config.termination_message_path, last_words);
    let mut own: Vec<&Mount> = config.mounts.iter().collect();
    // A mount below another one must come after it.
    own.sort_by_key(|mount| Path::new(&mount.container_path).components().count());
    all.extend(own.into_iter().map(|mount| {
        let propagation = match mount.propagation {
            Propagation::Private => "rprivate",
            Propagation::HostToContainer => "rslave",
            Propagation::Bidirectional => "rshared",
        };
        let access = if mount.read_only { "ro" } else { "rw" };
        json!({ "destination": mount.container_path, "type": "bind", "source": mount.host_path,
            "options": ["rbind", propagation, access] })
    }));
    Value::Array(all)
}

fn shared_namespaces(dir: &SandboxDir, sandbox: &SandboxRecord) -> Vec<Value> {
    let mut shared = vec![json!({ "type": "network", "path": dir.namespace("net") })];
    if !sandbox.host_network {
        shared.push(json!({ "type": "uts", "path": dir.namespace("uts") }));
    }
    if !sandbox.host_ipc {
        shared.push(json!({ "type": "ipc", "path": dir.namespace("ipc") }));
    }
    shared
}

/// Without `io.kubernetes.cri.sandbox-id`, by which containerd's shim would group the containers of a pod: the shim of a
/// group may be on its way out when the next container is told to join it, since no pause task keeps it.
fn annotations(name: &str) -> std::collections::BTreeMap<String, String> {
    [(ANNOTATION_TYPE, "container"), (ANNOTATION_NAME, name)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

fn cgroups_path(inner: &Inner, parent: &str, id: &str) -> String {
    match inner.options.cgroup_driver {
        CgroupDriver::Cgroupfs => cgroup_of(parent, id),
        CgroupDriver::Systemd => {
            format!(
                "{}:keelson:{id}",
                Path::new(parent).file_name().unwrap_or_default().to_string_lossy()
            )
        }
    }
}

/// The cgroup of container `id` below each controller.
pub(crate) fn cgroup_of(parent: &str, id: &str) -> String {
    format!("{}/{id}", parent.trim_end_matches('/'))
}

/// Whether the kernel killed something in this cgroup for want of memory. Ask before the task is deleted.
pub(crate) fn was_oom_killed(cgroup: &str) -> bool {
    let below = cgroup.trim_start_matches('/');
    let files = [
        Path::new("/sys/fs/cgroup").join(below).join("memory.events"),
        Path::new("/sys/fs/cgroup/memory").join(below).join("memory.oom_control"),
    ];
    files.iter().filter_map(|file| fs::read_to_string(file).ok()).any(|text| {
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.is_some_and(|count| count.trim() != "0")
    })
}

/// The lowest `oom_score_adj` that we may give: lowering needs CAP_SYS_RESOURCE, and runc dies without it.
pub(crate) fn oom_score_floor() -> i32 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    if mask & (1 << CAP_SYS_RESOURCE) != 0 {
        return -1000;
    }
    let own = fs::read_to_string("/proc/self/oom_score_adj")
        .unwrap_or_default()
        .trim()
        .parse()
        .unwrap_or(0);
    tracing::info!(
        oom_score_adj = own,
        "Without CAP_SYS_RESOURCE no container gets a lower oom_score_adj than keelson's own"
    );
    own
}

/// As containerd keeps specifications: JSON under a URL of its own. Checked against the specification's types.
pub(crate) fn to_any(spec: &Value) -> Result<Any, RuntimeError> {
    serde_json::from_value::<Spec>(spec.clone()).map_err(|e| {
        RuntimeError::invalid(format!("the container's specification is not valid: {e}"))
    })?;
    let value = serde_json::to_vec(spec).map_err(|e| RuntimeError::invalid(e.to_string()))?;
    Ok(Any { type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(), value })
}

/// An optional number that is not set must not be there: runc reads null as 0 in places.
fn without_nulls(mut value: Value) -> Value {
    match &mut value {
        Value::Object(map) => {
            map.retain(|_, entry| !entry.is_null());
            for entry in map.values_mut() {
                *entry = without_nulls(entry.take());
            }
        }
        Value::Array(list) => {
            for entry in list {
                *entry = without_nulls(entry.take());
            }
        }
        _ => {}
    }
    value
}

/// containerd's options for its runc shim (`containerd.runc.v1.Options`), as far as we set them.
#[derive(Clone, PartialEq, Message)]
struct RuncOptions {
    #[prost(string, tag = "6")]
    binary_name: String,
    #[prost(bool, tag = "9")]
    systemd_cgroup: bool,
}

/// `None` where containerd's defaults are right.
pub(crate) fn runc_options(inner: &Inner, binary: &str) -> Option<Any> {
    let options = RuncOptions {
        binary_name: binary.to_owned(),
        systemd_cgroup: inner.options.cgroup_driver == CgroupDriver::Systemd,
    };
    if options == RuncOptions::default() {
        return None;
    }
    Some(Any { type_url: "containerd.runc.v1.Options".into(), value: options.encode_to_vec() })
}
