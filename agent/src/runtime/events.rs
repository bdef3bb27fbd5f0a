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
        let subscribed =
            inner.connection.events().subscribe(SubscribeRequest { filters: filters.into() }).await;
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
                    tracing::error!(
                        error = status.message(),
                        "containerd does not answer; trying again"
                    );
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn dispatch(inner: &Arc<Inner>, pods: &mut HashMap<String, String>, envelope: &Envelope) {
    let Some(any) = &envelope.event else { return };
    match envelope.topic.as_str() {
        "/tasks/exit" => match TaskExit::decode(any.value.as_slice()) {
            // An exec's process ends under another id.
            Ok(exit) if exit.id == exit.container_id => {
                let uid = pod_of(inner, pods, &exit.container_id).await;
                // Not in the way of the next event: the output has to be written and a runc be run.
                tokio::spawn(ended(Arc::clone(inner), exit.container_id, uid));
            }
            _ => {}
        },
        "/tasks/start" => {
            if let Ok(start) = TaskStart::decode(any.value.as_slice()) {
                tell(inner, pod_of(inner, pods, &start.container_id).await);
            }
        }
        _ => {
            if let Ok(delete) = ContainerDelete::decode(any.value.as_slice()) {
                tell(inner, pods.remove(&delete.id));
            }
        }
    }
}

/// The pod is told as soon as the exit is on the disk; that containerd forgets the task need not be waited for.
async fn ended(inner: Arc<Inner>, id: String, uid: Option<String>) {
    let recorded = container::record_end(&inner, &id).await;
    tell(&inner, uid);
    let result = match recorded {
        Ok(()) => container::forget_task(&inner, &id).await,
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        tracing::warn!(container = id, %error, "An ended container is not cleaned up yet");
    }
}

fn tell(inner: &Inner, uid: Option<String>) {
    if let Some(uid) = uid {
        // Nobody listening is not an error.
        drop(inner.events.send(RuntimeEvent::Pod { uid }));
    }
}

async fn pod_of(
    inner: &Arc<Inner>,
    pods: &mut HashMap<String, String>,
    id: &str,
) -> Option<String> {
    if let Some(uid) = pods.get(id) {
        return Some(uid.clone());
    }
    let uid = observe::pod_of(inner, id).await?;
    pods.insert(id.to_owned(), uid.clone());
    Some(uid)
}
