//! Events live for an hour after they last happened.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use k8s_openapi::api::core::v1::Event;
use k8s_openapi::jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::cluster::Key;
use super::pods::since_then;
use crate::{Api, ApiError, DeleteOptions, EventType, Registry};

/// kube-apiserver's `--event-ttl` by default.
const LIFE: Duration = Duration::from_secs(3600);
/// Events that end within this time go together, so that one that ends each second does not wake us each second.
const TOGETHER: Duration = Duration::from_secs(60);

/// When which event ends. Pure.
#[derive(Debug, Default)]
struct Ends {
    order: BTreeSet<(Timestamp, Key)>,
    of: HashMap<Key, Timestamp>,
}

impl Ends {
    fn put(&mut self, event: &Event) {
        let key = Key::of(&event.metadata);
        self.remove(&key);
        let Some(last) = last_happened(event) else { return };
        self.order.insert((last, key.clone()));
        self.of.insert(key, last);
    }

    fn remove(&mut self, key: &Key) {
        if let Some(last) = self.of.remove(key) {
            self.order.remove(&(last, key.clone()));
        }
    }

    /// How long until something is to be done.
    fn wait(&self, now: Timestamp) -> Option<Duration> {
        let (last, _) = self.order.first()?;
        Some((LIFE + TOGETHER).saturating_sub(since_then(*last, now)))
    }

    /// Takes out what has ended.
    fn take_ended(&mut self, now: Timestamp) -> Vec<Key> {
        let mut ended = Vec::new();
        while let Some((last, _)) = self.order.first()
            && since_then(*last, now) >= LIFE
        {
            if let Some((_, key)) = self.order.pop_first() {
                self.of.remove(&key);
                ended.push(key);
            }
        }
        ended
    }
}

fn last_happened(event: &Event) -> Option<Timestamp> {
    let series = event.series.as_ref().and_then(|series| series.last_observed_time.as_ref());
    let times = [
        event.last_timestamp.as_ref().map(|time| time.0),
        event.event_time.as_ref().map(|time| time.0),
        series.map(|time| time.0),
        event.metadata.creation_timestamp.as_ref().map(|time| time.0),
    ];
    times.into_iter().flatten().max()
}

/// Deletes events that have ended, until cancelled.
pub(crate) async fn run(registry: Registry, cancel: CancellationToken) {
    loop {
        // Cancellation-safe: a deletion that is given up is done at the next start.
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            result = follow(&registry) => {
                if let Err(error) = result {
                    debug!(%error, "Watch of events ended, listing again");
                }
            }
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
    }
}

async fn follow(registry: &Registry) -> Result<(), ApiError> {
    let api: Api<Event> = registry.api()?;
    let mut ends = Ends::default();
    let (events, revision) = api.list("")?;
    events.iter().for_each(|event| ends.put(event));
    drop(events);
    let mut watch = api.watch("", revision)?;
    loop {
        let wait = ends.wait(Timestamp::now());
        let timer = async {
            match wait {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        // Both arms are cancellation-safe.
        tokio::select! {
            biased;
            event = watch.next() => {
                let event = event?;
                match event.event {
                    EventType::Deleted => ends.remove(&Key::of(&event.object.metadata)),
                    _ => ends.put(&event.object),
                }
            }
            () = timer => {
                for key in ends.take_ended(Timestamp::now()) {
                    match api.delete(&key.namespace, &key.name, &DeleteOptions::default()).await {
                        Err(error) if !error.is_not_found() => return Err(error),
                        _ => {}
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_event_ends_an_hour_after_it_last_happened() {
        let event = |name: &str, last: &str| -> Event {
            serde_json::from_value(json!({"metadata": {"name": name, "namespace": "n",
                "creationTimestamp": "2026-01-01T00:00:00Z"}, "involvedObject": {}, "lastTimestamp": last}))
            .unwrap()
        };
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let mut ends = Ends::default();
        assert_eq!(ends.wait(at("2026-01-01T00:00:00Z")), None);
        ends.put(&event("a", "2026-01-01T00:00:00Z"));
        ends.put(&event("b", "2026-01-01T00:00:30Z"));
        ends.put(&event("c", "2026-01-01T00:30:00Z"));
        ends.put(&event("c", "2026-01-01T00:40:00Z"));
        assert_eq!(ends.wait(at("2026-01-01T01:00:00Z")), Some(TOGETHER));
        assert_eq!(ends.take_ended(at("2026-01-01T00:59:59Z")), []);
        assert_eq!(
            ends.take_ended(at("2026-01-01T01:01:00Z")),
            [Key::new("n", "a"), Key::new("n", "b")]
        );
        ends.remove(&Key::new("n", "c"));
        assert_eq!(ends.take_ended(at("2026-01-02T00:00:00Z")), []);
    }
}
