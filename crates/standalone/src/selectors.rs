//! Label and field selectors.

use serde_json::Value;

use crate::error::ApiError;
use crate::kinds::{self, Kind};
use crate::object::Object;

/// Which objects of a list or watch a client wants.
#[derive(Debug, Clone, Default)]
pub struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<(String, String, bool)>,
}

#[derive(Debug, Clone)]
struct Requirement {
    key: String,
    op: Op,
}

#[derive(Debug, Clone)]
enum Op {
    Exists,
    Absent,
    In(Vec<String>),
    NotIn(Vec<String>),
    Greater(i64),
    Less(i64),
}

/// The values that field selectors may ask for, beside name and namespace.
pub(crate) fn selectable_fields(kind: &Kind, value: &Value) -> Box<[(&'static str, Box<str>)]> {
    let at = |field: &'static str| {
        let mut found = value;
        for segment in field.split('.') {
            found = &found[segment];
        }
        let text = match found {
            Value::String(text) => text.as_str().into(),
            Value::Null if field == "spec.unschedulable" => "false".into(),
            Value::Null => "".into(),
            other => other.to_string().into(),
        };
        (field, text)
    };
    field_names(kind).iter().map(|field| at(field)).collect()
}

fn field_names(kind: &Kind) -> &'static [&'static str] {
    if *kind == kinds::POD {
        &[
            "spec.nodeName",
            "status.phase",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.podIP",
            "status.nominatedNodeName",
        ]
    } else if *kind == kinds::EVENT {
        &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "type",
        ]
    } else if *kind == kinds::SECRET {
        &["type"]
    } else if *kind == kinds::NODE {
        &["spec.unschedulable"]
    } else if *kind == kinds::NAMESPACE {
        &["status.phase"]
    } else if *kind == kinds::REPLICA_SET {
        &["status.replicas"]
    } else if *kind == kinds::SERVICE {
        &["spec.clusterIP", "spec.type"]
    } else {
        &[]
    }
}

impl Selector {
    /// Reads the query parameters `labelSelector` and `fieldSelector`.
    ///
    /// # Errors
    /// 400 when one cannot be read or names a field that this kind does not offer.
    pub fn parse(kind: &Kind, labels: &str, fields: &str) -> Result<Self, ApiError> {
        let labels = parse_labels(labels).map_err(|why| {
            ApiError::bad_request(format!(
                "unable to parse requirement: {why} (labelSelector \"{labels}\")"
            ))
        })?;
        Ok(Self { labels, fields: parse_fields(kind, fields)? })
    }

    /// A selector for one object name.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            labels: Vec::new(),
            fields: vec![("metadata.name".to_owned(), name.to_owned(), true)],
        }
    }

    /// Adds "and this name" to the selector.
    pub(crate) fn and_name(&mut self, name: &str) {
        self.fields.push(("metadata.name".to_owned(), name.to_owned(), true));
    }

    /// Whether every object matches.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// Whether `object` is wanted.
    #[must_use]
    pub fn matches(&self, object: &Object) -> bool {
        self.fields.iter().all(|(field, want, equal)| {
            let have = match field.as_str() {
                "metadata.name" => &*object.name,
                "metadata.namespace" => &*object.namespace,
                other => object
                    .fields
                    .iter()
                    .find(|(name, _)| *name == other)
                    .map(|(_, value)| &**value)
                    .unwrap_or_default(),
            };
            (have == want) == *equal
        }) && self.labels.iter().all(|requirement| requirement.matches(object))
    }
}

impl Requirement {
    fn matches(&self, object: &Object) -> bool {
        let have = object.labels.iter().find(|(key, _)| **key == *self.key).map(|(_, v)| &**v);
        match (&self.op, have) {
            (Op::Exists, have) => have.is_some(),
            (Op::Absent, have) => have.is_none(),
            (Op::In(values), Some(have)) => values.iter().any(|v| v == have),
            (Op::NotIn(values), Some(have)) => values.iter().all(|v| v != have),
            (Op::NotIn(_), None) => true,
            (Op::Greater(than), Some(have)) => have.parse::<i64>().is_ok_and(|n| n > *than),
            (Op::Less(than), Some(have)) => have.parse::<i64>().is_ok_and(|n| n < *than),
            (Op::In(_) | Op::Greater(_) | Op::Less(_), None) => false,
        }
    }
}

/// Splits at commas outside of parentheses.
fn split_top(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0_i32, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts
}

fn parse_labels(text: &str) -> Result<Vec<Requirement>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    split_top(text).into_iter().map(parse_requirement).collect()
}

fn parse_requirement(text: &str) -> Result<Requirement, String> {
    let one = |key: &str, op| {
        let key = key.trim();
        if key.is_empty() || key.contains([' ', '(', ')', '=', '!']) {
            return Err(format!("\"{text}\" is not a label requirement"));
        }
        Ok(Requirement { key: key.to_owned(), op })
    };
    let value = |v: &str| v.trim().to_owned();
    if let Some(open) = text.find('(') {
        let values = text[open + 1..]
            .strip_suffix(')')
            .ok_or_else(|| format!("found '{text}', expected: ')'"))?
            .split(',')
            .map(value)
            .collect();
        let head = text[..open].trim();
        return match head.rsplit_once(char::is_whitespace) {
            Some((key, "in")) => one(key, Op::In(values)),
            Some((key, "notin")) => one(key, Op::NotIn(values)),
            _ => Err(format!("found '{head}', expected: in, notin")),
        };
    }
    if let Some((key, v)) = text.split_once("!=") {
        return one(key, Op::NotIn(vec![value(v)]));
    }
    if let Some((key, v)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return one(key, Op::In(vec![value(v)]));
    }
    if let Some((key, v)) = text.split_once('>') {
        return one(key, Op::Greater(v.trim().parse().map_err(|_| format!("{v} is no number"))?));
    }
    if let Some((key, v)) = text.split_once('<') {
        return one(key, Op::Less(v.trim().parse().map_err(|_| format!("{v} is no number"))?));
    }
    match text.strip_prefix('!') {
        Some(key) => one(key, Op::Absent),
        None => one(text, Op::Exists),
    }
}

fn parse_fields(kind: &Kind, text: &str) -> Result<Vec<(String, String, bool)>, ApiError> {
    let mut found = Vec::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (field, value, equal) = if let Some((f, v)) = part.split_once("!=") {
            (f, v, false)
        } else if let Some((f, v)) = part.split_once("==").or_else(|| part.split_once('=')) {
            (f, v, true)
        } else {
            let text = format!("invalid selector: '{text}'; can't understand '{part}'");
            return Err(ApiError::bad_request(text));
        };
        let known = match field {
            "metadata.name" => true,
            "metadata.namespace" => kind.namespaced,
            other => field_names(kind).contains(&other),
        };
        if !known {
            return Err(ApiError::bad_request(format!("field label not supported: {field}")));
        }
        found.push((field.to_owned(), value.to_owned(), equal));
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
