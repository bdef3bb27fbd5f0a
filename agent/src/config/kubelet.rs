//! Reads a KubeletConfiguration file as it is.
//!
//! Fields that the agent knows go into the [`AgentConfig`]; a field that the kubelet has and the
//! agent does not, or that nobody has, is named in a warning with its path. A value that cannot be
//! is an error that names the field and what belongs there.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{AgentConfig, Authorization, BadValue, CgroupDriver, Threshold, labels, quantity};

mod known;
mod section;
#[cfg(test)]
mod tests;

use section::Section;

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("cannot read the configuration file {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not YAML: {reason}")]
    Syntax { path: PathBuf, reason: String },
    #[error("{path}: {reason}")]
    Kind { path: PathBuf, reason: String },
    #[error("{path}: {source}")]
    Value { path: PathBuf, source: BadValue },
}

/// Applies the file at `path` to `config` and returns the warnings that its reader should see.
///
/// # Errors
/// When the file cannot be read, is no KubeletConfiguration, or has a value that cannot be.
pub fn apply_file(config: &mut AgentConfig, path: &Path) -> Result<Vec<String>, FileError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| FileError::Read { path: path.to_owned(), source })?;
    apply_text(config, &text, path)
}

/// As [`apply_file`], for text that has been read already; `path` is for error texts and for
/// relative file names, which count from the file's folder.
///
/// # Errors
/// See [`apply_file`].
pub fn apply_text(
    config: &mut AgentConfig,
    text: &str,
    path: &Path,
) -> Result<Vec<String>, FileError> {
    let value: Value = serde_saphyr::from_str(text)
        .map_err(|error| FileError::Syntax { path: path.to_owned(), reason: error.to_string() })?;
    let Value::Object(fields) = value else {
        return Err(kind_error(path, "the file is not a mapping of fields"));
    };
    let mut file = Section::new(fields);
    let bad_value = |source| FileError::Value { path: path.to_owned(), source };
    let api_version = file.string("apiVersion").map_err(bad_value)?;
    let kind = file.string("kind").map_err(bad_value)?;
    check_kind(path, api_version.as_deref(), kind.as_deref())?;
    let base = path.parent().unwrap_or(Path::new("."));
    read_fields(config, &mut file, base).map_err(bad_value)?;
    Ok(file.into_warnings(path))
}

fn check_kind(path: &Path, version: Option<&str>, kind: Option<&str>) -> Result<(), FileError> {
    match (version, kind) {
        (Some("kubelet.config.k8s.io/v1beta1"), Some("KubeletConfiguration")) => Ok(()),
        _ => Err(kind_error(
            path,
            &format!(
                "apiVersion {:?} and kind {:?} found where kubelet.config.k8s.io/v1beta1 and \
                 KubeletConfiguration are expected",
                version.unwrap_or_default(),
                kind.unwrap_or_default()
            ),
        )),
    }
}

fn kind_error(path: &Path, reason: &str) -> FileError {
    FileError::Kind { path: path.to_owned(), reason: reason.to_owned() }
}

fn read_fields(config: &mut AgentConfig, file: &mut Section, base: &Path) -> Result<(), BadValue> {
    read_node(config, file)?;
    read_server(config, file, base)?;
    read_access(config, file, base)?;
    read_pods(config, file)?;
    read_images(config, file)?;
    if let Some(path) = file.path("staticPodPath", base)? {
        config.static_pod_path = Some(path);
    }
    let runtime = &mut config.runtime;
    if let Some(endpoint) = file.string("containerRuntimeEndpoint")? {
        runtime.socket = parse_endpoint(&file.name("containerRuntimeEndpoint"), &endpoint)?;
    }
    if let Some(driver) = file.string("cgroupDriver")? {
        runtime.cgroup_driver = parse_cgroup_driver(&file.name("cgroupDriver"), &driver)?;
    }
    file.set(&mut runtime.cgroup_root, Section::string, "cgroupRoot")
}

fn read_node(config: &mut AgentConfig, file: &mut Section) -> Result<(), BadValue> {
    let node = &mut config.node;
    file.set(&mut node.register, Section::boolean, "registerNode")?;
    file.set(&mut node.max_pods, Section::number::<u32>, "maxPods")?;
    file.set(&mut node.status_update_frequency, Section::duration, "nodeStatusUpdateFrequency")?;
    file.set(&mut node.status_report_frequency, Section::duration, "nodeStatusReportFrequency")?;
    if let Some(secs) = file.number::<u32>("nodeLeaseDurationSeconds")? {
        node.lease_duration = std::time::Duration::from_secs(secs.max(1).into());
    }
    if let Some(id) = file.string("providerID")?.filter(|id| !id.is_empty()) {
        node.provider_id = Some(id);
    }
    for (field, into) in
        [("kubeReserved", &mut node.kube_reserved), ("systemReserved", &mut node.system_reserved)]
    {
        for (resource, amount) in file.strings_by_name(field)? {
            let path = format!("{}.{resource}", file.name(field));
            let value = parse_reserved(&path, &resource, &amount)?;
            into.insert(resource, value);
        }
    }
    if let Some(taints) = file.list("registerWithTaints")? {
        node.taints = taints
            .iter()
            .enumerate()
            .map(|(i, taint)| {
                read_taint(&format!("{}[{i}]", file.name("registerWithTaints")), taint)
            })
            .collect::<Result<_, _>>()?;
    }
    if let Some(mut hard) = file.section("evictionHard")? {
        hard.set(&mut node.eviction_memory, Section::threshold, "memory.available")?;
        hard.set(&mut node.eviction_disk, Section::threshold, "nodefs.available")?;
        hard.set(&mut node.eviction_inodes, Section::threshold, "nodefs.inodesFree")?;
        file.finish(hard);
    }
    Ok(())
}

fn read_server(config: &mut AgentConfig, file: &mut Section, base: &Path) -> Result<(), BadValue> {
    let server = &mut config.server;
    file.set(&mut server.address, Section::address, "address")?;
    file.set(&mut server.port, Section::number::<u16>, "port")?;
    file.set(&mut server.debugging_handlers, Section::boolean, "enableDebuggingHandlers")?;
    file.set(
        &mut server.streaming_idle_timeout,
        Section::duration,
        "streamingConnectionIdleTimeout",
    )?;
    let certificate = file.path("tlsCertFile", base)?;
    let key = file.path("tlsPrivateKeyFile", base)?;
    server.tls = pair_tls("tlsCertFile", certificate, "tlsPrivateKeyFile", key)?
        .or_else(|| server.tls.take());
    let mut healthz = config.healthz.map(|address| (address.ip(), address.port()));
    if let Some(port) = file.number::<u16>("healthzPort")? {
        let address = healthz.map_or(IpAddr::from([127, 0, 0, 1]), |(ip, _)| ip);
        healthz = (port != 0).then_some((address, port));
    }
    if let Some(address) = file.address("healthzBindAddress")? {
        healthz = healthz.map(|(_, port)| (address, port));
    }
    config.healthz = healthz.map(SocketAddr::from);
    Ok(())
}

fn read_access(config: &mut AgentConfig, file: &mut Section, base: &Path) -> Result<(), BadValue> {
    let server = &mut config.server;
    if let Some(mut section) = file.section("authentication")? {
        if let Some(mut x509) = section.section("x509")? {
            server.client_ca_file =
                x509.path("clientCAFile", base)?.or_else(|| server.client_ca_file.take());
            section.finish(x509);
        }
        if let Some(mut webhook) = section.section("webhook")? {
            webhook.set(&mut server.token_review, Section::boolean, "enabled")?;
            webhook.set(&mut server.token_review_ttl, Section::duration, "cacheTTL")?;
            section.finish(webhook);
        }
        if let Some(mut anonymous) = section.section("anonymous")? {
            anonymous.set(&mut server.anonymous, Section::boolean, "enabled")?;
            section.finish(anonymous);
        }
        file.finish(section);
    }
    if let Some(mut section) = file.section("authorization")? {
        if let Some(mode) = section.string("mode")? {
            server.authorization = parse_authorization(&section.name("mode"), &mode)?;
        }
        if let Some(mut webhook) = section.section("webhook")? {
            webhook.set(&mut server.authorized_ttl, Section::duration, "cacheAuthorizedTTL")?;
            webhook.set(&mut server.unauthorized_ttl, Section::duration, "cacheUnauthorizedTTL")?;
            section.finish(webhook);
        }
        file.finish(section);
    }
    Ok(())
}

fn read_pods(config: &mut AgentConfig, file: &mut Section) -> Result<(), BadValue> {
    let pods = &mut config.pods;
    if let Some(servers) = file.list("clusterDNS")? {
        pods.cluster_dns = servers
            .iter()
            .enumerate()
            .map(|(i, server)| {
                let field = format!("{}[{i}]", file.name("clusterDNS"));
                section::address(&field, server)
            })
            .collect::<Result<_, _>>()?;
    }
    file.set(&mut pods.cluster_domain, Section::string, "clusterDomain")?;
    if let Some(names) = file.list("allowedUnsafeSysctls")? {
        let read = |name: &Value| {
            let text = name.as_str().map(|text| text.replace('/', "."));
            text.ok_or_else(|| file.bad("allowedUnsafeSysctls", name, "names of sysctls"))
        };
        pods.allowed_unsafe_sysctls = names.iter().map(read).collect::<Result<_, _>>()?;
    }
    if let Some(path) = file.string("resolvConf")? {
        pods.resolv_conf = PathBuf::from(path);
    }
    file.set(&mut pods.log_max_size, Section::bytes, "containerLogMaxSize")?;
    if let Some(files) = file.number::<u32>("containerLogMaxFiles")? {
        if files < 2 {
            let field = file.name("containerLogMaxFiles");
            return Err(BadValue::new(field, files, "a number of files above 1"));
        }
        pods.log_max_files = files;
    }
    if let Some(limit) = file.number::<i64>("podPidsLimit")? {
        pods.pids_limit = (limit > 0).then_some(limit);
    }
    if let Some(mut backoff) = file.section("crashLoopBackOff")? {
        backoff.set(
            &mut pods.max_restart_period,
            Section::duration,
            "maxContainerRestartPeriod",
        )?;
        file.finish(backoff);
    }
    if file.boolean("serializeImagePulls")? == Some(true) {
        pods.max_parallel_image_pulls = 1;
    }
    file.set(&mut pods.max_parallel_image_pulls, Section::number::<u32>, "maxParallelImagePulls")
}

fn read_images(config: &mut AgentConfig, file: &mut Section) -> Result<(), BadValue> {
    let rules = &mut config.image_gc;
    file.set(
        &mut rules.high_threshold_percent,
        Section::number::<u8>,
        "imageGCHighThresholdPercent",
    )?;
    file.set(
        &mut rules.low_threshold_percent,
        Section::number::<u8>,
        "imageGCLowThresholdPercent",
    )?;
    file.set(&mut rules.minimum_age, Section::duration, "imageMinimumGCAge")?;
    rules.maximum_age = file.duration("imageMaximumGCAge")?.or(rules.maximum_age);
    if let Some(count) = file.number::<i32>("nodeStatusMaxImages")? {
        config.node.status_max_images = parse_max_images(&file.name("nodeStatusMaxImages"), count)?;
    }
    Ok(())
}

/// How many images the Node shall list: -1 is all of them.
///
/// # Errors
/// When it is less.
pub fn parse_max_images(field: &str, count: i32) -> Result<Option<usize>, BadValue> {
    match count {
        -1 => Ok(None),
        _ => usize::try_from(count)
            .map(Some)
            .map_err(|_| BadValue::new(field, count, "a number of images, or -1 for all")),
    }
}

fn read_taint(field: &str, value: &Value) -> Result<labels::NodeTaint, BadValue> {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    text("key")
        .zip(text("effect"))
        .and_then(|(key, effect)| labels::taint(key, text("value"), effect))
        .ok_or_else(|| BadValue::new(field, value, "a taint with key, effect and perhaps value"))
}

/// An amount of a reserved resource in the units of [`super::NodeConfig::kube_reserved`].
///
/// # Errors
/// When the resource cannot be reserved or the amount is no quantity.
pub fn parse_reserved(field: &str, resource: &str, text: &str) -> Result<u64, BadValue> {
    let amount = match resource {
        "cpu" => quantity::parse_milli(text).and_then(|milli| u64::try_from(milli).ok()),
        "memory" | "ephemeral-storage" | "pid" => quantity::parse(text),
        _ if resource.starts_with("hugepages-") => quantity::parse(text),
        _ => {
            let expected = "a resource that can be reserved: cpu, memory, ephemeral-storage or pid";
            return Err(BadValue::new(field, format!("{resource:?}"), expected));
        }
    };
    amount.ok_or_else(|| BadValue::new(field, format!("{text:?}"), quantity::EXPECTED))
}

/// `unix:///run/containerd/containerd.sock`, or the bare path.
///
/// # Errors
/// When the endpoint is no Unix socket.
pub fn parse_endpoint(field: &str, text: &str) -> Result<PathBuf, BadValue> {
    let path = text.strip_prefix("unix://").unwrap_or(text);
    if path.starts_with('/') {
        return Ok(PathBuf::from(path));
    }
    let expected = "a Unix socket (such as unix:///run/containerd/containerd.sock)";
    Err(BadValue::new(field, format!("{text:?}"), expected))
}

/// `cgroupfs` or `systemd`.
///
/// # Errors
/// When it is neither.
pub fn parse_cgroup_driver(field: &str, text: &str) -> Result<CgroupDriver, BadValue> {
    match text {
        "cgroupfs" => Ok(CgroupDriver::Cgroupfs),
        "systemd" => Ok(CgroupDriver::Systemd),
        _ => Err(BadValue::new(field, format!("{text:?}"), "cgroupfs or systemd")),
    }
}

/// `AlwaysAllow` or `Webhook`.
///
/// # Errors
/// When it is neither.
pub fn parse_authorization(field: &str, text: &str) -> Result<Authorization, BadValue> {
    match text {
        "AlwaysAllow" => Ok(Authorization::AlwaysAllow),
        "Webhook" => Ok(Authorization::Webhook),
        _ => Err(BadValue::new(field, format!("{text:?}"), "AlwaysAllow or Webhook")),
    }
}

/// A certificate needs its key and the other way round.
///
/// # Errors
/// When exactly one of the two is given.
pub fn pair_tls(
    certificate_field: &str,
    certificate: Option<PathBuf>,
    key_field: &str,
    key: Option<PathBuf>,
) -> Result<Option<(PathBuf, PathBuf)>, BadValue> {
    let expected = "a file: certificate and key belong together";
    match (certificate, key) {
        (Some(certificate), Some(key)) => Ok(Some((certificate, key))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(BadValue::new(key_field, "nothing", expected)),
        (None, Some(_)) => Err(BadValue::new(certificate_field, "nothing", expected)),
    }
}

/// `100Mi` or `10%`.
pub(crate) fn parse_threshold(text: &str) -> Option<Threshold> {
    if let Some(percent) = text.strip_suffix('%') {
        let percent: f64 = percent.parse().ok()?;
        return (0.0..=100.0).contains(&percent).then_some(Threshold::Share(percent / 100.0));
    }
    quantity::parse(text).map(Threshold::Amount)
}
