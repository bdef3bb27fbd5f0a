//! What `fuzz/` calls: every reader of requests in this crate. Each takes any bytes and panics when an invariant does not
//! hold. No program of keelson calls them, so they are in none.

use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};

use crate::auth::token::Tokens;
use crate::kinds::{self, Kind};
use crate::object::Object;
use crate::registry::{PatchType, WriteOptions, patching};
use crate::selectors::Selector;
use crate::server::{body, rest, route, table};
use crate::{decode, defaults, quantity, validation};

/// What patches may make of an object, however they are written; inputs are much smaller.
const MAX_PATCHED: usize = 4 << 20;
/// Readers of JSON give up deeper than this.
const MAX_DEPTH: usize = 127;

fn text(input: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(input)
}

/// The kind that a byte names, and what follows.
fn kind_of(input: &[u8]) -> (&'static Kind, &[u8]) {
    let (number, rest) = input.split_first().unwrap_or((&0, &[]));
    let all = kinds::all();
    let kind = all.get(usize::from(*number) % all.len()).copied().unwrap_or(&kinds::POD);
    (kind, rest)
}

/// Label and field selectors.
pub fn selectors(input: &[u8]) {
    let (kind, rest) = kind_of(input);
    let text = text(rest);
    let (labels, fields) = text.split_once('\n').unwrap_or((&text, ""));
    if let Ok(selector) = Selector::parse(kind, labels, fields) {
        let labels = json!({"app": "web", "tier": "1", "": ""});
        let value = json!({"metadata": {"name": "a", "namespace": "b", "labels": labels}});
        let _matches = selector.matches(&Object::new(kind, 1, &value));
    }
}

/// Quantities.
pub fn quantities(input: &[u8]) {
    let text = text(input);
    let (one, other) = text.split_once('\n').unwrap_or((&text, "1"));
    let (one, other) = (Value::from(one), Value::from(other));
    let there = quantity::compare(&one, &other);
    assert_eq!(there, quantity::compare(&other, &one).map(std::cmp::Ordering::reverse));
}

/// Paths and queries of URLs, and tokens of lists in pages.
pub fn routes(input: &[u8]) {
    let text = text(input);
    let (path, query) = text.split_once('?').unwrap_or((&text, ""));
    if let route::Route::Resource(path) = route::parse(path) {
        let _kind = kinds::by_path(&path.group, &path.version, &path.resource);
    }
    let query = route::Query::parse(Some(query));
    drop(rest::paging::read_token(query.text("continue")));
}

/// Bodies in JSON, YAML and protobuf.
pub fn bodies(input: &[u8]) {
    let (media, rest) = input.split_first().unwrap_or((&0, &[]));
    let media = match media % 4 {
        0 => "application/json",
        1 => "application/yaml",
        2 => "application/apply-patch+yaml",
        _ => "application/vnd.kubernetes.protobuf",
    };
    if let Ok(value) = body::parse(media, rest) {
        assert!(depth(&value) <= MAX_DEPTH, "a body is nested too deeply");
    }
}

/// Any JSON as an object: types, defaults, validation, and the table that kubectl shows.
pub fn objects(input: &[u8]) {
    let (kind, rest) = kind_of(input);
    let Ok(given) = serde_json::from_slice::<Value>(rest) else { return };
    let Ok(decoded) = decode::decode(kind, &given) else { return };
    let mut value = decoded.value;
    defaults::apply(kind, &mut value);
    drop(validation::update(kind, &value, &value));
    if validation::create(kind, &value).is_empty() {
        let again = decode::decode(kind, &value);
        assert!(again.is_ok_and(|again| again.unknown.is_empty()), "defaults broke an object");
    }
    table::render(kind, &[Arc::new(Object::new(kind, 1, &value))], "Object", true);
}

/// A patch in each of its kinds: what it may make of an object is bounded.
pub fn patches(input: &[u8]) {
    let (kind, rest) = kind_of(input);
    let (how, rest) = rest.split_first().unwrap_or((&0, &[]));
    let how = match how % 4 {
        0 => PatchType::Merge,
        1 => PatchType::Strategic,
        2 => PatchType::Json,
        _ => PatchType::Apply,
    };
    let mut parts = rest.splitn(2, |byte| *byte == b'\n');
    let mut next = || serde_json::from_slice::<Value>(parts.next()?).ok();
    let (Some(live), Some(patch)) = (next(), next()) else { return };
    // What is stored was an object of its kind.
    let Ok(live) = decode::decode(kind, &live) else { return };
    let live = Object::new(kind, 1, &live.value);
    let options =
        WriteOptions { manager: "fuzz".to_owned(), force: true, ..WriteOptions::default() };
    if let Ok(value) = patching::change(&live, how, &patch, &options) {
        assert!(depth(&value) <= 2 * MAX_DEPTH, "a patch nests an object too deeply");
        assert!(value.to_string().len() <= MAX_PATCHED, "a patch makes an object too large");
        drop(patching::check(kind, &value, true));
    }
}

/// Tokens that no key of ours has signed.
pub fn tokens(input: &[u8]) {
    static TOKENS: OnceLock<Option<Tokens>> = OnceLock::new();
    let tokens =
        TOKENS.get_or_init(|| Tokens::new(rcgen::KeyPair::generate().ok()?.serialized_der()).ok());
    if let Some(tokens) = tokens {
        assert!(tokens.body(&text(input)).is_none(), "a token of somebody else was taken");
    }
}

fn depth(value: &Value) -> usize {
    let children = match value {
        Value::Array(list) => list.iter().map(depth).max(),
        Value::Object(map) => map.values().map(depth).max(),
        _ => return 0,
    };
    1 + children.unwrap_or(0)
}
