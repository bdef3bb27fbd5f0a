//! Events: what a person sees in `kubectl describe`.

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{Api, ApiError, PatchType, Registry};

/// How many events may wait to be written; beyond that they are dropped, as nothing depends on them.
const BACKLOG: usize = 1024;
/// How many are written side by side, so that they share the store's commits.
const PARALLEL: usize = 16;

/// Records events for one component without ever making it wait. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Recorder {
    events: mpsc::Sender<Event>,
    component: &'static str,
}

/// Whether an event tells of something that went as it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Normal,
    Warning,
}

impl Recorder {
    /// Records something about an object. The same thing again within the event's life raises its count.
    pub(crate) fn record<T: k8s_openapi::Resource>(
        &self,
        about: &ObjectMeta,
        tone: Tone,
        reason: &str,
        message: &str,
    ) {
        let event = event::<T>(self.component, about, tone, reason, message, Timestamp::now());
        if self.events.try_send(event).is_err() {
            debug!(reason, message, "Event dropped, too many wait");
        }
    }
}

/// Writes what the recorders give it.
pub(crate) struct EventWriter {
    api: Api<Event>,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
}

impl EventWriter {
    pub(crate) fn new(registry: &Registry) -> Result<Self, ApiError> {
        let (sender, events) = mpsc::channel(BACKLOG);
        Ok(Self { api: registry.api()?, events, sender })
    }

    pub(crate) fn recorder(&self, component: &'static str) -> Recorder {
        Recorder { events: self.sender.clone(), component }
    }

    /// Writes until cancelled; what then still waits is dropped.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let mut writing = FuturesUnordered::new();
        loop {
            // Every arm is cancellation-safe: the channel and the set keep what they hold.
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                Some(()) = writing.next() => {}
                Some(event) = self.events.recv(), if writing.len() < PARALLEL => {
                    writing.push(write(&self.api, event));
                }
            }
        }
    }
}

async fn write(api: &Api<Event>, event: Event) {
    let result = match api.create(&event).await {
        Err(error) if error.is_already_exists() => repeat(api, &event).await,
        result => result,
    };
    if let Err(error) = result {
        debug!(reason = event.reason, message = event.message, %error, "Event not recorded");
    }
}

async fn repeat(api: &Api<Event>, event: &Event) -> Result<Event, ApiError> {
    let namespace = event.metadata.namespace.as_deref().unwrap_or_default();
    let name = event.metadata.name.as_deref().unwrap_or_default();
    let count = api.get(namespace, name)?.count.unwrap_or(1) + 1;
    let patch = serde_json::json!({"count": count, "lastTimestamp": event.last_timestamp});
    api.patch(namespace, name, PatchType::Merge, &patch).await
}

/// The event object. Its name follows from what it says, so that a repetition meets the first one.
fn event<T: k8s_openapi::Resource>(
    component: &str,
    about: &ObjectMeta,
    tone: Tone,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> Event {
    let name = about.name.clone().unwrap_or_default();
    let uid = about.uid.clone().unwrap_or_default();
    // Objects without a namespace have their events in "default".
    let namespace = about.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let hash = fnv64(&[component, T::KIND, &uid, reason, message]);
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{hash:016x}")),
            namespace: Some(namespace),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some(T::API_VERSION.to_owned()),
            kind: Some(T::KIND.to_owned()),
            name: Some(name),
            namespace: about.namespace.clone(),
            uid: Some(uid),
            resource_version: about.resource_version.clone(),
            field_path: None,
        },
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        type_: Some(format!("{tone:?}")),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        source: Some(EventSource { component: Some(component.to_owned()), host: None }),
        reporting_component: Some(component.to_owned()),
        reporting_instance: Some(String::new()),
        ..Event::default()
    }
}

fn fnv64(parts: &[&str]) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}
