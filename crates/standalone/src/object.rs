//! One stored version of one object: its JSON, and beside it only what selectors look at.
//!
//! A parsed tree costs about ten times its text, so objects stay text until somebody changes them.
//! Lists and watches send the text as it is.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::kinds::Kind;

/// One version of one object. Immutable; shared by reference count.
#[derive(Debug)]
pub struct Object {
    /// What it is.
    pub kind: &'static Kind,
    /// Empty for objects without a namespace.
    pub namespace: Box<str>,
    /// `metadata.name`.
    pub name: Box<str>,
    /// `metadata.resourceVersion`.
    pub revision: u64,
    /// The whole object as JSON.
    pub json: Bytes,
    /// `metadata.labels`.
    pub labels: Box<[(Box<str>, Box<str>)]>,
    /// The fields that field selectors of this kind may name.
    pub fields: Box<[(&'static str, Box<str>)]>,
}

impl Object {
    /// Takes an object apart; `value.metadata.resourceVersion` must already be `revision`.
    pub(crate) fn new(kind: &'static Kind, revision: u64, value: &Value) -> Self {
        let meta = &value["metadata"];
        let text = |v: &Value| v.as_str().unwrap_or_default().into();
        let labels = meta["labels"]
            .as_object()
            .map(|map| map.iter().map(|(k, v)| (k.as_str().into(), text(v))).collect())
            .unwrap_or_default();
        Self {
            kind,
            namespace: text(&meta["namespace"]),
            name: text(&meta["name"]),
            revision,
            json: serde_json::to_vec(value).unwrap_or_default().into(),
            labels,
            fields: crate::selectors::selectable_fields(kind, value),
        }
    }

    /// The object as a tree.
    #[must_use]
    pub fn value(&self) -> Value {
        serde_json::from_slice(&self.json).unwrap_or_default()
    }

    /// The object as a type of `k8s-openapi`.
    ///
    /// # Errors
    /// When the object is not of that type.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.json)
    }

    /// `namespace/name`, or the name alone.
    pub(crate) fn key(&self) -> String {
        key(&self.namespace, &self.name)
    }
}

/// The key of an object within its kind. Names hold no slash, so the two forms cannot meet.
pub(crate) fn key(namespace: &str, name: &str) -> String {
    if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") }
}
