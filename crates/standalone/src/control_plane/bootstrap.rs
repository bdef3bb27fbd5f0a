//! What every cluster has from the first moment, and the end of old events.

use std::time::Duration;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::StandaloneConfig;
use crate::error::ApiError;
use crate::kinds::{self, Kind};
use crate::registry::{DeleteOptions, Registry};
use crate::selectors::Selector;

/// How long events are kept, as kube-apiserver keeps them.
const EVENT_SECONDS: i64 = 3600;

/// Makes what is missing. May run at every start.
pub(super) async fn run(registry: &Registry, config: &StandaloneConfig) -> Result<(), ApiError> {
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        ensure(registry, &kinds::NAMESPACE, "", json!({"metadata": {"name": name}})).await?;
        let account = json!({"metadata": {"name": "default"}});
        ensure(registry, &kinds::SERVICE_ACCOUNT, name, account).await?;
    }
    api_service(registry, config).await
}

/// The Service `kubernetes`: the API server as pods see it.
async fn api_service(registry: &Registry, config: &StandaloneConfig) -> Result<(), ApiError> {
    let Some(cluster_ip) = registry.service_network().api_address() else { return Ok(()) };
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let service = json!({
        "metadata": {"name": "kubernetes", "labels": labels},
        "spec": {
            "clusterIP": cluster_ip.to_string(),
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": config.port}],
        },
    });
    ensure(registry, &kinds::SERVICE, "default", service).await?;
    let address = config.advertise_address;
    let port = json!({"name": "https", "port": config.port, "protocol": "TCP"});
    let endpoints = json!({
        "metadata": {
            "name": "kubernetes",
            "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"},
        },
        "subsets": [{"addresses": [{"ip": address.to_string()}], "ports": [port]}],
    });
    replace(registry, &kinds::ENDPOINTS, "default", endpoints).await?;
    let slice = json!({
        "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": if address.is_ipv4() { "IPv4" } else { "IPv6" },
        "endpoints": [{"addresses": [address.to_string()], "conditions": {"ready": true}}],
        "ports": [port],
    });
    replace(registry, &kinds::ENDPOINT_SLICE, "default", slice).await
}

async fn ensure(
    registry: &Registry,
    kind: &'static Kind,
    namespace: &str,
    value: Value,
) -> Result<(), ApiError> {
    let name = value["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    if registry.get(kind, namespace, &name).is_ok() {
        return Ok(());
    }
    match registry.create(kind, namespace, value).await {
        Err(error) if !error.is_already_exists() => Err(error),
        _ => Ok(()),
    }
}

/// The address may have changed since the last start.
async fn replace(
    registry: &Registry,
    kind: &'static Kind,
    namespace: &str,
    mut value: Value,
) -> Result<(), ApiError> {
    value["metadata"]["namespace"] = namespace.into();
    ensure(registry, kind, namespace, value.clone()).await?;
    let name = value["metadata"]["name"].as_str().unwrap_or_default();
    let old = registry.get(kind, namespace, name)?.value();
    // An address type cannot change; the slice is made anew then.
    if *kind == kinds::ENDPOINT_SLICE && old["addressType"] != value["addressType"] {
        registry.delete(kind, namespace, name, &DeleteOptions::default()).await?;
        return ensure(registry, kind, namespace, value).await;
    }
    registry.update(kind, value).await.map(|_| ())
}

/// Removes events that are older than an hour, until the stop signal.
pub(super) async fn expire_events(registry: Registry, stop: CancellationToken) {
    let mut tick = tokio::time::interval(Duration::from_secs(300));
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let limit = jiff::Timestamp::now().as_second() - EVENT_SECONDS;
        let (events, _) = registry.list(&kinds::EVENT, "", &Selector::default());
        for event in events {
            if last_seen(&event.value()) >= limit {
                continue;
            }
            let options = DeleteOptions::default();
            let gone =
                registry.delete(&kinds::EVENT, &event.namespace, &event.name, &options).await;
            if let Err(error) = gone
                && !error.is_not_found()
            {
                tracing::warn!(%error, event = &*event.name, "An old event cannot be removed");
                break;
            }
        }
    }
}

fn last_seen(event: &Value) -> i64 {
    let times = [
        &event["series"]["lastObservedTime"],
        &event["lastTimestamp"],
        &event["eventTime"],
        &event["metadata"]["creationTimestamp"],
    ];
    let parsed = times.into_iter().filter_map(|t| t.as_str()?.parse::<jiff::Timestamp>().ok());
    parsed.map(jiff::Timestamp::as_second).max().unwrap_or(0)
}
