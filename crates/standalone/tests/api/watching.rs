//! Watches: nothing lost, nothing repeated, and an honest 410.

use keelson_standalone::{DeleteOptions, EventType, PatchType, Registry, Selector, kinds};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::plane;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

/// One write of a random history.
#[derive(Debug, Clone)]
enum Op {
    Create(u8, bool),
    Label(u8, bool),
    Delete(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let name = 0..4_u8;
    prop_oneof![
        (name.clone(), any::<bool>()).prop_map(|(n, l)| Op::Create(n, l)),
        (name.clone(), any::<bool>()).prop_map(|(n, l)| Op::Label(n, l)),
        name.prop_map(Op::Delete),
    ]
}

fn label(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// What a watch said: the event, the name and the version.
type Seen = (EventType, String, u64);

async fn perform(registry: &Registry, op: &Op) {
    let kind = &kinds::CONFIG_MAP;
    // Writes that cannot be done, such as a second creation, change nothing.
    let done = match op {
        Op::Create(n, on) => {
            let value = json!({"metadata": {"name": format!("m{n}"), "labels": {"w": label(*on)}}});
            registry.create(kind, "default", value).await
        }
        Op::Label(n, on) => {
            let patch = json!({"metadata": {"labels": {"w": label(*on)}}});
            registry.patch(kind, "default", &format!("m{n}"), PatchType::Merge, &patch).await
        }
        Op::Delete(n) => {
            let options = DeleteOptions::default();
            registry.delete(kind, "default", &format!("m{n}"), &options).await
        }
    };
    drop(done);
}

/// Everything from `from` to the end marker, by a watch that is opened again after each `leg` events.
async fn follow(
    registry: &Registry,
    selector: &Selector,
    from: u64,
    end: u64,
    leg: usize,
) -> Vec<Seen> {
    let open = |at| registry.watch(&kinds::CONFIG_MAP, "default", selector.clone(), at).unwrap();
    let (mut seen, mut at, mut watch) = (Vec::new(), from, open(from));
    loop {
        let event = watch.next().await.unwrap();
        at = event.object.revision.max(at);
        if event.object.revision >= end {
            return seen;
        }
        seen.push((event.event, event.object.name.to_string(), event.object.revision));
        if seen.len().is_multiple_of(leg) {
            watch = open(at);
        }
    }
}

/// What a selector makes of the whole history.
fn judge(all: &[(Seen, bool)]) -> Vec<Seen> {
    let mut wanted = std::collections::HashSet::new();
    let mut seen = Vec::new();
    for ((event, name, revision), on) in all {
        let gone = *event == EventType::Deleted;
        let (before, after) = (wanted.contains(name), *on && !gone);
        let event = match (before, after) {
            (false, false) => continue,
            (false, true) => EventType::Added,
            (true, true) => EventType::Modified,
            (true, false) => EventType::Deleted,
        };
        if after {
            wanted.insert(name.clone())
        } else {
            wanted.remove(name)
        };
        seen.push((event, name.clone(), *revision));
    }
    seen
}

async fn check(ops: Vec<Op>, leg: usize) {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::open(dir.path()).unwrap();
    let namespace = json!({"metadata": {"name": "default"}});
    registry.create(&kinds::NAMESPACE, "", namespace).await.unwrap();
    let (_, from) = registry.list(&kinds::CONFIG_MAP, "default", &Selector::default());
    let mut reference =
        registry.watch(&kinds::CONFIG_MAP, "default", Selector::default(), from).unwrap();
    for op in &ops {
        perform(&registry, op).await;
    }
    // The end is marked for both selectors.
    let last = json!({"metadata": {"name": "last", "labels": {"w": "on"}}});
    let end = registry.create(&kinds::CONFIG_MAP, "default", last).await.unwrap().revision;
    let mut all: Vec<(Seen, bool)> = Vec::new();
    loop {
        let event = reference.next().await.unwrap();
        if event.object.revision >= end {
            break;
        }
        let on = event.object.labels.iter().any(|(_, value)| &**value == "on");
        all.push(((event.event, event.object.name.to_string(), event.object.revision), on));
    }
    assert!(all.windows(2).all(|pair| pair[0].0.2 < pair[1].0.2), "in order, each once: {all:?}");
    let plain: Vec<Seen> = all.iter().map(|(seen, _)| seen.clone()).collect();
    assert_eq!(follow(&registry, &Selector::default(), from, end, leg).await, plain);
    let on = Selector::parse(&kinds::CONFIG_MAP, "w=on", "").unwrap();
    assert_eq!(follow(&registry, &on, from, end, leg).await, judge(&all));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn watches_lose_and_repeat_nothing(ops in proptest::collection::vec(op(), 0..40), leg in 1..6_usize) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(check(ops, leg));
    }
}

fn map(name: &str) -> Value {
    json!({"metadata": {"name": name}})
}

#[tokio::test]
async fn a_watch_starts_with_what_is_there_and_goes_on() {
    let plane = plane::start().await;
    let client = &plane.client;
    let (_, a) = client.post(MAPS, &map("a")).await;
    let mut from_now = client.watch(&format!("{MAPS}?watch=1")).await;
    assert_eq!(from_now.next().await.unwrap(), json!({"type": "ADDED", "object": a}));
    let at = a["metadata"]["resourceVersion"].as_str().unwrap();
    let mut after = client.watch(&format!("{MAPS}?watch=1&resourceVersion={at}")).await;
    let (_, b) = client.post(MAPS, &map("b")).await;
    assert_eq!(after.next().await.unwrap(), json!({"type": "ADDED", "object": b}));
    assert_eq!(from_now.next().await.unwrap(), json!({"type": "ADDED", "object": b}));
    client.delete(&format!("{MAPS}/b"), &Value::Null).await;
    let gone = after.next().await.unwrap();
    assert_eq!(
        (&gone["type"], &gone["object"]["metadata"]["name"]),
        (&json!("DELETED"), &json!("b"))
    );
    assert_ne!(gone["object"]["metadata"]["resourceVersion"], b["metadata"]["resourceVersion"]);
}

#[tokio::test]
async fn a_streaming_list_ends_with_its_bookmark() {
    let plane = plane::start().await;
    let client = &plane.client;
    client.post(MAPS, &map("a")).await;
    let query =
        "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut watch = client.watch(&format!("{MAPS}?{query}")).await;
    assert_eq!(watch.next().await.unwrap()["type"], "ADDED");
    let bookmark = watch.next().await.unwrap();
    assert_eq!(bookmark["type"], "BOOKMARK");
    assert_eq!(bookmark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    client.post(MAPS, &map("b")).await;
    assert_eq!(watch.next().await.unwrap()["object"]["metadata"]["name"], "b");
}

#[tokio::test]
async fn a_watch_ends_at_its_timeout_with_a_bookmark() {
    let plane = plane::start().await;
    let client = &plane.client;
    let (_, list) = client.get(MAPS).await;
    let at = list["metadata"]["resourceVersion"].as_str().unwrap();
    client.post("/api/v1/namespaces/default/secrets", &map("elsewhere")).await;
    let query = format!("watch=1&resourceVersion={at}&timeoutSeconds=1&allowWatchBookmarks=true");
    let mut watch = client.watch(&format!("{MAPS}?{query}")).await;
    let bookmark = watch.next().await.unwrap();
    assert_eq!(bookmark["type"], "BOOKMARK");
    let version = |v: &str| v.parse::<u64>().unwrap();
    let seen = bookmark["object"]["metadata"]["resourceVersion"].as_str().unwrap();
    assert!(version(seen) > version(at), "the bookmark knows of changes elsewhere");
    assert!(watch.next().await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_too_far_behind_is_told() {
    let plane = plane::start().await;
    let (registry, client) = (plane.plane.registry().clone(), &plane.client);
    let (_, first) = client.post(MAPS, &map("a")).await;
    let at = first["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let mut slow = registry
        .watch(&kinds::CONFIG_MAP, "default", Selector::default(), at.parse().unwrap())
        .unwrap();
    let patch = |n: u32| {
        let registry = registry.clone();
        async move {
            let value = json!({"metadata": {"name": format!("x{n}")}});
            registry.create(&kinds::CONFIG_MAP, "default", value).await.unwrap();
        }
    };
    futures_util::future::join_all((0..2100).map(patch)).await;
    assert!(slow.next().await.unwrap_err().is_expired(), "a slow watch is ended, not buffered for");
    let (status, body) = client.get(&format!("{MAPS}?watch=1&resourceVersion={at}")).await;
    assert_eq!((status, &body["reason"]), (410, &json!("Expired")), "{body}");
    let future = client.get(&format!("{MAPS}?watch=1&resourceVersion=99999999")).await;
    assert_eq!(future.0, 410);
}
