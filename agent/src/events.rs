//! Kubernetes events: what a node did, said where the person who cares looks.
//!
//! Recording never waits and never fails: events go through a bounded queue to one writer, equal ones are counted up on the
//! object that exists instead of being written anew, and each object has a budget, so that a crash loop cannot flood the API.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, Node, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Events that wait to be written; more are dropped.
const QUEUE: usize = 1000;
/// Per object: so many at once …
const BURST: f64 = 25.0;
/// … and one more in every five minutes, as client-go has it.
const REFILL_PER_SEC: f64 = 1.0 / 300.0;
/// Objects whose budget is remembered.
const MAX_TRACKED: usize = 4096;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    Normal,
    Warning,
}

/// Records events. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EventRecorder {
    queue: Option<mpsc::Sender<Record>>,
    component: &'static str,
    host: String,
}

#[derive(Debug)]
struct Record {
    object: ObjectReference,
    severity: Severity,
    reason: String,
    message: String,
    at: Timestamp,
}

impl EventRecorder {
    /// Starts the writer; it ends with `cancel`, writing what is queued if the API answers at once.
    pub fn start(client: kube::Client, host: &str, cancel: CancellationToken) -> Self {
        let (queue, records) = mpsc::channel(QUEUE);
        let recorder = Self { queue: Some(queue), component: "kubelet", host: host.to_owned() };
        let writer = Writer::new(client, recorder.component, host);
        tokio::spawn(writer.run(records, cancel));
        recorder
    }

    /// For nodes without an API server: events are only logged.
    pub fn log_only(host: &str) -> Self {
        Self { queue: None, component: "kubelet", host: host.to_owned() }
    }

    pub fn pod(&self, pod: &Pod, severity: Severity, reason: &str, message: impl Into<String>) {
        self.record(pod_reference(pod), severity, reason, message.into());
    }

    /// An event about one container; the field path is what `kubectl describe` groups by.
    pub fn container(
        &self,
        pod: &Pod,
        field: &str,
        severity: Severity,
        reason: &str,
        message: impl Into<String>,
    ) {
        let mut object = pod_reference(pod);
        object.field_path = Some(field.to_owned());
        self.record(object, severity, reason, message.into());
    }

    pub fn node(&self, node: &Node, severity: Severity, reason: &str, message: impl Into<String>) {
        let name = node.metadata.name.clone();
        let object = ObjectReference {
            kind: Some("Node".into()),
            api_version: Some("v1".into()),
            // kubelet uses the name as uid here, and tools look events of nodes up by that.
            uid: name.clone(),
            name,
            ..ObjectReference::default()
        };
        self.record(object, severity, reason, message.into());
    }

    /// Records an event about any object.
    pub fn record(
        &self,
        object: ObjectReference,
        severity: Severity,
        reason: &str,
        message: String,
    ) {
        let name = object.name.clone().unwrap_or_default();
        tracing::debug!(object = %name, reason, message, host = self.host, "Event");
        let Some(queue) = &self.queue else { return };
        let record =
            Record { object, severity, reason: reason.to_owned(), message, at: Timestamp::now() };
        if queue.try_send(record).is_err() {
            tracing::warn!(object = %name, reason, "Event dropped: the queue is full");
        }
    }
}

/// Refers to a pod in an event.
pub fn pod_reference(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".into()),
        api_version: Some("v1".into()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path: None,
    }
}

struct Writer {
    client: kube::Client,
    component: &'static str,
    host: String,
    written: HashMap<Key, Written>,
    budgets: HashMap<String, Budget>,
    sequence: u64,
}

type Key = (String, String, Severity, String, String);

struct Written {
    name: String,
    count: i32,
}

struct Budget {
    tokens: f64,
    at: Timestamp,
}

impl Budget {
    fn take(&mut self, now: Timestamp) -> bool {
        let passed = now.duration_since(self.at).as_secs_f64().max(0.0);
        self.tokens = (self.tokens + passed * REFILL_PER_SEC).min(BURST);
        self.at = now;
        let granted = self.tokens >= 1.0;
        if granted {
            self.tokens -= 1.0;
        }
        granted
    }
}

impl Writer {
    fn new(client: kube::Client, component: &'static str, host: &str) -> Self {
        let (written, budgets) = (HashMap::new(), HashMap::new());
        Self { client, component, host: host.to_owned(), written, budgets, sequence: 0 }
    }

    async fn run(mut self, mut records: mpsc::Receiver<Record>, cancel: CancellationToken) {
        loop {
            // biased: what is queued is written before the end is looked at.
            let record = tokio::select! {
                biased;
                record = records.recv() => record,
                () = cancel.cancelled() => None,
            };
            let Some(record) = record else { return };
            self.write(record).await;
            if self.budgets.len() > MAX_TRACKED {
                self.budgets.clear();
                self.written.clear();
            }
        }
    }

    async fn write(&mut self, record: Record) {
        let object = object_key(&record.object);
        let fresh = || Budget { tokens: BURST, at: record.at };
        if !self.budgets.entry(object.clone()).or_insert_with(fresh).take(record.at) {
            return;
        }
        let path = record.object.field_path.clone().unwrap_or_default();
        let key = (object, path, record.severity, record.reason.clone(), record.message.clone());
        if let Err(error) = self.put(key, &record).await {
            let name = record.object.name.unwrap_or_default();
            tracing::warn!(object = %name, reason = record.reason, %error, "Event not written");
        }
    }

    async fn put(&mut self, key: Key, record: &Record) -> Result<(), kube::Error> {
        let namespace = record.object.namespace.as_deref().unwrap_or("default");
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        if let Some(written) = self.written.get_mut(&key) {
            written.count += 1;
            let patch = serde_json::json!({
                "count": written.count, "lastTimestamp": Time(record.at),
            });
            let params = PatchParams::default();
            match api.patch(&written.name, &params, &Patch::Strategic(patch)).await {
                Ok(_) => return Ok(()),
                // The API has forgotten it (events expire): begin anew.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
        let event = self.event(record, namespace);
        let name = event.metadata.name.clone().unwrap_or_default();
        create_event(&api, &event).await?;
        self.written.insert(key, Written { name, count: 1 });
        Ok(())
    }

    fn event(&mut self, record: &Record, namespace: &str) -> Event {
        self.sequence += 1;
        let nanos = record.at.as_nanosecond();
        let object = record.object.name.as_deref().unwrap_or("unknown");
        let severity = match record.severity {
            Severity::Normal => "Normal",
            Severity::Warning => "Warning",
        };
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{object}.{nanos:x}{:x}", self.sequence & 0xff)),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            involved_object: record.object.clone(),
            reason: Some(record.reason.clone()),
            message: Some(record.message.chars().take(1024).collect()),
            type_: Some(severity.to_owned()),
            count: Some(1),
            first_timestamp: Some(Time(record.at)),
            last_timestamp: Some(Time(record.at)),
            source: Some(EventSource {
                component: Some(self.component.to_owned()),
                host: Some(self.host.clone()),
            }),
            reporting_component: Some(self.component.to_owned()),
            reporting_instance: Some(self.host.clone()),
            ..Event::default()
        }
    }
}

/// Tries again while the API is away, but not for long: events are news, not records.
async fn create_event(api: &Api<Event>, event: &Event) -> Result<(), kube::Error> {
    let mut delay = Duration::from_millis(500);
    for _ in 0..4 {
        match api.create(&PostParams::default(), event).await {
            Ok(_) => return Ok(()),
            Err(error @ kube::Error::Api(_)) => return Err(error),
            Err(_) => tokio::time::sleep(delay).await,
        }
        delay *= 2;
    }
    api.create(&PostParams::default(), event).await.map(drop)
}

fn object_key(object: &ObjectReference) -> String {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    format!("{}/{}/{}", text(&object.kind), text(&object.namespace), text(&object.uid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_has_a_budget_that_refills_slowly() {
        let at = |secs| Timestamp::from_second(secs).unwrap();
        let mut budget = Budget { tokens: BURST, at: at(0) };
        let granted = (0..100).filter(|_| budget.take(at(1))).count();
        assert_eq!(granted, 25);
        assert!(!budget.take(at(200)));
        assert!(budget.take(at(302)));
    }
}
