//! Requests in Kubernetes' protobuf encoding, which kubectl uses for `kubectl create <kind>`.
//!
//! A body is the four bytes `k8s\0` and an envelope (`runtime.Unknown`) around the object. Only the messages that such
//! commands send are known here, by tables of their field numbers; an object with any other field is refused, never
//! stored without it. Everything else that talks to this server uses JSON.

mod schema;
mod wire;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use schema::Kind::{BytesMap, Integer, QuantityMap, Text, TextMap};
use schema::{Field, Kind, message_of, one};
use wire::{Fields, Wire};

/// What a protobuf body starts with.
const MAGIC: &[u8] = b"k8s\0";

/// How deep messages may be nested.
const MAX_DEPTH: u8 = 16;

/// Turns a body into the JSON that it stands for.
///
/// # Errors
/// What is not understood.
pub(super) fn to_json(body: &[u8]) -> Result<Value, String> {
    let body = body.strip_prefix(MAGIC).ok_or("the body does not start with k8s\\0")?;
    let (mut type_meta, mut raw): (&[u8], &[u8]) = (&[], &[]);
    for (number, value) in Fields(body).collect::<Result<Vec<_>, _>>()? {
        match (number, value) {
            (1, Wire::Bytes(bytes)) => type_meta = bytes,
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let type_meta =
        decode(type_meta, &[one(1, "apiVersion", Text), one(2, "kind", Text)], "TypeMeta", 0)?;
    let word =
        |name: &str| type_meta.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (api_version, kind) = (word("apiVersion"), word("kind"));
    let fields = message_of(&api_version, &kind)
        .ok_or_else(|| format!("{api_version} {kind} is not known in protobuf, send JSON"))?;
    let mut object = decode(raw, fields, &kind, 0)?;
    object.insert("apiVersion".into(), api_version.into());
    object.insert("kind".into(), kind.into());
    Ok(Value::Object(object))
}

fn decode(
    message: &[u8],
    fields: &[Field],
    at: &str,
    depth: u8,
) -> Result<Map<String, Value>, String> {
    if depth > MAX_DEPTH {
        return Err(format!("{at}: messages are nested too deeply"));
    }
    let mut object = Map::new();
    for entry in Fields(message) {
        let (number, wire) = entry.map_err(|e| format!("{at}: {e}"))?;
        let field = fields.iter().find(|field| field.number == number);
        let field = field
            .ok_or_else(|| format!("{at}: field {number} is not known in protobuf, send JSON"))?;
        let path = format!("{at}.{}", field.name);
        match field.kind {
            TextMap | BytesMap | QuantityMap => {
                let (key, value) = map_entry(wire, field.kind, &path)?;
                let map = object.entry(field.name).or_insert_with(|| json!({}));
                map[key] = value;
            }
            _ => {
                let Some(value) = value_of(wire, field.kind, &path, depth)? else { continue };
                let is_zero = value == json!(0) || value == json!(false);
                if is_zero && !field.pointer && !field.repeated {
                    continue;
                }
                if field.repeated {
                    let list = object.entry(field.name).or_insert_with(|| json!([]));
                    list.as_array_mut().ok_or("not a list")?.push(value);
                } else {
                    object.insert(field.name.into(), value);
                }
            }
        }
    }
    Ok(object)
}

/// `None` for what JSON leaves out: an empty text, an empty message, an ignored field.
fn value_of(wire: Wire<'_>, kind: Kind, at: &str, depth: u8) -> Result<Option<Value>, String> {
    let wrong = || format!("{at}: not of the expected type");
    Ok(match (kind, wire) {
        (Kind::Ignored, _) => None,
        (Kind::Integer, Wire::Number(number)) => Some(number.cast_signed().into()),
        (Kind::Bool, Wire::Number(number)) => Some((number != 0).into()),
        (Kind::Text, Wire::Bytes(bytes)) => {
            Some(text(bytes, at)?).filter(|t| !t.is_empty()).map(Value::from)
        }
        (Kind::Bytes, Wire::Bytes(bytes)) => Some(STANDARD.encode(bytes).into()),
        (Kind::Quantity, Wire::Bytes(bytes)) => {
            decode(bytes, &[one(1, "string", Text)], at, depth + 1)?.remove("string")
        }
        (Kind::IntOrString, Wire::Bytes(bytes)) => {
            const FIELDS: &[Field] =
                &[one(1, "type", Integer), one(2, "int", Integer), one(3, "text", Text)];
            let mut parts = decode(bytes, FIELDS, at, depth + 1)?;
            let is_text = parts.get("type").and_then(Value::as_i64) == Some(1);
            if is_text {
                parts.remove("text")
            } else {
                Some(parts.remove("int").unwrap_or_else(|| 0.into()))
            }
        }
        (Kind::Message(fields), Wire::Bytes(bytes)) => {
            Some(decode(bytes, fields, at, depth + 1)?).filter(|m| !m.is_empty()).map(Value::Object)
        }
        _ => return Err(wrong()),
    })
}

fn map_entry(wire: Wire<'_>, kind: Kind, at: &str) -> Result<(String, Value), String> {
    let Wire::Bytes(entry) = wire else { return Err(format!("{at}: not a map")) };
    let inner = match kind {
        BytesMap => Kind::Bytes,
        QuantityMap => Kind::Quantity,
        _ => Text,
    };
    let (mut key, mut value) = (String::new(), Value::from(""));
    for field in Fields(entry) {
        match field.map_err(|e| format!("{at}: {e}"))? {
            (1, Wire::Bytes(bytes)) => key = text(bytes, at)?,
            (2, wire) => value = value_of(wire, inner, at, 0)?.unwrap_or_else(|| "".into()),
            _ => return Err(format!("{at}: not a map")),
        }
    }
    Ok((key, value))
}

fn text(bytes: &[u8], at: &str) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| format!("{at}: not UTF-8"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
        bytes.extend_from_slice(content);
        bytes
    }

    fn body(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let type_meta = [field(1, api_version.as_bytes()), field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), field(1, &type_meta), field(2, raw), field(3, b""), field(4, b"")].concat()
    }

    #[test]
    fn a_secret_as_kubectl_sends_it() {
        let meta = [field(1, b"s"), field(3, b"default"), field(8, b"")].concat();
        let entry = [field(1, b"user"), field(2, b"me")].concat();
        let raw = [field(1, &meta), field(2, &entry), field(3, b"Opaque")].concat();
        let want = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "default"},
            "data": {"user": "bWU="}, "type": "Opaque",
        });
        assert_eq!(to_json(&body("v1", "Secret", &raw)).unwrap(), want);
    }

    #[test]
    fn zeros_are_left_out_unless_zero_means_something() {
        // Deployment.spec: replicas (a pointer) and minReadySeconds, both 0.
        let spec = field(2, &[1 << 3, 0, 5 << 3, 0]);
        let deployment = to_json(&body("apps/v1", "Deployment", &spec)).unwrap();
        assert_eq!(deployment["spec"], json!({ "replicas": 0 }));
        // Pod.spec: hostNetwork false, automountServiceAccountToken false (a pointer).
        let spec = field(2, &[11 << 3, 0, 0xa8, 1, 0]);
        let pod = to_json(&body("v1", "Pod", &spec)).unwrap();
        assert_eq!(pod["spec"], json!({ "automountServiceAccountToken": false }));
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let error = to_json(&body("v1", "Secret", &field(9, b"x"))).unwrap_err();
        assert!(error.contains("Secret: field 9"), "{error}");
        let error = to_json(&body("batch/v1", "Job", b"")).unwrap_err();
        assert!(error.contains("batch/v1 Job"), "{error}");
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(to_json(&body("apps/v1", "Deployment", &bytes[..bytes.len().min(100)])));
            drop(to_json(&[MAGIC, &bytes].concat()));
        }
    }
}
