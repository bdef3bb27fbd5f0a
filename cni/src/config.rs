//! keelson-cni's configuration: one plugin entry of a configuration list.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use crate::error::{CniError, code};
use crate::hostport::{HostPort, Transport};
use crate::protocol::is_name;
use crate::result::Dns;
use crate::version::Version;

/// Where addresses and attachments are remembered unless `dataDir` says otherwise.
pub const DEFAULT_DATA_DIR: &str = "/var/lib/cni/keelson";
/// How long a call waits for others unless `lockTimeoutSecs` says otherwise.
const DEFAULT_LOCK_TIMEOUT: Duration = Duration::from_secs(30);
/// The smallest packet size that IPv6 allows.
const MIN_MTU: u64 = 1280;

/// What every verb needs, read leniently: DEL and GC must work whatever else the configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The version to answer in.
    pub version: Version,
    /// The network's name.
    pub name: String,
    /// The folder of all networks' state.
    pub data_dir: PathBuf,
    /// How long to wait for other calls.
    pub lock_timeout: Duration,
}

impl Network {
    /// The folder of this network's state.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.data_dir.join(&self.name)
    }
}

/// What ADD, CHECK and STATUS need on top, read strictly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where pods' addresses come from.
    pub pod_cidrs: Vec<IpNetwork>,
    /// Where pods are reached under their own address: traffic to it is not masqueraded.
    pub cluster_cidrs: Vec<IpNetwork>,
    /// Addresses never to give to pods.
    pub exclude: Vec<IpNetwork>,
    /// Largest packet; the uplink's if `None`.
    pub mtu: Option<u32>,
    /// Whether traffic that leaves the cluster gets the node's address.
    pub masquerade: bool,
    /// DNS settings to pass on.
    pub dns: Dns,
    /// Ports of the node that lead to this pod.
    pub host_ports: Vec<HostPort>,
}

/// The keys that a plugin entry may have. Those of the second line are CNI's own.
const KEYS: [&str; 19] = [
    "podCIDRs",
    "clusterCIDRs",
    "exclude",
    "mtu",
    "masquerade",
    "dataDir",
    "lockTimeoutSecs",
    "cniVersion",
    "cniVersions",
    "name",
    "type",
    "args",
    "capabilities",
    "runtimeConfig",
    "prevResult",
    "dns",
    "disableCheck",
    "disableGC",
    "loadOnlyInlinedPlugins",
];

/// Reads what is common to all verbs.
///
/// # Errors
/// A CNI error that names the field.
pub fn network(fields: &Map<String, Value>) -> Result<Network, CniError> {
    let version = match fields.get("cniVersion") {
        Some(Value::String(text)) => Version::parse(text).ok_or_else(|| unspoken(text))?,
        None => return Err(unspoken("")),
        Some(other) => return Err(wrong("cniVersion", other, "must be a text")),
    };
    let name = match fields.get("name") {
        Some(Value::String(name)) if is_name(name) => name.clone(),
        Some(other) => {
            let rule = "must start with a letter or digit and hold only those and _ . -";
            return Err(wrong("name", other, rule));
        }
        None => return Err(missing("name")),
    };
    let data_dir = match fields.get("dataDir") {
        None => PathBuf::from(DEFAULT_DATA_DIR),
        Some(Value::String(path)) if path.starts_with('/') => PathBuf::from(path),
        Some(other) => return Err(wrong("dataDir", other, "must be an absolute path")),
    };
    let lock_timeout = match fields.get("lockTimeoutSecs") {
        None => DEFAULT_LOCK_TIMEOUT,
        Some(value) => match value.as_u64().filter(|secs| (1..=3600).contains(secs)) {
            Some(secs) => Duration::from_secs(secs),
            None => return Err(wrong("lockTimeoutSecs", value, "must be 1 to 3600 seconds")),
        },
    };
    Ok(Network { version, name, data_dir, lock_timeout })
}

/// Reads the rest.
///
/// # Errors
/// A CNI error that names the field.
pub fn config(fields: &Map<String, Value>) -> Result<Config, CniError> {
    for (key, value) in fields {
        if !KEYS.contains(&key.as_str()) && !key.starts_with("cni.dev/") {
            return Err(unsupported(key, value));
        }
    }
    let pod_cidrs = networks(fields, "podCIDRs")?.ok_or_else(|| {
        missing("podCIDRs").with_details(
            r#"give the ranges that pods get addresses from, e.g. "podCIDRs": ["10.244.0.0/24"]"#,
        )
    })?;
    if pod_cidrs.is_empty() {
        return Err(wrong("podCIDRs", &fields["podCIDRs"], "must have at least one range"));
    }
    if let Some(range) = pod_cidrs.iter().find(|cidr| !cidr.ip().eq(&cidr.network())) {
        let text = format!(
            "podCIDRs: {range} has host bits set; did you mean {}/{}?",
            range.network(),
            range.prefix()
        );
        return Err(CniError::new(code::BAD_CONFIG, text));
    }
    let cluster_cidrs = networks(fields, "clusterCIDRs")?;
    Ok(Config {
        cluster_cidrs: cluster_cidrs.unwrap_or_else(|| pod_cidrs.clone()),
        exclude: networks(fields, "exclude")?.unwrap_or_default(),
        mtu: mtu(fields)?,
        masquerade: match fields.get("masquerade") {
            None => true,
            Some(Value::Bool(wanted)) => *wanted,
            Some(other) => return Err(wrong("masquerade", other, "must be true or false")),
        },
        dns: dns(fields)?,
        host_ports: host_ports(fields)?,
        pod_cidrs,
    })
}

/// The attachments that GC shall spare, under either of the names that runtimes use.
///
/// # Errors
/// When neither is there, or one is not a list of container ids and interface names.
pub fn valid_attachments(fields: &Map<String, Value>) -> Result<Vec<(String, String)>, CniError> {
    let keys = ["cni.dev/valid-attachments", "cni.dev/attachments"];
    let found = keys.iter().find_map(|key| fields.get(*key).map(|value| (*key, value)));
    let Some((key, value)) = found else { return Err(missing(keys[0])) };
    let rule = r#"must be a list of {"containerID": ..., "ifname": ...}"#;
    let list = match value {
        Value::Null => return Ok(Vec::new()),
        other => other.as_array().ok_or_else(|| wrong(key, other, rule))?,
    };
    list.iter()
        .map(|entry| {
            let text = |name| entry.get(name).and_then(Value::as_str).map(str::to_owned);
            text("containerID").zip(text("ifname")).ok_or_else(|| wrong(key, entry, rule))
        })
        .collect()
}

fn networks(fields: &Map<String, Value>, key: &str) -> Result<Option<Vec<IpNetwork>>, CniError> {
    let rule = "must be a list of ranges such as \"10.244.0.0/24\"";
    let list = match fields.get(key) {
        None => return Ok(None),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(key, other, rule)),
    };
    let parse = |(position, value): (usize, &Value)| {
        let text = value.as_str().unwrap_or_default();
        text.parse()
            .map_err(|_| wrong(&format!("{key}[{position}]"), value, "is not an address range"))
    };
    list.iter().enumerate().map(parse).collect::<Result<_, _>>().map(Some)
}

fn mtu(fields: &Map<String, Value>) -> Result<Option<u32>, CniError> {
    match fields.get("mtu") {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            Some(0) => Ok(None),
            Some(mtu) if (MIN_MTU..=65535).contains(&mtu) => Ok(u32::try_from(mtu).ok()),
            _ => Err(wrong("mtu", value, "must be 1280 to 65535, or 0 for the uplink's")),
        },
    }
}

fn dns(fields: &Map<String, Value>) -> Result<Dns, CniError> {
    let given = fields.get("runtimeConfig").and_then(|runtime| runtime.get("dns"));
    let (key, value) = match (given, fields.get("dns")) {
        (Some(value), _) => ("runtimeConfig.dns", value),
        (None, Some(value)) => ("dns", value),
        (None, None) => return Ok(Dns::default()),
    };
    // containerd sends the capability with capital or small names depending on its version.
    let lower = value
        .as_object()
        .map(|object| Value::Object(object.iter().map(|(k, v)| (dns_key(k), v.clone())).collect()));
    serde_json::from_value(lower.unwrap_or_default())
        .map_err(|e| wrong(key, value, "is not a DNS setting").with_details(e.to_string()))
}

fn dns_key(key: &str) -> String {
    match key.to_ascii_lowercase().as_str() {
        "servers" => "nameservers".to_owned(),
        "searches" => "search".to_owned(),
        other => other.to_owned(),
    }
}

fn host_ports(fields: &Map<String, Value>) -> Result<Vec<HostPort>, CniError> {
    let list = match fields.get("runtimeConfig").and_then(|runtime| runtime.get("portMappings")) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong("runtimeConfig.portMappings", other, "must be a list")),
    };
    let mut ports = Vec::new();
    for (position, entry) in list.iter().enumerate() {
        let at = |field: &str| format!("runtimeConfig.portMappings[{position}].{field}");
        let port = |field| {
            let value = entry.get(field).unwrap_or(&Value::Null);
            let number = value.as_u64().and_then(|number| u16::try_from(number).ok());
            number.ok_or_else(|| wrong(&at(field), value, "is not a port (1-65535)"))
        };
        let (host, container) = (port("hostPort")?, port("containerPort")?);
        // Runtimes list ports without a host port, too.
        if host == 0 {
            continue;
        }
        if container == 0 {
            return Err(wrong(&at("containerPort"), &Value::from(0), "is not a port (1-65535)"));
        }
        let protocol = transport(entry.get("protocol"), &at("protocol"))?;
        let address = host_address(entry.get("hostIP"), &at("hostIP"))?;
        ports.push(HostPort { host, container, protocol, address });
    }
    Ok(ports)
}

fn transport(value: Option<&Value>, field: &str) -> Result<Transport, CniError> {
    let Some(value) = value else { return Ok(Transport::Tcp) };
    match value.as_str().map(str::to_ascii_lowercase).as_deref() {
        Some("tcp" | "") => Ok(Transport::Tcp),
        Some("udp") => Ok(Transport::Udp),
        Some("sctp") => Ok(Transport::Sctp),
        _ => Err(wrong(field, value, "must be tcp, udp or sctp")),
    }
}

/// The unspecified address means all addresses.
fn host_address(value: Option<&Value>, field: &str) -> Result<Option<IpAddr>, CniError> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(value) => {
            let address: Option<IpAddr> = value.as_str().and_then(|text| text.parse().ok());
            let address = address.ok_or_else(|| wrong(field, value, "is not an IP address"))?;
            Ok(Some(address).filter(|address| !address.is_unspecified()))
        }
    }
}

fn missing(key: &str) -> CniError {
    CniError::new(code::BAD_CONFIG, format!("{key}: missing"))
}

fn wrong(key: &str, value: &Value, rule: &str) -> CniError {
    CniError::new(code::BAD_CONFIG, format!("{key}: {value} {rule}"))
}

fn unspoken(text: &str) -> CniError {
    let msg = format!("cniVersion: {text:?} is not supported");
    let details = format!("supported are {}", Version::list());
    CniError::new(code::INCOMPATIBLE_VERSION, msg).with_details(details)
}

fn unsupported(key: &str, value: &Value) -> CniError {
    let msg = format!("unsupported field {key}: {value}");
    let details = if key == "ipam" {
        "keelson-cni manages addresses itself: remove ipam and give the ranges in podCIDRs"
            .to_owned()
    } else {
        format!("known fields: {}", KEYS[..7].join(", "))
    };
    CniError::new(code::UNSUPPORTED_FIELD, msg).with_details(details)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Map<String, Value> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn wrong_fields_are_named_with_their_value() {
        let cases = [
            (r#"{}"#, 7, "podCIDRs: missing"),
            (r#"{"podCIDRs":[]}"#, 7, "podCIDRs: [] must have at least one range"),
            (r#"{"podCIDRs":"10.0.0.0/8"}"#, 7, r#"podCIDRs: "10.0.0.0/8" must be a list"#),
            (
                r#"{"podCIDRs":["10.0.0.0/33"]}"#,
                7,
                r#"podCIDRs[0]: "10.0.0.0/33" is not an address range"#,
            ),
            (
                r#"{"podCIDRs":["10.0.0.7/24"]}"#,
                7,
                "podCIDRs: 10.0.0.7/24 has host bits set; did you mean 10.0.0.0/24?",
            ),
            (r#"{"podCIDRs":["10.0.0.0/24"],"podCIDR":1}"#, 2, "unsupported field podCIDR: 1"),
            (r#"{"podCIDRs":["10.0.0.0/24"],"ipam":{}}"#, 2, "unsupported field ipam: {}"),
            (r#"{"podCIDRs":["10.0.0.0/24"],"mtu":100}"#, 7, "mtu: 100 must be 1280 to 65535"),
            (
                r#"{"podCIDRs":["10.0.0.0/24"],"masquerade":"yes"}"#,
                7,
                r#"masquerade: "yes" must be true or false"#,
            ),
            (
                r#"{"podCIDRs":["10.0.0.0/24"],"runtimeConfig":{"portMappings":[{"hostPort":70000}]}}"#,
                7,
                "runtimeConfig.portMappings[0].hostPort: 70000 is not a port",
            ),
            (
                r#"{"podCIDRs":["10.0.0.0/24"],"runtimeConfig":{"portMappings":[{"hostPort":7,"containerPort":8,"protocol":"x"}]}}"#,
                7,
                r#"runtimeConfig.portMappings[0].protocol: "x" must be"#,
            ),
        ];
        for (text, code, want) in cases {
            let error = config(&fields(text)).unwrap_err();
            assert!(error.msg.contains(want), "{text}\n gave {error}\n not {want}");
            assert_eq!(error.code, code, "{text}");
        }
    }

    #[test]
    fn what_all_verbs_need_is_checked_too() {
        let cases = [
            (r#"{"name":"a"}"#, 1, "cniVersion: \"\" is not supported"),
            (r#"{"cniVersion":"0.2.0","name":"a"}"#, 1, "cniVersion: \"0.2.0\""),
            (r#"{"cniVersion":"1.0.0"}"#, 7, "name: missing"),
            (r#"{"cniVersion":"1.0.0","name":"../x"}"#, 7, "name: \"../x\" must"),
            (
                r#"{"cniVersion":"1.0.0","name":"a","dataDir":"x"}"#,
                7,
                "dataDir: \"x\" must be an absolute path",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"a","lockTimeoutSecs":0}"#,
                7,
                "lockTimeoutSecs: 0 must",
            ),
        ];
        for (text, code, want) in cases {
            let error = network(&fields(text)).unwrap_err();
            assert!(error.msg.contains(want), "{text}\n gave {error}\n not {want}");
            assert_eq!(error.code, code, "{text}");
        }
    }

    #[test]
    fn both_names_of_the_attachment_list_are_read() {
        for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
            let text = format!(r#"{{"{key}":[{{"containerID":"a","ifname":"eth0"}}]}}"#);
            let want = vec![("a".to_owned(), "eth0".to_owned())];
            assert_eq!(valid_attachments(&fields(&text)).unwrap(), want);
        }
        assert!(valid_attachments(&fields("{}")).is_err());
    }

    #[test]
    fn capabilities_are_read_as_runtimes_write_them() {
        let config = config(&fields(
            r#"{"podCIDRs":["10.0.0.0/24"],"runtimeConfig":{
                "dns":{"Servers":["1.1.1.1"],"Searches":["a"],"Options":["ndots:5"]},
                "portMappings":[{"hostPort":0,"containerPort":1},
                    {"hostPort":80,"containerPort":8080,"protocol":"TCP","hostIP":"0.0.0.0"}]}}"#,
        ))
        .unwrap();
        assert_eq!(config.dns.nameservers, ["1.1.1.1"]);
        let want = HostPort { host: 80, container: 8080, protocol: Transport::Tcp, address: None };
        assert_eq!(config.host_ports, [want]);
    }
}
