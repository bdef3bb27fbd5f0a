//! The API server's pods of this node.

use std::sync::Arc;

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use tokio::sync::mpsc;

use super::{SourceKind, Update};

/// Follows the pods that are bound to `node` until the receiver is gone.
///
/// A relist (after a long interruption, or 410 Gone) is told as a whole, so that nothing that vanished meanwhile stays.
pub(in crate::pod) async fn follow(
    client: kube::Client,
    node: String,
    updates: mpsc::Sender<Update>,
) {
    let api: Api<Pod> = Api::all(client);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let mut events = watcher::watcher(api, config).default_backoff().boxed();
    let mut fresh = Vec::new();
    let mut interrupted = false;
    while let Some(event) = events.next().await {
        let update = match event {
            Ok(event) => {
                interrupted = false;
                match event {
                    Event::Init => {
                        fresh.clear();
                        continue;
                    }
                    Event::InitApply(pod) => {
                        fresh.push(Arc::new(slim(pod)));
                        continue;
                    }
                    Event::InitDone => Update::All(SourceKind::Api, std::mem::take(&mut fresh)),
                    Event::Apply(pod) => Update::Changed(SourceKind::Api, Arc::new(slim(pod))),
                    Event::Delete(pod) => Update::Gone(Arc::new(slim(pod))),
                }
            }
            Err(error) => {
                if !interrupted {
                    tracing::warn!(node, %error, "Pod watch interrupted, will retry; running pods are left alone");
                }
                interrupted = true;
                continue;
            }
        };
        if updates.send(update).await.is_err() {
            return;
        }
    }
}

/// Managed fields are most of a pod's bytes and of no use here.
fn slim(mut pod: Pod) -> Pod {
    pod.metadata.managed_fields = None;
    pod
}
