//! What is left in a namespace that is being deleted, as conditions.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::NamespaceCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;

use crate::Object;
use crate::kinds::Kind;

/// The objects that are left, by resource and by finalizer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Remains {
    resources: BTreeMap<String, usize>,
    finalizers: BTreeMap<String, usize>,
}

/// Only the metadata: this works on kinds whose types it does not know.
#[derive(Deserialize)]
struct Partial {
    #[serde(default)]
    metadata: ObjectMeta,
}

/// Whether the object is being deleted already.
pub(crate) fn is_deleting(object: &Object) -> bool {
    object.parse::<Partial>().is_ok_and(|partial| partial.metadata.deletion_timestamp.is_some())
}

impl Remains {
    pub(crate) fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    pub(crate) fn add(&mut self, kind: &Kind, objects: &[Arc<Object>]) {
        if objects.is_empty() {
            return;
        }
        self.resources.insert(kind.qualified(), objects.len());
        for object in objects {
            let finalizers = object.parse::<Partial>().ok().and_then(|it| it.metadata.finalizers);
            for finalizer in finalizers.unwrap_or_default() {
                *self.finalizers.entry(finalizer).or_default() += 1;
            }
        }
    }
}

/// The conditions that say so, in the words of Kubernetes. Times are kept where a condition stays as it was.
pub(crate) fn conditions(
    held: Vec<NamespaceCondition>,
    remains: &Remains,
    now: Timestamp,
) -> Vec<NamespaceCondition> {
    let list = |map: &BTreeMap<String, usize>, text: &str| {
        let parts: Vec<String> = map
            .iter()
            .map(|(name, count)| format!("{name} {text} {count} resource instances"))
            .collect();
        parts.join(", ")
    };
    let resources = list(&remains.resources, "has");
    let finalizers = list(&remains.finalizers, "in");
    let content = if remains.resources.is_empty() {
        ("False", "ContentRemoved", "All content successfully removed".to_owned())
    } else {
        ("True", "SomeResourcesRemain", format!("Some resources are remaining: {resources}"))
    };
    let held_back = if remains.finalizers.is_empty() {
        ("False", "ContentHasNoFinalizers", "All content-preserving finalizers finished".to_owned())
    } else {
        let text = format!("Some content in the namespace has finalizers remaining: {finalizers}");
        ("True", "SomeFinalizersRemain", text)
    };
    let deleted = "All content successfully deleted, may be waiting on finalization";
    let wanted = [
        (
            "NamespaceDeletionDiscoveryFailure",
            ("False", "ResourcesDiscovered", "All resources successfully discovered".to_owned()),
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            (
                "False",
                "ParsedGroupVersions",
                "All legacy kube types successfully parsed".to_owned(),
            ),
        ),
        ("NamespaceDeletionContentFailure", ("False", "ContentDeleted", deleted.to_owned())),
        ("NamespaceContentRemaining", content),
        ("NamespaceFinalizersRemaining", held_back),
    ];
    wanted
        .into_iter()
        .map(|(kind, (status, reason, message))| {
            let before = held.iter().find(|held| held.type_ == kind && held.status == status);
            let since = before.and_then(|held| held.last_transition_time.clone());
            NamespaceCondition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason: Some(reason.to_owned()),
                message: Some(message),
                last_transition_time: Some(since.unwrap_or(Time(now))),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_named() {
        let now = Timestamp::UNIX_EPOCH;
        let remains = Remains {
            resources: BTreeMap::from([("pods".into(), 2), ("deployments.apps".into(), 1)]),
            finalizers: BTreeMap::from([("x/y".into(), 1)]),
        };
        let found = conditions(Vec::new(), &remains, now);
        let texts: Vec<_> = found[3..].iter().map(|c| c.message.as_deref().unwrap()).collect();
        assert_eq!(
            texts,
            [
                "Some resources are remaining: deployments.apps has 1 resource instances, pods has 2 resource instances",
                "Some content in the namespace has finalizers remaining: x/y in 1 resource instances",
            ]
        );
        let later = now + k8s_openapi::jiff::SignedDuration::from_secs(9);
        assert_eq!(conditions(found.clone(), &remains, later), found);
        let done = conditions(found, &Remains::default(), later);
        assert_eq!(done[3].reason.as_deref(), Some("ContentRemoved"));
        assert_eq!(done[3].last_transition_time, Some(Time(later)));
    }
}
