//! One mapping of the file: fields are taken out of it, and what is left over was not understood.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use super::known;
use crate::config::{BadValue, Threshold, duration, quantity};

/// A mapping of the file with the path that leads to it.
pub(super) struct Section {
    path: String,
    fields: Map<String, Value>,
    /// Paths that nobody took, of sections that are finished.
    left_over: Vec<String>,
}

impl Section {
    pub(super) fn new(fields: Map<String, Value>) -> Self {
        Self { path: String::new(), fields, left_over: Vec::new() }
    }

    /// The whole path of a field of this section.
    pub(super) fn name(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    /// Sets `target` when the file has the field.
    pub(super) fn set<T>(
        &mut self,
        target: &mut T,
        read: impl FnOnce(&mut Self, &str) -> Result<Option<T>, BadValue>,
        field: &str,
    ) -> Result<(), BadValue> {
        if let Some(value) = read(self, field)? {
            *target = value;
        }
        Ok(())
    }

    /// Null and the empty text are "not set", as everywhere in this file format.
    fn take(&mut self, field: &str) -> Option<Value> {
        self.fields.remove(field).filter(|value| !value.is_null() && value.as_str() != Some(""))
    }

    pub(super) fn bad(&self, field: &str, found: &Value, expected: &'static str) -> BadValue {
        BadValue::new(self.name(field), found, expected)
    }

    fn read<T>(
        &mut self,
        field: &str,
        expected: &'static str,
        parse: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, BadValue> {
        let Some(value) = self.take(field) else { return Ok(None) };
        parse(&value).map(Some).ok_or_else(|| self.bad(field, &value, expected))
    }

    pub(super) fn string(&mut self, field: &str) -> Result<Option<String>, BadValue> {
        self.read(field, "a text", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn boolean(&mut self, field: &str) -> Result<Option<bool>, BadValue> {
        self.read(field, "true or false", Value::as_bool)
    }

    pub(super) fn number<T: TryFrom<i64>>(&mut self, field: &str) -> Result<Option<T>, BadValue> {
        self.read(field, "a whole number in the field's range", |value| {
            value.as_i64().and_then(|number| T::try_from(number).ok())
        })
    }

    /// Zero is "the default": kubeadm writes every duration that it does not set as `0s`.
    pub(super) fn duration(&mut self, field: &str) -> Result<Option<Duration>, BadValue> {
        let read = |value: &Value| value.as_str().and_then(duration::parse);
        Ok(self.read(field, duration::EXPECTED, read)?.filter(|duration| !duration.is_zero()))
    }

    pub(super) fn bytes(&mut self, field: &str) -> Result<Option<u64>, BadValue> {
        self.read(field, quantity::EXPECTED, |value| {
            scalar_text(value).and_then(|text| quantity::parse(&text))
        })
    }

    pub(super) fn threshold(&mut self, field: &str) -> Result<Option<Threshold>, BadValue> {
        self.read(field, "a threshold (such as 100Mi or 10%)", |value| {
            scalar_text(value).and_then(|text| super::parse_threshold(&text))
        })
    }

    pub(super) fn address(&mut self, field: &str) -> Result<Option<IpAddr>, BadValue> {
        let Some(value) = self.take(field) else { return Ok(None) };
        address(&self.name(field), &value).map(Some)
    }

    /// A file name; relative ones count from `base`. Empty is "not set".
    pub(super) fn path(&mut self, field: &str, base: &Path) -> Result<Option<PathBuf>, BadValue> {
        Ok(self.string(field)?.filter(|path| !path.is_empty()).map(|path| base.join(path)))
    }

    pub(super) fn list(&mut self, field: &str) -> Result<Option<Vec<Value>>, BadValue> {
        self.read(field, "a list", |value| value.as_array().cloned())
    }

    /// A mapping of names to texts or numbers, such as resource quantities.
    pub(super) fn strings_by_name(
        &mut self,
        field: &str,
    ) -> Result<Vec<(String, String)>, BadValue> {
        let Some(section) = self.section(field)? else { return Ok(Vec::new()) };
        let read = |(key, value): (&String, &Value)| match scalar_text(value) {
            Some(text) => Ok((key.clone(), text)),
            None => Err(section.bad(key, value, quantity::EXPECTED)),
        };
        section.fields.iter().map(read).collect()
    }

    pub(super) fn section(&mut self, field: &str) -> Result<Option<Section>, BadValue> {
        let path = self.name(field);
        match self.take(field) {
            None => Ok(None),
            Some(Value::Object(fields)) => {
                Ok(Some(Section { path, fields, left_over: Vec::new() }))
            }
            Some(other) => Err(self.bad(field, &other, "a mapping of fields")),
        }
    }

    /// Gives a section back to the one that it was taken from, with what nobody understood.
    pub(super) fn finish(&mut self, inner: Section) {
        self.left_over.extend(inner.unread());
    }

    fn unread(self) -> Vec<String> {
        let own = |field: &String| {
            if self.path.is_empty() { field.clone() } else { format!("{}.{field}", self.path) }
        };
        let set = self.fields.iter().filter(|(_, value)| !is_empty(value));
        set.map(|(field, _)| own(field)).chain(self.left_over.iter().cloned()).collect()
    }

    /// One sentence for each field that has no effect.
    pub(super) fn into_warnings(self, file: &Path) -> Vec<String> {
        let mut unread = self.unread();
        unread.sort();
        unread
            .into_iter()
            .map(|path| {
                let root = path.split('.').next().unwrap_or(&path);
                if known::FIELDS.contains(&root) {
                    format!("{}: {path} is not supported and has no effect", file.display())
                } else {
                    format!("{}: {path} is unknown and has no effect", file.display())
                }
            })
            .collect()
    }
}

/// A value that says nothing: kubeadm writes many fields as `0s`, `""` or `{}` for "the default".
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty() || text == "0s",
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
        Value::Number(number) => number.as_i64() == Some(0),
        Value::Bool(_) => false,
    }
}

fn scalar_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

pub(super) fn address(field: &str, value: &Value) -> Result<IpAddr, BadValue> {
    value
        .as_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| BadValue::new(field, value, "an IP address"))
}
