//! Requests in Kubernetes' protobuf encoding, which kubectl uses for `kubectl create <kind>`.
//!
//! A body is the four bytes `k8s\0` and an envelope (`runtime.Unknown`) around the object. Only the messages that such
//! commands send are known here, by tables of their field numbers; an object with any other field is refused, never
//! stored without it. Everything else that talks to this server uses JSON.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

/// What a protobuf body starts with.
const MAGIC: &[u8] = b"k8s\0";

/// How deep messages may be nested.
const MAX_DEPTH: u8 = 16;

/// What a field holds.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Integer,
    Bool,
    /// A number or a text (`intstr.IntOrString`).
    IntOrString,
    /// `resource.Quantity`: a message around a text.
    Quantity,
    /// Base64 in JSON.
    Bytes,
    Message(&'static [Field]),
    /// Map values are texts.
    TextMap,
    BytesMap,
    QuantityMap,
    /// Of no meaning in a request (status, timestamps).
    Ignored,
}

struct Field {
    number: u64,
    name: &'static str,
    kind: Kind,
    repeated: bool,
}

const fn one(number: u64, name: &'static str, kind: Kind) -> Field {
    Field { number, name, kind, repeated: false }
}

const fn many(number: u64, name: &'static str, kind: Kind) -> Field {
    Field { number, name, kind, repeated: true }
}

use Kind::{Bool, BytesMap, Ignored, IntOrString, Integer, Message, QuantityMap, Text, TextMap};

const OBJECT_META: &[Field] = &[
    one(1, "name", Text),
    one(2, "generateName", Text),
    one(3, "namespace", Text),
    one(4, "selfLink", Ignored),
    one(5, "uid", Text),
    one(6, "resourceVersion", Text),
    one(7, "generation", Ignored),
    one(8, "creationTimestamp", Ignored),
    one(11, "labels", TextMap),
    one(12, "annotations", TextMap),
    many(14, "finalizers", Text),
    many(17, "managedFields", Ignored),
];

const LOCAL_REFERENCE: &[Field] = &[one(1, "name", Text)];

const OBJECT_REFERENCE: &[Field] = &[
    one(1, "kind", Text),
    one(2, "namespace", Text),
    one(3, "name", Text),
    one(4, "uid", Text),
    one(5, "apiVersion", Text),
    one(6, "resourceVersion", Text),
    one(7, "fieldPath", Text),
];

const LABEL_SELECTOR: &[Field] = &[
    one(1, "matchLabels", TextMap),
    many(
        2,
        "matchExpressions",
        Message(&[one(1, "key", Text), one(2, "operator", Text), many(3, "values", Text)]),
    ),
];

const CONTAINER: &[Field] = &[
    one(1, "name", Text),
    one(2, "image", Text),
    many(3, "command", Text),
    many(4, "args", Text),
    one(5, "workingDir", Text),
    many(
        6,
        "ports",
        Message(&[
            one(1, "name", Text),
            one(2, "hostPort", Integer),
            one(3, "containerPort", Integer),
            one(4, "protocol", Text),
            one(5, "hostIP", Text),
        ]),
    ),
    many(7, "env", Message(&[one(1, "name", Text), one(2, "value", Text)])),
    one(8, "resources", Message(&[one(1, "limits", QuantityMap), one(2, "requests", QuantityMap)])),
    one(13, "terminationMessagePath", Text),
    one(14, "imagePullPolicy", Text),
    one(16, "stdin", Bool),
    one(17, "stdinOnce", Bool),
    one(18, "tty", Bool),
    one(20, "terminationMessagePolicy", Text),
];

const POD_SPEC: &[Field] = &[
    many(2, "containers", Message(CONTAINER)),
    one(3, "restartPolicy", Text),
    one(4, "terminationGracePeriodSeconds", Integer),
    one(5, "activeDeadlineSeconds", Integer),
    one(6, "dnsPolicy", Text),
    one(7, "nodeSelector", TextMap),
    one(8, "serviceAccountName", Text),
    one(9, "serviceAccount", Text),
    one(10, "nodeName", Text),
    one(11, "hostNetwork", Bool),
    one(12, "hostPID", Bool),
    one(13, "hostIPC", Bool),
    many(15, "imagePullSecrets", Message(LOCAL_REFERENCE)),
    one(16, "hostname", Text),
    one(17, "subdomain", Text),
    one(19, "schedulerName", Text),
    many(20, "initContainers", Message(CONTAINER)),
    one(21, "automountServiceAccountToken", Bool),
    one(24, "priorityClassName", Text),
    one(29, "runtimeClassName", Text),
];

const POD_TEMPLATE: &[Field] =
    &[one(1, "metadata", Message(OBJECT_META)), one(2, "spec", Message(POD_SPEC))];

const DEPLOYMENT_SPEC: &[Field] = &[
    one(1, "replicas", Integer),
    one(2, "selector", Message(LABEL_SELECTOR)),
    one(3, "template", Message(POD_TEMPLATE)),
    one(
        4,
        "strategy",
        Message(&[
            one(1, "type", Text),
            one(
                2,
                "rollingUpdate",
                Message(&[one(1, "maxUnavailable", IntOrString), one(2, "maxSurge", IntOrString)]),
            ),
        ]),
    ),
    one(5, "minReadySeconds", Integer),
    one(6, "revisionHistoryLimit", Integer),
    one(7, "paused", Bool),
    one(9, "progressDeadlineSeconds", Integer),
];

const SERVICE_SPEC: &[Field] = &[
    many(
        1,
        "ports",
        Message(&[
            one(1, "name", Text),
            one(2, "protocol", Text),
            one(3, "port", Integer),
            one(4, "targetPort", IntOrString),
            one(5, "nodePort", Integer),
            one(6, "appProtocol", Text),
        ]),
    ),
    one(2, "selector", TextMap),
    one(3, "clusterIP", Text),
    one(4, "type", Text),
    many(5, "externalIPs", Text),
    one(7, "sessionAffinity", Text),
    one(8, "loadBalancerIP", Text),
    many(9, "loadBalancerSourceRanges", Text),
    one(10, "externalName", Text),
    one(11, "externalTrafficPolicy", Text),
    one(12, "healthCheckNodePort", Integer),
    one(13, "publishNotReadyAddresses", Bool),
    one(17, "ipFamilyPolicy", Text),
    many(18, "clusterIPs", Text),
    many(19, "ipFamilies", Text),
    one(22, "internalTrafficPolicy", Text),
];

const TOKEN_REQUEST_SPEC: &[Field] = &[
    many(1, "audiences", Text),
    one(
        3,
        "boundObjectRef",
        Message(&[
            one(1, "kind", Text),
            one(2, "apiVersion", Text),
            one(3, "name", Text),
            one(4, "uid", Text),
        ]),
    ),
    one(4, "expirationSeconds", Integer),
];

const META: Field = one(1, "metadata", Message(OBJECT_META));
const STATUS: Field = one(3, "status", Ignored);

const SECRET: &[Field] = &[
    META,
    one(2, "data", BytesMap),
    one(3, "type", Text),
    one(4, "stringData", TextMap),
    one(5, "immutable", Bool),
];
const CONFIG_MAP: &[Field] =
    &[META, one(2, "data", TextMap), one(3, "binaryData", BytesMap), one(4, "immutable", Bool)];
const NAMESPACE: &[Field] =
    &[META, one(2, "spec", Message(&[many(1, "finalizers", Text)])), STATUS];
const SERVICE_ACCOUNT: &[Field] = &[
    META,
    many(2, "secrets", Message(OBJECT_REFERENCE)),
    many(3, "imagePullSecrets", Message(LOCAL_REFERENCE)),
    one(4, "automountServiceAccountToken", Bool),
];
const SERVICE: &[Field] = &[META, one(2, "spec", Message(SERVICE_SPEC)), STATUS];
const POD: &[Field] = &[META, one(2, "spec", Message(POD_SPEC)), STATUS];
const DEPLOYMENT: &[Field] = &[META, one(2, "spec", Message(DEPLOYMENT_SPEC)), STATUS];
const TOKEN_REQUEST: &[Field] = &[META, one(2, "spec", Message(TOKEN_REQUEST_SPEC)), STATUS];

const ACCESS_SPEC: &[Field] = &[
    one(
        1,
        "resourceAttributes",
        Message(&[
            one(1, "namespace", Text),
            one(2, "verb", Text),
            one(3, "group", Text),
            one(4, "version", Text),
            one(5, "resource", Text),
            one(6, "subresource", Text),
            one(7, "name", Text),
        ]),
    ),
    one(2, "nonResourceAttributes", Message(&[one(1, "path", Text), one(2, "verb", Text)])),
];
const ACCESS_REVIEW: &[Field] = &[META, one(2, "spec", Message(ACCESS_SPEC)), STATUS];
const RULES_REVIEW: &[Field] =
    &[META, one(2, "spec", Message(&[one(1, "namespace", Text)])), STATUS];
const SELF_REVIEW: &[Field] = &[META, one(2, "status", Ignored)];
const DELETE_OPTIONS: &[Field] = &[
    one(1, "gracePeriodSeconds", Integer),
    one(2, "preconditions", Message(&[one(1, "uid", Text), one(2, "resourceVersion", Text)])),
    one(3, "orphanDependents", Bool),
    one(4, "propagationPolicy", Text),
    many(5, "dryRun", Text),
];
const EVICTION: &[Field] = &[META, one(2, "deleteOptions", Message(DELETE_OPTIONS))];

/// The messages that are known, by API version and kind.
fn message_of(api_version: &str, kind: &str) -> Option<&'static [Field]> {
    Some(match (api_version, kind) {
        ("v1", "Secret") => SECRET,
        ("v1", "ConfigMap") => CONFIG_MAP,
        ("v1", "Namespace") => NAMESPACE,
        ("v1", "ServiceAccount") => SERVICE_ACCOUNT,
        ("v1", "Service") => SERVICE,
        ("v1", "Pod") => POD,
        ("apps/v1", "Deployment") => DEPLOYMENT,
        ("authentication.k8s.io/v1", "TokenRequest") => TOKEN_REQUEST,
        ("authentication.k8s.io/v1", "SelfSubjectReview") => SELF_REVIEW,
        ("authorization.k8s.io/v1", "SelfSubjectAccessReview") => ACCESS_REVIEW,
        ("authorization.k8s.io/v1", "SelfSubjectRulesReview") => RULES_REVIEW,
        ("policy/v1", "Eviction") => EVICTION,
        // It is of the version of what it deletes.
        (_, "DeleteOptions") => DELETE_OPTIONS,
        _ => return None,
    })
}

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

/// A field's value as it is on the wire.
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message in order.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Result<(u64, Wire<'a>), String> {
        let tag = self.varint()?;
        let wire = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            2 => {
                let length =
                    usize::try_from(self.varint()?).map_err(|_| "a length is too large")?;
                if length > self.0.len() {
                    return Err("the message ends in the middle of a field".to_owned());
                }
                let (bytes, rest) = self.0.split_at(length);
                self.0 = rest;
                Wire::Bytes(bytes)
            }
            other => return Err(format!("wire type {other} is not expected")),
        };
        Ok((tag >> 3, wire))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) =
                self.0.split_first().ok_or("the message ends in the middle of a number")?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number is too long".to_owned())
    }
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
