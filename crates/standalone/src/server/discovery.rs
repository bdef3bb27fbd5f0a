//! Which kinds there are, as clients ask for it.

use http::StatusCode;
use serde_json::{Value, json};

use super::{Reply, body};
use crate::kinds::{self, Kind};

/// The version that clients are told.
pub(super) const GIT_VERSION: &str = concat!("v1.36.0+keelson-", env!("CARGO_PKG_VERSION"));

const ALL_VERBS: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// Groups without stored kinds: (group, version, plural, kind, namespaced).
const REVIEWS: &[(&str, &str, &str, bool)] = &[
    ("authentication.k8s.io", "selfsubjectreviews", "SelfSubjectReview", false),
    ("authentication.k8s.io", "tokenreviews", "TokenReview", false),
    ("authorization.k8s.io", "localsubjectaccessreviews", "LocalSubjectAccessReview", true),
    ("authorization.k8s.io", "selfsubjectaccessreviews", "SelfSubjectAccessReview", false),
    ("authorization.k8s.io", "selfsubjectrulesreviews", "SelfSubjectRulesReview", false),
    ("authorization.k8s.io", "subjectaccessreviews", "SubjectAccessReview", false),
];

/// One line of a resource list.
struct Entry {
    name: String,
    kind: &'static str,
    namespaced: bool,
    verbs: &'static [&'static str],
    /// Set for entries that speak another group's kind.
    other: Option<(&'static str, &'static str)>,
    of: Option<&'static Kind>,
}

pub(super) fn version() -> Value {
    json!({
        "major": "1", "minor": "36", "gitVersion": GIT_VERSION, "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "2026-11-01T00:00:00Z", "goVersion": "none", "compiler": "rustc",
        "platform": concat!("linux/", "amd64"),
    })
}

pub(super) fn root() -> Value {
    let mut paths = vec!["/api".to_owned(), "/api/v1".to_owned(), "/apis".to_owned()];
    for group in groups() {
        paths.push(format!("/apis/{group}"));
        paths.push(format!("/apis/{group}/v1"));
    }
    for path in ["/healthz", "/livez", "/readyz", "/openapi/v2", "/openapi/v3", "/version"] {
        paths.push(path.to_owned());
    }
    json!({"paths": paths})
}

/// All named groups; each has the one version v1.
pub(super) fn groups() -> Vec<&'static str> {
    let stored = kinds::all().iter().map(|k| k.group).filter(|g| !g.is_empty());
    let mut found: Vec<_> = stored.chain(REVIEWS.iter().map(|r| r.0)).chain(["policy"]).collect();
    found.sort_unstable();
    found.dedup();
    found
}

pub(super) fn document(path: &str, accept: &str) -> Option<Reply> {
    let aggregated = accept.contains("as=APIGroupDiscoveryList") && accept.contains("v=v2;");
    let segments: Vec<&str> = path.split('/').filter(|s| !s.is_empty()).collect();
    let found = match segments.as_slice() {
        ["api"] if aggregated => return Some(aggregate(&[""])),
        ["apis"] if aggregated => return Some(aggregate(&groups())),
        ["api"] => json!({
            "kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [],
        }),
        ["apis"] => json!({
            "kind": "APIGroupList", "apiVersion": "v1",
            "groups": groups().into_iter().map(group).collect::<Vec<_>>(),
        }),
        ["apis", name] if groups().contains(name) => {
            let mut found = group(name);
            found["kind"] = "APIGroup".into();
            found["apiVersion"] = "v1".into();
            found
        }
        ["api", "v1"] => resources(""),
        ["apis", name, "v1"] if groups().contains(name) => resources(name),
        _ => return None,
    };
    Some(body::json(StatusCode::OK, &found))
}

fn group(name: &str) -> Value {
    let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
    json!({"name": name, "versions": [version], "preferredVersion": version})
}

fn group_version(group: &str) -> String {
    if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") }
}

fn resources(group: &str) -> Value {
    let list: Vec<_> = entries(group).iter().map(line).collect();
    json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version(group),
        "resources": list,
    })
}

fn line(entry: &Entry) -> Value {
    let mut line = json!({
        "name": entry.name, "singularName": entry.of.map(|k| k.singular).unwrap_or_default(),
        "namespaced": entry.namespaced, "kind": entry.kind, "verbs": entry.verbs,
    });
    if let Some((group, version)) = entry.other {
        line["group"] = group.into();
        line["version"] = version.into();
    }
    if let Some(kind) = entry.of {
        if !kind.short.is_empty() {
            line["shortNames"] = json!(kind.short);
        }
        if kind.in_all {
            line["categories"] = json!(["all"]);
        }
    }
    line
}

fn entries(group: &str) -> Vec<Entry> {
    let mut found = Vec::new();
    for kind in kinds::all().iter().copied().filter(|k| k.group == group) {
        found.push(Entry {
            name: kind.plural.to_owned(),
            kind: kind.kind,
            namespaced: kind.namespaced,
            verbs: ALL_VERBS,
            other: None,
            of: Some(kind),
        });
        found.extend(subresources(kind));
    }
    for (_, plural, kind, namespaced) in REVIEWS.iter().filter(|r| r.0 == group) {
        found.push(Entry {
            name: (*plural).to_owned(),
            kind,
            namespaced: *namespaced,
            verbs: &["create"],
            other: None,
            of: None,
        });
    }
    found
}

fn subresources(kind: &'static Kind) -> Vec<Entry> {
    let entry = |sub: &str, shown, verbs, other| Entry {
        name: format!("{}/{sub}", kind.plural),
        kind: shown,
        namespaced: kind.namespaced,
        verbs,
        other,
        of: None,
    };
    let mut found = Vec::new();
    if kind.has_status {
        found.push(entry("status", kind.kind, &["get", "patch", "update"], None));
    }
    if *kind == kinds::POD {
        const CONNECT: &[&str] = &["create", "get"];
        found.push(entry("attach", "PodAttachOptions", CONNECT, None));
        found.push(entry("binding", "Binding", &["create"], None));
        found.push(entry("ephemeralcontainers", "Pod", &["get", "patch", "update"], None));
        found.push(entry("eviction", "Eviction", &["create"], Some(("policy", "v1"))));
        found.push(entry("exec", "PodExecOptions", CONNECT, None));
        found.push(entry("log", "Pod", &["get"], None));
        found.push(entry("portforward", "PodPortForwardOptions", CONNECT, None));
    } else if *kind == kinds::DEPLOYMENT || *kind == kinds::REPLICA_SET {
        let verbs = &["get", "patch", "update"];
        found.push(entry("scale", "Scale", verbs, Some(("autoscaling", "v1"))));
    } else if *kind == kinds::SERVICE_ACCOUNT {
        let other = Some(("authentication.k8s.io", "v1"));
        found.push(entry("token", "TokenRequest", &["create"], other));
    } else if *kind == kinds::NODE {
        found.push(entry(
            "proxy",
            "NodeProxyOptions",
            &["create", "delete", "get", "update"],
            None,
        ));
    } else if *kind == kinds::NAMESPACE {
        found.push(entry("finalize", "Namespace", &["update"], None));
    }
    found
}

/// Everything about several groups in one answer, which spares kubectl a request per group.
fn aggregate(groups: &[&str]) -> Reply {
    let items: Vec<_> = groups.iter().map(|group| aggregated_group(group)).collect();
    let list = json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {},
        "items": items,
    });
    let media = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    body::bytes(StatusCode::OK, media, list.to_string())
}

fn aggregated_group(group: &str) -> Value {
    let mut resources: Vec<Value> = Vec::new();
    for entry in entries(group) {
        let (of_group, of_version) = entry.other.unwrap_or((
            entry.of.map_or(if entry.name.contains('/') { "" } else { group }, |k| k.group),
            "v1",
        ));
        let response = json!({"group": of_group, "version": of_version, "kind": entry.kind});
        if let Some((_, sub)) = entry.name.split_once('/') {
            let sub = json!({"subresource": sub, "responseKind": response, "verbs": entry.verbs});
            if let Some(list) = resources.last_mut().map(|r| &mut r["subresources"]) {
                match list.as_array_mut() {
                    Some(list) => list.push(sub),
                    None => *list = json!([sub]),
                }
            }
            continue;
        }
        let mut item = line(&entry);
        let scope = if entry.namespaced { "Namespaced" } else { "Cluster" };
        item["resource"] = entry.name.clone().into();
        item["responseKind"] = response;
        item["scope"] = scope.into();
        item["singularResource"] = item["singularName"].take();
        if let Some(map) = item.as_object_mut() {
            for key in ["name", "namespaced", "kind", "singularName", "group", "version"] {
                map.remove(key);
            }
        }
        resources.push(item);
    }
    json!({
        "metadata": {"name": group, "creationTimestamp": null},
        "versions": [{"version": "v1", "freshness": "Current", "resources": resources}],
    })
}
