//! Tells the owners of objects, by Kubernetes Events, what could not be done with them.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::model::{Problem, ServiceKey};

/// Notices that wait; when there are more, the log has them all the same.
const CAPACITY: usize = 100;
const MAX_NOTE: usize = 1000;

/// Something to tell about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    kind: &'static str,
    namespace: String,
    name: String,
    reason: &'static str,
    note: String,
}

impl Notice {
    pub(crate) fn left_out(problem: Problem) -> Self {
        let (namespace, name) = problem.object.split_once('/').unwrap_or(("", &problem.object));
        Notice {
            kind: problem.kind,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            reason: "LeftOut",
            note: problem.what,
        }
    }

    pub(crate) fn refused(service: &ServiceKey, why: &str) -> Self {
        Notice::about(service, "KernelRefused", why.to_owned())
    }

    pub(crate) fn about(service: &ServiceKey, reason: &'static str, note: String) -> Self {
        let (namespace, name) = service.parts();
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        Notice { kind: "Service", namespace, name, reason, note }
    }

    pub(crate) fn about_node(name: &str, reason: &'static str, note: String) -> Self {
        let (kind, namespace) = ("Node", String::new());
        Notice { kind, namespace, name: name.to_owned(), reason, note }
    }

    fn reference(&self) -> ObjectReference {
        let version = if self.kind == "EndpointSlice" { "discovery.k8s.io/v1" } else { "v1" };
        ObjectReference {
            api_version: Some(version.to_owned()),
            kind: Some(self.kind.to_owned()),
            namespace: Some(self.namespace.clone()).filter(|namespace| !namespace.is_empty()),
            name: Some(self.name.clone()),
            ..ObjectReference::default()
        }
    }

    fn event(&self) -> Event {
        let mut note = self.note.clone();
        note.truncate(note.floor_char_boundary(MAX_NOTE));
        Event {
            type_: EventType::Warning,
            reason: self.reason.to_owned(),
            note: Some(note),
            action: "ProgramService".to_owned(),
            secondary: None,
        }
    }
}

/// Where the engine puts notices.
#[derive(Clone)]
pub(crate) struct Notices(Sender<Notice>);

impl Notices {
    pub(crate) fn channel() -> (Self, Receiver<Notice>) {
        let (sender, receiver) = channel(CAPACITY);
        (Notices(sender), receiver)
    }

    /// Never waits: telling is less urgent than programming.
    pub(crate) fn send(&self, notice: Notice) {
        if let Err(error) = self.0.try_send(notice) {
            tracing::debug!(%error, "An event was not published");
        }
    }
}

/// Publishes notices for ever.
pub(crate) async fn publish(client: Client, node: &str, mut notices: Receiver<Notice>) {
    let reporter =
        Reporter { controller: "keelson-proxy".to_owned(), instance: Some(node.to_owned()) };
    let recorder = Recorder::new(client, reporter);
    while let Some(notice) = notices.recv().await {
        if let Err(error) = recorder.publish(&notice.event(), &notice.reference()).await {
            tracing::debug!(%error, ?notice, "Cannot publish an event");
        }
    }
    std::future::pending().await
}
