//! Watches over HTTP: one JSON object per line.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::rest::{Call, Output, partial};
use super::{Reply, events, table};
use crate::error::ApiError;
use crate::kinds::Kind;
use crate::object::Object;
use crate::store::{Event, EventType, Watch};

/// How often a client learns how far it has seen, when it asked for that.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// A watch without `timeoutSeconds` ends between this and twice this.
const LONGEST: u64 = 1800;

struct Stream {
    watch: Watch,
    kind: &'static Kind,
    shown: &'static Kind,
    output: Output,
    include: String,
    /// Objects that the client gets before the changes.
    initial: VecDeque<Arc<Object>>,
    /// Send the bookmark that ends the initial objects, with this revision.
    initial_end: Option<u64>,
    bookmarks: bool,
    next_bookmark: Instant,
    bookmarked: u64,
    deadline: Instant,
    stop: CancellationToken,
    ended: bool,
    columns_sent: bool,
}

pub(super) fn start(call: &Call<'_>) -> Result<Reply, ApiError> {
    let registry = &call.server.registry;
    let mut selector = call.selector()?;
    if !call.path.name.is_empty() {
        selector.and_name(&call.path.name);
    }
    let from = call.number("resourceVersion")?;
    let streaming = call.query.is_true("sendInitialEvents");
    if streaming && call.query.text("resourceVersionMatch") != "NotOlderThan" {
        return Err(ApiError::bad_request(
            "sendInitialEvents: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        ));
    }
    let no_initial = call.query.get("sendInitialEvents") == Some("false");
    let (initial, revision) = match from {
        Some(revision) if revision > 0 && !streaming => (Vec::new(), revision),
        _ => registry.list(call.kind, call.namespace(), &selector),
    };
    let initial = if no_initial { Vec::new() } else { initial };
    let watch = registry.watch(call.kind, call.namespace(), selector, revision)?;
    let now = Instant::now();
    let spread = u64::from(uuid::Uuid::new_v4().as_fields().1) % LONGEST;
    let seconds = match call.number("timeoutSeconds")?.unwrap_or(0) {
        0 => LONGEST + spread,
        // A day is longer than any connection should live.
        some => some.min(86_400),
    };
    let bookmarks = call.query.is_true("allowWatchBookmarks");
    let stream = Stream {
        watch,
        kind: call.kind,
        shown: call.shown,
        output: call.output,
        include: call.query.text("includeObject").to_owned(),
        initial: initial.into(),
        initial_end: (streaming && bookmarks).then_some(revision),
        bookmarks,
        next_bookmark: now + BOOKMARK_EVERY,
        bookmarked: 0,
        deadline: now + Duration::from_secs(seconds),
        stop: call.server.stop.clone(),
        ended: false,
        columns_sent: false,
    };
    let frames = futures_util::stream::unfold(stream, |mut stream| async move {
        let line = stream.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(line)), stream))
    });
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    *response.status_mut() = StatusCode::OK;
    let media = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, media);
    Ok(response)
}

/// What woke a watch.
enum Wake {
    Event(Result<Event, ApiError>),
    Bookmark,
    Over,
}

impl Stream {
    /// The next line, or None when the watch is over.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        if let Some(object) = self.initial.pop_front() {
            return Some(self.line("ADDED", &object));
        }
        if let Some(revision) = self.initial_end.take() {
            self.bookmarked = revision;
            return Some(self.bookmark(revision, true));
        }
        loop {
            match self.wait().await {
                Wake::Event(Ok(event)) => return Some(self.event(&event)),
                // The client is told, then the watch is over: it must list again.
                Wake::Event(Err(error)) => {
                    self.ended = true;
                    return Some(line(&json!({"type": "ERROR", "object": error.status()})));
                }
                Wake::Bookmark => {
                    self.next_bookmark = Instant::now() + BOOKMARK_EVERY;
                    if let Some(line) = self.fresh_bookmark() {
                        return Some(line);
                    }
                }
                Wake::Over => {
                    self.ended = true;
                    return self.bookmarks.then(|| self.fresh_bookmark()).flatten();
                }
            }
        }
    }

    async fn wait(&mut self) -> Wake {
        let bookmark = if self.bookmarks { self.next_bookmark } else { self.deadline };
        // All arms are cancellation-safe; in order, so that a busy watch ends nevertheless.
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Wake::Over,
            () = tokio::time::sleep_until(self.deadline) => Wake::Over,
            () = tokio::time::sleep_until(bookmark), if self.bookmarks => Wake::Bookmark,
            event = self.watch.next() => Wake::Event(event),
        }
    }

    fn fresh_bookmark(&mut self) -> Option<Bytes> {
        let revision = self.watch.bookmark()?;
        (revision != self.bookmarked).then(|| {
            self.bookmarked = revision;
            self.bookmark(revision, false)
        })
    }

    fn event(&mut self, event: &Event) -> Bytes {
        let name = match event.event {
            EventType::Added => "ADDED",
            EventType::Modified => "MODIFIED",
            EventType::Deleted => "DELETED",
        };
        self.line(name, &event.object)
    }

    fn line(&mut self, name: &str, object: &Arc<Object>) -> Bytes {
        match self.output {
            Output::Json => {
                let mut text = format!("{{\"type\":\"{name}\",\"object\":").into_bytes();
                text.extend_from_slice(&events::wire(self.shown, object));
                text.extend_from_slice(b"}\n");
                text.into()
            }
            Output::Metadata => line(&json!({"type": name, "object": partial(object)})),
            Output::Table => {
                let columns = !std::mem::replace(&mut self.columns_sent, true);
                let one = std::slice::from_ref(object);
                let shown = table::render(self.kind, one, &self.include, columns);
                line(&json!({"type": name, "object": shown}))
            }
        }
    }

    fn bookmark(&self, revision: u64, initial: bool) -> Bytes {
        let mut meta = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if initial {
            meta["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.output {
            Output::Json => {
                json!({"kind": self.shown.kind, "apiVersion": self.shown.api_version(), "metadata": meta})
            }
            Output::Metadata => json!({
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta,
            }),
            Output::Table => json!({
                "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": meta,
                "columnDefinitions": [], "rows": [],
            }),
        };
        line(&json!({"type": "BOOKMARK", "object": object}))
    }
}

fn line(value: &Value) -> Bytes {
    let mut text = value.to_string();
    text.push('\n');
    text.into()
}
