//! Which ReplicaSet carries the present template, and the bookkeeping of revisions that `kubectl rollout` reads.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};

use serde_json::{Map, Value};

use crate::controllers::ownership::controller_reference;

pub(crate) const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub(crate) const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";
pub(crate) const HASH_LABEL: &str = "pod-template-hash";
/// Annotations of the Deployment that must not be copied to its ReplicaSets.
const OWN_ANNOTATIONS: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
    "deprecated.deployment.rollback.to",
];

/// The ReplicaSet whose template is the Deployment's; the oldest if several are.
pub(crate) fn current<'a>(
    deployment: &Deployment,
    sets: &'a [Arc<ReplicaSet>],
) -> Option<&'a Arc<ReplicaSet>> {
    let wanted = canonical(&deployment.spec.as_ref()?.template);
    let same = |set: &&Arc<ReplicaSet>| {
        let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
        template.map(canonical).as_ref() == Some(&wanted)
    };
    sets.iter().filter(same).min_by_key(|set| age_order(&set.metadata))
}

/// Oldest first, names break ties.
pub(crate) fn age_order(meta: &ObjectMeta) -> (Option<k8s_openapi::jiff::Timestamp>, String) {
    (meta.creation_timestamp.as_ref().map(|time| time.0), meta.name.clone().unwrap_or_default())
}

/// Fields of a pod template that are plain booleans and numbers upstream, so that zero and absent are the same. Others
/// are pointers there, and an explicit zero means something.
const PLAIN: [&str; 9] = [
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "hostPort",
    "initialDelaySeconds",
    "readOnly",
    "stdin",
    "stdinOnce",
    "tty",
];
/// Maps of names to values: empty and absent are the same. Other empty objects mean something (`emptyDir: {}`).
const MAPS: [&str; 6] =
    ["annotations", "labels", "limits", "matchLabels", "nodeSelector", "requests"];

/// The template as JSON, equal for templates that mean the same: what one client writes out, another leaves away
/// (kubectl does both: `create` sends `tty: false`, `rollout undo` sends the same template without it).
fn canonical(template: &PodTemplateSpec) -> Value {
    let mut value = serde_json::to_value(template).unwrap_or_default();
    if let Some(meta) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        meta.remove("creationTimestamp");
        if let Some(labels) = meta.get_mut("labels").and_then(Value::as_object_mut) {
            labels.remove(HASH_LABEL);
        }
    }
    prune(&mut value);
    if value["metadata"].as_object().is_some_and(Map::is_empty) {
        value["metadata"] = Value::Null;
    }
    value
}

fn prune(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(prune),
        Value::Object(fields) => {
            fields.values_mut().for_each(prune);
            fields.retain(|name, value| !is_absent(name, value));
        }
        _ => {}
    }
}

fn is_absent(name: &str, value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Bool(flag) => !flag && PLAIN.contains(&name),
        Value::Number(number) => number.as_i64() == Some(0) && PLAIN.contains(&name),
        Value::Object(fields) => fields.is_empty() && MAPS.contains(&name),
    }
}

/// The revision that an object's annotation states, 0 without one.
pub(crate) fn revision(meta: &ObjectMeta) -> i64 {
    annotation(meta, REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// The number of replicas for which the set was last scaled.
pub(crate) fn desired_replicas(meta: &ObjectMeta) -> Option<i32> {
    annotation(meta, DESIRED_REPLICAS).and_then(|text| text.parse().ok())
}

/// The ceiling (with surge) for which the set was last scaled.
pub(crate) fn max_replicas(meta: &ObjectMeta) -> Option<i32> {
    annotation(meta, MAX_REPLICAS).and_then(|text| text.parse().ok())
}

fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a String> {
    meta.annotations.as_ref()?.get(key)
}

/// Notes in a set's annotations for how many replicas it was scaled. Returns whether that changed anything.
pub(crate) fn note_replicas(meta: &mut ObjectMeta, desired: i32, ceiling: i32) -> bool {
    let annotations = meta.annotations.get_or_insert_default();
    let mut changed = false;
    for (key, number) in [(DESIRED_REPLICAS, desired), (MAX_REPLICAS, ceiling)] {
        let text = number.to_string();
        changed |= annotations.insert(key.to_owned(), text.clone()) != Some(text);
    }
    changed
}

/// Gives the current set its revision number (one above all others) and the Deployment's annotations.
/// Returns whether anything changed.
pub(crate) fn note_revision(set: &mut ObjectMeta, deployment: &ObjectMeta, newest: i64) -> bool {
    let before = set.annotations.clone();
    let old = revision(set);
    let annotations = set.annotations.get_or_insert_default();
    for (key, value) in deployment.annotations.iter().flatten() {
        if !OWN_ANNOTATIONS.contains(&key.as_str()) {
            annotations.insert(key.clone(), value.clone());
        }
    }
    if old < newest {
        if old > 0 {
            let history = annotations.entry(REVISION_HISTORY.to_owned()).or_default();
            let separator = if history.is_empty() { "" } else { "," };
            history.push_str(&format!("{separator}{old}"));
        }
        annotations.insert(REVISION.to_owned(), newest.to_string());
    }
    set.annotations != before
}

/// The ReplicaSet for the Deployment's present template.
pub(crate) fn new_set(deployment: &Deployment, newest: i64) -> ReplicaSet {
    let spec = deployment.spec.clone().unwrap_or_default();
    let collisions = deployment.status.as_ref().and_then(|status| status.collision_count);
    let hash = template_hash(&spec.template, collisions);
    let mut template = spec.template;
    let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
    labels.insert(HASH_LABEL.to_owned(), hash.clone());
    let labels = labels.clone();
    let mut selector: LabelSelector = spec.selector;
    selector.match_labels.get_or_insert_default().insert(HASH_LABEL.to_owned(), hash.clone());
    let mut metadata = ObjectMeta {
        name: Some(format!("{}-{hash}", deployment.metadata.name.as_deref().unwrap_or_default())),
        namespace: deployment.metadata.namespace.clone(),
        labels: Some(labels),
        owner_references: Some(vec![controller_reference::<Deployment>(&deployment.metadata)]),
        ..ObjectMeta::default()
    };
    note_revision(&mut metadata, &deployment.metadata, newest);
    ReplicaSet {
        metadata,
        spec: Some(ReplicaSetSpec {
            replicas: Some(0),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        }),
        status: None,
    }
}

/// A short name for a template: FNV-1a over its canonical JSON, in the letters that Kubernetes uses in generated names.
pub(crate) fn template_hash(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    const OFFSET: u32 = 0x811c_9dc5;
    const PRIME: u32 = 0x0100_0193;
    let text = serde_json::to_vec(&canonical(template)).unwrap_or_default();
    let salt = collisions.map(i32::to_le_bytes);
    let bytes = text.iter().chain(salt.iter().flatten());
    let hash = bytes.fold(OFFSET, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(PRIME));
    // No vowels and no digits that look like them (apimachinery's rand.SafeEncodeString).
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    hash.to_string().bytes().map(|b| char::from(LETTERS[usize::from(b) % LETTERS.len()])).collect()
}
