//! `fieldRef` and `resourceFieldRef`: what a pod may know about itself.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::cgroup::resources;
use crate::pod::spec;

/// What of a pod is not in its manifest.
#[derive(Debug, Clone, Copy)]
pub struct FieldContext<'a> {
    pub pod_ips: &'a [IpAddr],
    pub host_ips: &'a [IpAddr],
    pub node_name: &'a str,
    pub allocatable: &'a BTreeMap<String, Quantity>,
}

/// A field that a pod cannot refer to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    #[error(
        "fieldPath {path} is not supported; hint: metadata.name, metadata.labels['<key>'], status.podIP, …"
    )]
    Unknown { path: String },
    #[error("resourceFieldRef names the container {name}, which the pod does not have")]
    NoContainer { name: String },
    #[error("resource {resource} is not supported; hint: limits.cpu, requests.memory, …")]
    Resource { resource: String },
    #[error("divisor {divisor} is not a positive quantity")]
    Divisor { divisor: String },
}

impl FieldContext<'_> {
    /// The text of one field.
    ///
    /// # Errors
    /// When there is no such field.
    pub fn field(&self, pod: &Pod, path: &str) -> Result<String, FieldError> {
        let meta = &pod.metadata;
        let spec = pod.spec.as_ref();
        let text = |value: Option<&String>| value.cloned().unwrap_or_default();
        let join =
            |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let first = |ips: &[IpAddr]| ips.first().map(ToString::to_string).unwrap_or_default();
        if let Some((map, key)) = subscript(path) {
            let map = match map {
                "metadata.labels" => meta.labels.as_ref(),
                "metadata.annotations" => meta.annotations.as_ref(),
                _ => return Err(FieldError::Unknown { path: path.to_owned() }),
            };
            return Ok(map.and_then(|m| m.get(key)).cloned().unwrap_or_default());
        }
        Ok(match path {
            "metadata.name" => text(meta.name.as_ref()),
            "metadata.namespace" => spec::namespace(pod).to_owned(),
            "metadata.uid" => text(meta.uid.as_ref()),
            "metadata.labels" => format_map(meta.labels.as_ref()),
            "metadata.annotations" => format_map(meta.annotations.as_ref()),
            "spec.nodeName" => self.node_name.to_owned(),
            "spec.serviceAccountName" => text(spec.and_then(|s| s.service_account_name.as_ref())),
            "status.hostIP" => first(self.host_ips),
            "status.hostIPs" => join(self.host_ips),
            "status.podIP" => first(self.pod_ips),
            "status.podIPs" => join(self.pod_ips),
            _ => return Err(FieldError::Unknown { path: path.to_owned() }),
        })
    }

    /// A request or limit in units of the divisor, rounded up. A missing limit is what the node has.
    ///
    /// # Errors
    /// When the resource or container does not exist or the divisor is no quantity.
    pub fn resource(
        &self,
        pod: &Pod,
        own: Option<&Container>,
        selector: &ResourceFieldSelector,
    ) -> Result<String, FieldError> {
        let named = selector.container_name.as_deref().filter(|name| !name.is_empty());
        let container = match (named, own) {
            (Some(name), _) => spec::container(pod, name)
                .map(|(c, _)| c)
                .ok_or_else(|| FieldError::NoContainer { name: name.to_owned() })?,
            (None, Some(own)) => own,
            (None, None) => return Err(FieldError::NoContainer { name: String::new() }),
        };
        let unknown = || FieldError::Resource { resource: selector.resource.clone() };
        let (side, name) = selector.resource.split_once('.').ok_or_else(unknown)?;
        let quantity = match side {
            "limits" => resources::limit(container, name).or_else(|| self.allocatable.get(name)),
            "requests" => resources::request(container, name),
            _ => return Err(unknown()),
        };
        let divisor = divisor(selector)?;
        let milli = quantity.and_then(resources::milli).unwrap_or(0);
        Ok(((milli + divisor - 1) / divisor).to_string())
    }
}

fn divisor(selector: &ResourceFieldSelector) -> Result<i128, FieldError> {
    let text = selector.divisor.as_ref().map(|d| d.0.trim()).filter(|d| !d.is_empty() && *d != "0");
    let Some(text) = text else { return Ok(1000) };
    resources::milli(&Quantity(text.to_owned()))
        .filter(|d| *d > 0)
        .ok_or_else(|| FieldError::Divisor { divisor: text.to_owned() })
}

/// `metadata.labels['key']`.
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, rest) = path.split_once("['")?;
    Some((map, rest.strip_suffix("']")?))
}

/// One `key="value"` per line, sorted, quoted as Go does.
fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let mut out = String::new();
    for (key, value) in map.into_iter().flatten() {
        let quoted = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let newline = if out.is_empty() { "" } else { "\n" };
        out.push_str(&format!("{newline}{key}=\"{quoted}\""));
    }
    out
}
