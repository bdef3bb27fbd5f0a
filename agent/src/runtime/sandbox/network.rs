//! A sandbox's place in the pod network: CNI's ADD and DEL.

use std::net::IpAddr;
use std::path::PathBuf;

use keelson_cni::conflist::Conflist;
use keelson_cni::invoke::{Attachment, Invoker};

use super::{SandboxDir, chain, pod_name};
use crate::runtime::types::{HostPort, PodNetwork, SandboxConfig};
use crate::runtime::{Inner, RuntimeError};

/// How long one CNI plugin may take.
const CNI_LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

pub(super) fn add(
    inner: &Inner,
    id: &str,
    dir: &SandboxDir,
    config: &SandboxConfig,
) -> Result<Vec<IpAddr>, RuntimeError> {
    let fail = |message| RuntimeError::Network { pod: pod_name(config), message };
    let list = Conflist::load_dir(&inner.options.cni_conf_dir).map_err(|e| fail(chain(&e)))?;
    let attachment = attachment(id, Some(dir.namespace("net")), config);
    let added = invoker(inner).add(&list, &attachment).map_err(|e| fail(chain(&e)))?;
    let ips = added.result.container_ips();
    if ips.is_empty() {
        Err(fail(format!("the CNI network {} gave it no address", list.name)))
    } else {
        Ok(ips)
    }
}

fn attachment(id: &str, netns: Option<PathBuf>, config: &SandboxConfig) -> Attachment {
    let args = [
        ("K8S_POD_NAMESPACE", &config.pod.namespace),
        ("K8S_POD_NAME", &config.pod.name),
        ("K8S_POD_INFRA_CONTAINER_ID", &id.to_owned()),
        ("K8S_POD_UID", &config.pod.uid),
    ]
    .map(|(key, value)| (key.to_owned(), value.clone()));
    let mut capabilities = serde_json::Map::new();
    capabilities.insert("portMappings".into(), port_mappings(config));
    Attachment {
        container_id: id.to_owned(),
        netns,
        ifname: "eth0".into(),
        args: args.into(),
        capabilities,
    }
}

pub(super) fn port_mappings(config: &SandboxConfig) -> serde_json::Value {
    let PodNetwork::Cni { host_ports } = &config.network else {
        return serde_json::Value::Array(Vec::new());
    };
    let mapping = |port: &HostPort| {
        let mut mapping = serde_json::json!({
            "hostPort": port.host_port, "containerPort": port.container_port, "protocol": port.protocol,
        });
        if let Some(ip) = port.host_ip {
            mapping["hostIP"] = ip.to_string().into();
        }
        mapping
    };
    host_ports.iter().map(mapping).collect()
}

fn invoker(inner: &Inner) -> Invoker {
    Invoker {
        bin_dirs: inner.options.cni_bin_dirs.clone(),
        // Not in the run directory: an address stays taken over a reboot until DEL or GC.
        state_dir: inner.options.root_dir.join("cni-results"),
        timeout: CNI_LIMIT,
    }
}

/// DEL as ADD was, also when the network has another name or no configuration by now.
pub(super) fn remove(inner: &Inner, id: &str, netns: Option<PathBuf>) -> Result<(), String> {
    let invoker = invoker(inner);
    let was_remembered =
        invoker.del_remembered(id, netns.as_deref()).map_err(|error| chain(&error))?;
    // Neither a remembered ADD nor a namespace: it was taken down before. With a namespace, ADD was interrupted.
    if was_remembered || netns.is_none() {
        return Ok(());
    }
    let list = Conflist::load_dir(&inner.options.cni_conf_dir).map_err(|error| chain(&error))?;
    let attachment = Attachment {
        container_id: id.to_owned(),
        netns,
        ifname: "eth0".into(),
        args: Vec::new(),
        capabilities: serde_json::Map::new(),
    };
    invoker.del(&list, &attachment).map_err(|error| chain(&error))
}
