//! What every cluster has from the first moment, and keeps.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;
use crate::kinds::{self, Kind};
use crate::registry::{DeleteOptions, Registry};
use crate::selectors::Selector;
use crate::store::EventType;

/// Where pods find the API server.
#[derive(Debug, Clone)]
pub(super) struct ApiService {
    pub(super) address: IpAddr,
    pub(super) port: u16,
}

/// Makes what is missing. May run at every start.
pub(super) async fn run(registry: &Registry, wanted: &ApiService) -> Result<(), ApiError> {
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        ensure(registry, &kinds::NAMESPACE, "", json!({"metadata": {"name": name}})).await?;
        let account = json!({"metadata": {"name": "default"}});
        ensure(registry, &kinds::SERVICE_ACCOUNT, name, account).await?;
    }
    api_service(registry, wanted).await
}

/// The Service `kubernetes`: the API server as pods see it.
async fn api_service(registry: &Registry, wanted: &ApiService) -> Result<(), ApiError> {
    let Some(cluster_ip) = registry.service_network().api_address() else { return Ok(()) };
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let service = json!({
        "metadata": {"name": "kubernetes", "labels": labels},
        "spec": {
            "clusterIP": cluster_ip.to_string(),
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": wanted.port}],
        },
    });
    ensure(registry, &kinds::SERVICE, "default", service).await?;
    let address = wanted.address;
    let port = json!({"name": "https", "port": wanted.port, "protocol": "TCP"});
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

/// Makes the Service `kubernetes` again when somebody deletes it, until the stop signal.
pub(super) async fn keep_api_service(
    registry: Registry,
    wanted: ApiService,
    stop: CancellationToken,
) {
    loop {
        let kept = tokio::select! {
            () = stop.cancelled() => return,
            kept = wait_and_make(&registry, &wanted) => kept,
        };
        // The watch ended, the disk is full, or the old Service still holds its address for a moment.
        if let Err(error) = kept {
            tracing::info!(%error, "The Service kubernetes cannot be made yet");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

async fn wait_and_make(registry: &Registry, wanted: &ApiService) -> Result<(), ApiError> {
    let selector = Selector::named("kubernetes");
    let (_, revision) = registry.list(&kinds::SERVICE, "default", &selector);
    let mut watch = registry.watch(&kinds::SERVICE, "default", selector, revision)?;
    api_service(registry, wanted).await?;
    while watch.next().await?.event != EventType::Deleted {}
    api_service(registry, wanted).await
}
