//! Rows of the other kinds that have more than an age.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Column, age, number, since, text, wide};

pub(super) const DEPLOYMENT: &[Column] = &[
    text("Ready"),
    text("Up-to-date"),
    text("Available"),
    text("Age"),
    wide("Containers"),
    wide("Images"),
    wide("Selector"),
];
pub(super) const REPLICA_SET: &[Column] = &[
    number("Desired"),
    number("Current"),
    number("Ready"),
    text("Age"),
    wide("Containers"),
    wide("Images"),
    wide("Selector"),
];
pub(super) const SERVICE: &[Column] = &[
    text("Type"),
    text("Cluster-IP"),
    text("External-IP"),
    text("Port(s)"),
    text("Age"),
    wide("Selector"),
];
pub(super) const NODE: &[Column] = &[
    text("Status"),
    text("Roles"),
    text("Age"),
    text("Version"),
    wide("Internal-IP"),
    wide("External-IP"),
    wide("OS-Image"),
    wide("Kernel-Version"),
    wide("Container-Runtime"),
];
pub(super) const SLICE: &[Column] =
    &[text("AddressType"), text("Ports"), text("Endpoints"), text("Age")];
pub(super) const EVENT: &[Column] = &[
    text("Last Seen"),
    text("Type"),
    text("Reason"),
    text("Object"),
    wide("Subobject"),
    wide("Source"),
    text("Message"),
    wide("First Seen"),
    wide("Count"),
];

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn string(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn count(value: &Value) -> i64 {
    value.as_i64().unwrap_or(0)
}

fn or_none(text: String) -> Value {
    if text.is_empty() { json!("<none>") } else { json!(text) }
}

fn join<'a>(items: impl Iterator<Item = &'a str>) -> String {
    items.collect::<Vec<_>>().join(",")
}

fn pairs(labels: &Value) -> String {
    let labels = labels.as_object().into_iter().flatten();
    labels.map(|(key, value)| format!("{key}={}", string(value))).collect::<Vec<_>>().join(",")
}

/// Containers, images and selector of a workload.
fn template(value: &Value) -> [Value; 3] {
    let containers = list(&value["spec"]["template"]["spec"]["containers"]);
    [
        json!(join(containers.iter().map(|c| string(&c["name"])))),
        json!(join(containers.iter().map(|c| string(&c["image"])))),
        or_none(pairs(&value["spec"]["selector"]["matchLabels"])),
    ]
}

pub(super) fn deployment(value: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&value["spec"], &value["status"]);
    let mut cells = vec![
        json!(format!("{}/{}", count(&status["readyReplicas"]), count(&spec["replicas"]))),
        json!(count(&status["updatedReplicas"])),
        json!(count(&status["availableReplicas"])),
        age(value, now),
    ];
    cells.extend(template(value));
    cells
}

pub(super) fn replica_set(value: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&value["spec"], &value["status"]);
    let mut cells = vec![
        json!(count(&spec["replicas"])),
        json!(count(&status["replicas"])),
        json!(count(&status["readyReplicas"])),
        age(value, now),
    ];
    cells.extend(template(value));
    cells
}

pub(super) fn service(value: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &value["spec"];
    let ports = list(&spec["ports"]).iter().map(|port| {
        let (number, protocol) = (count(&port["port"]), string(&port["protocol"]));
        match count(&port["nodePort"]) {
            0 => format!("{number}/{protocol}"),
            node => format!("{number}:{node}/{protocol}"),
        }
    });
    let ports = ports.collect::<Vec<_>>().join(",");
    let address = string(&spec["clusterIP"]).to_owned();
    vec![
        spec["type"].clone(),
        or_none(address),
        json!(external(value)),
        or_none(ports),
        age(value, now),
        or_none(pairs(&spec["selector"])),
    ]
}

fn external(value: &Value) -> String {
    let (spec, ingress) = (&value["spec"], list(&value["status"]["loadBalancer"]["ingress"]));
    let given = join(list(&spec["externalIPs"]).iter().map(string));
    let balanced = join(ingress.iter().map(|i| {
        Some(string(&i["ip"])).filter(|ip| !ip.is_empty()).unwrap_or(string(&i["hostname"]))
    }));
    match string(&spec["type"]) {
        "ExternalName" => string(&spec["externalName"]).to_owned(),
        "LoadBalancer" => match (balanced.is_empty(), given.is_empty()) {
            (true, true) => "<pending>".to_owned(),
            (false, false) => format!("{balanced},{given}"),
            (false, true) => balanced,
            (true, false) => given,
        },
        _ if given.is_empty() => "<none>".to_owned(),
        _ => given,
    }
}

pub(super) fn node(value: &Value, now: Timestamp) -> Vec<Value> {
    let (status, info) = (&value["status"], &value["status"]["nodeInfo"]);
    let ready = list(&status["conditions"]).iter().find(|c| c["type"] == "Ready");
    let mut state = match ready.map(|c| string(&c["status"])) {
        Some("True") => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
        None => "Unknown".to_owned(),
    };
    if value["spec"]["unschedulable"] == true {
        state.push_str(",SchedulingDisabled");
    }
    let labels = value["metadata"]["labels"].as_object().into_iter().flatten();
    let mut roles: Vec<&str> = labels
        .filter_map(|(key, role)| {
            key.strip_prefix("node-role.kubernetes.io/")
                .or_else(|| (key == "kubernetes.io/role").then(|| string(role)))
        })
        .filter(|role| !role.is_empty())
        .collect();
    roles.sort_unstable();
    let address = |kind: &str| {
        let found = list(&status["addresses"]).iter().find(|a| a["type"] == kind);
        or_none(found.map(|a| string(&a["address"]).to_owned()).unwrap_or_default())
    };
    let or_unknown = |v: &Value| json!(v.as_str().filter(|t| !t.is_empty()).unwrap_or("<unknown>"));
    vec![
        json!(state),
        or_none(roles.join(",")),
        age(value, now),
        info["kubeletVersion"].clone(),
        address("InternalIP"),
        address("ExternalIP"),
        or_unknown(&info["osImage"]),
        or_unknown(&info["kernelVersion"]),
        or_unknown(&info["containerRuntimeVersion"]),
    ]
}

/// The first few, and how many more there are.
fn few(items: &[String]) -> Value {
    const SHOWN: usize = 3;
    if items.len() > SHOWN {
        let rest = items.len() - SHOWN;
        return json!(format!("{} + {rest} more...", items[..SHOWN].join(",")));
    }
    or_none(items.join(","))
}

fn join_port(address: &str, port: i64) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

pub(super) fn endpoints(value: &Value, now: Timestamp) -> Vec<Value> {
    let mut all = Vec::new();
    for subset in list(&value["subsets"]) {
        for port in list(&subset["ports"]) {
            for address in list(&subset["addresses"]) {
                all.push(join_port(string(&address["ip"]), count(&port["port"])));
            }
        }
    }
    vec![few(&all), age(value, now)]
}

pub(super) fn slice(value: &Value, now: Timestamp) -> Vec<Value> {
    let ports: Vec<String> = list(&value["ports"])
        .iter()
        .map(|p| p["port"].as_i64().map_or("*".to_owned(), |n| n.to_string()))
        .collect();
    let addresses: Vec<String> = list(&value["endpoints"])
        .iter()
        .flat_map(|e| list(&e["addresses"]))
        .map(|a| string(a).to_owned())
        .collect();
    let ports = if ports.is_empty() { json!("<unset>") } else { few(&ports) };
    let addresses = if addresses.is_empty() { json!("<unset>") } else { few(&addresses) };
    vec![value["addressType"].clone(), ports, addresses, age(value, now)]
}

pub(super) fn event(value: &Value, now: Timestamp) -> Vec<Value> {
    let object = &value["involvedObject"];
    let last = [&value["series"]["lastObservedTime"], &value["lastTimestamp"], &value["eventTime"]]
        .into_iter()
        .find(|t| !t.is_null())
        .unwrap_or(&value["metadata"]["creationTimestamp"]);
    let first = [&value["firstTimestamp"], &value["eventTime"]]
        .into_iter()
        .find(|t| !t.is_null())
        .unwrap_or(&value["metadata"]["creationTimestamp"]);
    let source = match (string(&value["source"]["component"]), string(&value["source"]["host"])) {
        ("", _) => string(&value["reportingComponent"]).to_owned(),
        (component, "") => component.to_owned(),
        (component, host) => format!("{component}, {host}"),
    };
    let kind = string(&object["kind"]).to_lowercase();
    vec![
        json!(since(last, now)),
        value["type"].clone(),
        value["reason"].clone(),
        json!(format!("{kind}/{}", string(&object["name"]))),
        json!(string(&object["fieldPath"])),
        json!(source),
        json!(string(&value["message"]).trim()),
        json!(since(first, now)),
        json!(
            value["series"]["count"].as_i64().or(value["count"].as_i64()).unwrap_or(1).to_string()
        ),
    ]
}
