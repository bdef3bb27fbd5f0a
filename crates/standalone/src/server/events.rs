//! `events.k8s.io/v1` is another view of the same events: fields have other names there.

use bytes::Bytes;
use serde_json::Value;

use crate::kinds::{self, Kind};
use crate::object::Object;

/// Names in `events.k8s.io/v1` and in `v1`.
const NAMES: &[(&str, &str)] = &[
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

/// The kind under which objects of a kind are stored.
pub(super) fn stored_kind(kind: &'static Kind) -> &'static Kind {
    if *kind == kinds::EVENT_NEW { &kinds::EVENT } else { kind }
}

/// From what a client of `shown` sends to what is stored; also for a patch.
pub(super) fn to_stored(shown: &Kind, mut value: Value) -> Value {
    if *shown == kinds::EVENT_NEW {
        rename(&mut value, |(new, core)| (*new, *core));
        identify(&mut value, &kinds::EVENT);
    }
    value
}

/// An object as clients of `shown` see it.
pub(super) fn wire(shown: &Kind, object: &Object) -> Bytes {
    if *shown != kinds::EVENT_NEW {
        return object.json.clone();
    }
    let mut value = object.value();
    rename(&mut value, |(new, core)| (*core, *new));
    identify(&mut value, shown);
    value.to_string().into()
}

fn rename(
    value: &mut Value,
    direction: fn(&(&'static str, &'static str)) -> (&'static str, &'static str),
) {
    let Some(map) = value.as_object_mut() else { return };
    for (from, to) in NAMES.iter().map(direction) {
        if let Some(field) = map.remove(from) {
            map.insert(to.to_owned(), field);
        }
    }
}

/// A patch may leave its kind away.
fn identify(value: &mut Value, kind: &Kind) {
    if let Some(map) = value.as_object_mut().filter(|map| map.contains_key("kind")) {
        map.insert("apiVersion".to_owned(), kind.api_version().into());
        map.insert("kind".to_owned(), kind.kind.into());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_event_two_names() {
        let sent = json!({
            "kind": "Event", "apiVersion": "events.k8s.io/v1", "metadata": {"name": "e"}, "note": "n",
            "regarding": {"kind": "Pod"}, "reportingController": "c", "reason": "R",
        });
        let stored = to_stored(&kinds::EVENT_NEW, sent.clone());
        assert_eq!((&stored["message"], &stored["apiVersion"]), (&json!("n"), &json!("v1")));
        let object = Object::new(&kinds::EVENT, 1, &stored);
        let back: Value = serde_json::from_slice(&wire(&kinds::EVENT_NEW, &object)).unwrap();
        assert_eq!(back, sent);
    }
}
