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
        let text = error.to_string();
        let path = culprit(kind, value, &text);
        ApiError::bad_request(format!(
            "{kind} in version \"{version}\" cannot be handled as a {kind}: {path}: {text}",
            kind = kind.kind,
            version = kind.version,
        ))
    })
}

/// The path of the field that `error` speaks of: the one without which the error is gone.
fn culprit(kind: &Kind, value: &Value, error: &str) -> String {
    let mut at = String::new();
    let mut pointer = String::new();
    loop {
        let step = children(value.pointer(&pointer)).into_iter().find(|(segment, _)| {
            let mut without = value.clone();
            remove(&mut without, &pointer, segment);
            (kind.decode)(&without).err().is_none_or(|other| other.to_string() != error)
        });
        let Some((segment, is_index)) = step else { break };
        if is_index {
            at.push_str(&format!("[{segment}]"));
        } else {
            if !at.is_empty() {
                at.push('.');
            }
            at.push_str(&segment);
        }
        pointer.push('/');
        pointer.push_str(&segment.replace('~', "~0").replace('/', "~1"));
    }
    at
}

fn children(value: Option<&Value>) -> Vec<(String, bool)> {
    match value {
        Some(Value::Object(map)) => map.keys().map(|k| (k.clone(), false)).collect(),
        Some(Value::Array(list)) => (0..list.len()).map(|i| (i.to_string(), true)).collect(),
        _ => Vec::new(),
    }
}

/// Takes one child away; a list's element becomes null, so that its neighbours keep their index.
fn remove(value: &mut Value, parent: &str, segment: &str) {
    match value.pointer_mut(parent) {
        Some(Value::Object(map)) => drop(map.remove(segment)),
        Some(Value::Array(list)) => {
            if let Ok(index) = segment.parse::<usize>()
                && index < list.len()
            {
                list.remove(index);
            }
        }
        _ => {}
    }
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
