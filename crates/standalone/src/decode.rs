//! From what a client sent to an object of its kind: types, unknown fields.

use serde_json::Value;

use crate::error::ApiError;
use crate::kinds::{Decoded, Kind};

/// Reads `value` as an object of `kind`.
///
/// # Errors
/// 400 with the path of the first field of a wrong type.
pub(crate) fn decode(kind: &Kind, value: &Value) -> Result<Decoded, ApiError> {
    (kind.decode)(value).map_err(|error| {
        let (path, text) = (error.path().to_string(), error.inner().to_string());
        ApiError::bad_request(format!(
            "{kind} in version \"{version}\" cannot be handled as a {kind}: {path}: {text}",
            kind = kind.kind,
            version = kind.version,
        ))
    })
}

/// `spec.containers.0.foo` as Kubernetes writes it: `spec.containers[0].foo`. serde_ignored marks an
/// optional field with `?`, which is no part of a name.
pub(crate) fn path_text(path: &str) -> String {
    let mut text = String::new();
    for segment in path.split('.').filter(|s| *s != "?" && !s.is_empty()) {
        if segment.bytes().all(|b| b.is_ascii_digit()) {
            text.push_str(&format!("[{segment}]"));
        } else {
            if !text.is_empty() {
                text.push('.');
            }
            text.push_str(segment);
        }
    }
    text
}
