//! The services of the cluster, reduced to what pods' environments need.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Service;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::env::services::{self, ServiceLink};

/// Follows all services. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct ServiceLinks {
    known: Arc<Mutex<HashMap<String, ServiceLink>>>,
    synced: watch::Receiver<bool>,
}

impl ServiceLinks {
    pub(super) fn start(client: Option<kube::Client>, cancel: CancellationToken) -> Self {
        let (told, synced) = watch::channel(client.is_none());
        let known = Arc::default();
        if let Some(client) = client {
            let follow = follow(client, Arc::clone(&known), told);
            tokio::spawn(async move { cancel.run_until_cancelled(follow).await });
        }
        Self { known, synced }
    }

    /// Waits until the services are known. A pod that started earlier would lack variables for ever.
    pub(super) async fn wait_synced(&self) {
        // The sender is only dropped when the agent ends.
        drop(self.synced.clone().wait_for(|synced| *synced).await);
    }

    pub(super) fn variables(
        &self,
        namespace: &str,
        links: bool,
    ) -> std::collections::BTreeMap<String, String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        services::variables(known.values(), namespace, links)
    }
}

async fn follow(
    client: kube::Client,
    known: Arc<Mutex<HashMap<String, ServiceLink>>>,
    synced: watch::Sender<bool>,
) {
    let api: Api<Service> = Api::all(client);
    let mut events = watcher::watcher(api, watcher::Config::default()).default_backoff().boxed();
    let mut fresh = HashMap::new();
    while let Some(event) = events.next().await {
        let lock = || known.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Ok(Event::Init) => fresh.clear(),
            Ok(Event::InitApply(service)) => {
                fresh.insert(key(&service), link(&service));
            }
            Ok(Event::InitDone) => {
                *lock() = std::mem::take(&mut fresh);
                synced.send_replace(true);
            }
            Ok(Event::Apply(service)) => {
                lock().insert(key(&service), link(&service));
            }
            Ok(Event::Delete(service)) => {
                lock().remove(&key(&service));
            }
            Err(error) => tracing::debug!(%error, "Service watch interrupted"),
        }
    }
}

fn key(service: &Service) -> String {
    let meta = &service.metadata;
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    format!("{}/{}", text(&meta.namespace), text(&meta.name))
}

fn link(service: &Service) -> ServiceLink {
    let spec = service.spec.clone().unwrap_or_default();
    let port = |port: k8s_openapi::api::core::v1::ServicePort| {
        let protocol = port.protocol.unwrap_or_else(|| "TCP".into());
        (port.name.unwrap_or_default(), port.port, protocol)
    };
    ServiceLink {
        namespace: service.metadata.namespace.clone().unwrap_or_default(),
        name: service.metadata.name.clone().unwrap_or_default(),
        cluster_ip: spec.cluster_ip.unwrap_or_default(),
        ports: spec.ports.unwrap_or_default().into_iter().map(port).collect(),
    }
}
