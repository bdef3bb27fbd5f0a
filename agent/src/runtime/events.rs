//! containerd's events, turned into "look at this pod again".

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use containerd_client::events::{ContainerDelete, TaskExit, TaskStart};
use containerd_client::services::v1::SubscribeRequest;
use containerd_client::types::Envelope;
use prost::Message;

use super::types::RuntimeEvent;
use super::{Inner, container, observe};

/// Between two attempts to reach a containerd that is away.
const RETRY: Duration = Duration::from_millis(250);

/// Follows containerd's events for as long as the runtime lives. Nothing is replayed after an interruption, so each
/// (re)connection says [`RuntimeEvent::Resync`] once it is subscribed.
pub(crate) async fn follow(runtime: Weak<Inner>) {
    let mut pods: HashMap<String, String> = HashMap::new();
    let mut failing = false;
    while let Some(inner) = runtime.upgrade() {
        let filters = ["/tasks/exit", "/tasks/start", "/containers/delete"]
            .map(|topic| format!(r#"topic=="{topic}",namespace=="{}""#, inner.options.namespace));
        let subscribed = inner.connection.events().subscribe(SubscribeRequest { filters: filters.into() }).await;
        match subscribed {
            Ok(reply) => {
                failing = false;
                let mut stream = reply.into_inner();
                drop(inner.events.send(RuntimeEvent::Resync));
                drop(inner);
                while let Ok(Some(envelope)) = stream.message().await {
                    let Some(inner) = runtime.upgrade() else { return };
                    dispatch(&inner, &mut pods, &envelope).await;
                }
                tracing::warn!("containerd's event stream ended; subscribing again");
            }
            Err(status) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::error!(error = status.message(), "containerd does not answer; trying again");
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn dispatch(inner: &Arc<Inner>, pods: &mut HashMap<String, String>, envelope: &Envelope) {
    let Some(any) = &envelope.event else { return };
    let id = match envelope.topic.as_str() {
        "/tasks/exit" => match TaskExit::decode(any.value.as_slice()) {
            // An exec's process ends under another id.
            Ok(exit) if exit.id == exit.container_id => {
                if let Err(error) = container::reap(inner, &exit.container_id).await {
                    tracing::warn!(container = exit.container_id, %error, "An ended container is not cleaned up yet");
                }
                exit.container_id
            }
            _ => return,
        },
        "/tasks/start" => match TaskStart::decode(any.value.as_slice()) {
            Ok(start) => start.container_id,
            Err(_) => return,
        },
        _ => match ContainerDelete::decode(any.value.as_slice()) {
            Ok(delete) => {
                if let Some(uid) = pods.remove(&delete.id) {
                    drop(inner.events.send(RuntimeEvent::Pod { uid }));
                }
                return;
            }
            Err(_) => return,
        },
    };
    let uid = match pods.get(&id) {
        Some(uid) => uid.clone(),
        None => match observe::pod_of(inner, &id).await {
            Some(uid) => {
                pods.insert(id, uid.clone());
                uid
            }
            None => return,
        },
    };
    // Nobody listening is not an error.
    drop(inner.events.send(RuntimeEvent::Pod { uid }));
}
