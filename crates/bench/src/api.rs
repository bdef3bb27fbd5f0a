//! The load generator: writes objects and sees, through a watch, when something came of them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures_util::{StreamExt, TryStreamExt, stream};
use http::Request;
use kube::Client;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use serde::de::IgnoredAny;
use serde_json::Value;

/// Longest time for anything that an API server is asked for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// An object to create and the collection that it belongs into.
#[derive(Debug, Clone)]
pub(crate) struct NewObject {
    pub(crate) collection: &'static str,
    pub(crate) body: Value,
}

/// A client with the credentials of `kubeconfig` for the API server at `server`.
///
/// # Errors
/// When the kubeconfig is unusable.
pub(crate) async fn client(kubeconfig: &Path, server: &str) -> Result<Client> {
    let text = || format!("cannot use the kubeconfig {}", kubeconfig.display());
    let file = Kubeconfig::read_from(kubeconfig).with_context(text)?;
    let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .with_context(text)?;
    config.cluster_url = server.parse().with_context(|| format!("{server} is not an address"))?;
    Ok(Client::try_from(config)?)
}

/// The server that a kubeconfig names.
///
/// # Errors
/// When it names none.
pub(crate) fn server_of(kubeconfig: &Path) -> Result<String> {
    let file = Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("cannot read the kubeconfig {}", kubeconfig.display()))?;
    let server = file.clusters.into_iter().find_map(|named| named.cluster?.server);
    server.with_context(|| format!("{} names no server", kubeconfig.display()))
}

/// Creates one object.
///
/// # Errors
/// When the API server refuses it.
pub(crate) async fn create(client: &Client, object: &NewObject) -> Result<()> {
    send(client, "POST", object.collection, Some(&object.body)).await.with_context(|| {
        format!("cannot create {} in {}", object.body["metadata"]["name"], object.collection)
    })
}

/// Creates `objects`, at most `at_once` at a time.
///
/// # Errors
/// The first refusal.
pub(crate) async fn create_all(
    client: &Client,
    objects: impl IntoIterator<Item = NewObject>,
    at_once: usize,
) -> Result<()> {
    let requests = stream::iter(objects).map(|object| async move { create(client, &object).await });
    requests.buffer_unordered(at_once).try_collect().await
}

/// Deletes one object, with the grace that it has.
///
/// # Errors
/// When the API server refuses.
pub(crate) async fn delete(client: &Client, collection: &str, name: &str) -> Result<()> {
    send(client, "DELETE", &format!("{collection}/{name}"), None)
        .await
        .with_context(|| format!("cannot delete {collection}/{name}"))
}

/// Changes the fields of `body` in one object.
///
/// # Errors
/// When the API server refuses.
pub(crate) async fn patch(
    client: &Client,
    collection: &str,
    name: &str,
    body: &Value,
) -> Result<()> {
    send(client, "PATCH", &format!("{collection}/{name}"), Some(body))
        .await
        .with_context(|| format!("cannot change {collection}/{name}"))
}

async fn send(client: &Client, method: &str, path: &str, body: Option<&Value>) -> Result<()> {
    let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
    let request = Request::builder().method(method).uri(path);
    let kind = match method {
        "PATCH" => "application/merge-patch+json",
        _ => "application/json",
    };
    let request = request.header("content-type", kind).body(bytes)?;
    match tokio::time::timeout(PATIENCE, client.request::<IgnoredAny>(request)).await {
        Ok(answer) => answer.map(drop).map_err(Into::into),
        Err(_) => bail!("no answer within {PATIENCE:?}"),
    }
}
