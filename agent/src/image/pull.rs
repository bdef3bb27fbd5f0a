//! Fetches images from registries.

use std::collections::HashMap;
use std::path::Path;

use containerd_client::types::Descriptor;
use futures_util::TryStreamExt;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::content::{self, BlobRef, Manifest};
use super::registry::Registry;
use super::{ImageStore, Reference};
use crate::runtime::types::ImageRef;
use crate::runtime::{RuntimeError, lease};

/// Layers of one image that are fetched side by side.
const PARALLEL_LAYERS: usize = 3;

/// Images have a few dozen; more than these are not an image but an attack on the file system that stacks them.
const MOST_LAYERS: usize = 512;

/// The kinds of manifests, as one header.
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// Who we are to a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistryCredentials {
    /// Host (and port) that they are for, as `docker login` was told, e.g. `https://index.docker.io/v1/`.
    pub registry: String,
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for RegistryCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "RegistryCredentials {{ registry: {:?}, username: {:?}, .. }}",
            self.registry, self.username
        )
    }
}

impl RegistryCredentials {
    /// Whether they are for this image's registry (and, where they name one, its path).
    fn fit(&self, reference: &Reference) -> bool {
        let name = self.registry.trim_start_matches("https://").trim_start_matches("http://");
        let name = name.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches("/v2");
        let name = if name == "index.docker.io" { "docker.io" } else { name };
        let repository = reference.repository();
        repository == name || repository.starts_with(&format!("{name}/"))
    }
}

/// Fetches `reference` with the first of the fitting credentials that works, or without any where none fit.
pub(super) async fn image(
    store: &ImageStore,
    reference: &Reference,
    credentials: &[RegistryCredentials],
) -> Result<ImageRef, RuntimeError> {
    let fitting = credentials.iter().filter(|c| c.fit(reference));
    let mut tries: Vec<Option<(String, String)>> =
        fitting.map(|c| Some((c.username.clone(), c.password.clone()))).collect();
    if tries.is_empty() {
        tries.push(None);
    }
    let result = elsewhere(store.clone(), reference.clone(), tries).await;
    result.map_err(|error| match error {
        RuntimeError::Image { message } => RuntimeError::Image {
            message: format!("failed to pull image {:?}: {message}", reference.to_string()),
        },
        other => other,
    })
}

/// Runs the fetch on a thread of its own, in the network namespace that has a way to registries.
async fn elsewhere(
    store: ImageStore,
    reference: Reference,
    tries: Vec<Option<(String, String)>>,
) -> Result<ImageRef, RuntimeError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // When the pod goes, so does its pull, with its thread and connections.
    let cancel = CancellationToken::new();
    let (cancelled, _gives_up) = (cancel.clone(), cancel.drop_guard());
    let work = move || {
        if let Some(netns) = &store.pull_netns {
            keelson_netlink::netns::enter(netns)
                .map_err(|e| RuntimeError::invalid(e.to_string()))?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(RuntimeError::system("start a thread for", "image pull"))?;
        runtime.block_on(under_lease(&store, &reference, tries, &cancelled))
    };
    std::thread::Builder::new()
        .name("image-pull".into())
        .spawn(move || sender.send(work()))
        .map_err(RuntimeError::system("start a thread for", "image pull"))?;
    receiver.await.map_err(|_| RuntimeError::invalid("the pull ended unexpectedly"))?
}

/// What is fetched is kept from containerd's garbage collection until it belongs to an image. The lease goes in any case,
/// also when the pull is given up.
async fn under_lease(
    store: &ImageStore,
    reference: &Reference,
    tries: Vec<Option<(String, String)>>,
    cancelled: &CancellationToken,
) -> Result<ImageRef, RuntimeError> {
    let lease = lease::create(&store.connection, "pull").await?;
    let leased = ImageStore { connection: store.connection.under_lease(&lease), ..store.clone() };
    let fetch = cancelled.run_until_cancelled(fetch_with(&leased, reference, tries));
    let result = fetch.await;
    lease::delete(&store.connection, &lease).await;
    result.unwrap_or_else(|| Err(RuntimeError::invalid("the pull was given up")))
}

async fn fetch_with(
    store: &ImageStore,
    reference: &Reference,
    tries: Vec<Option<(String, String)>>,
) -> Result<ImageRef, RuntimeError> {
    let mut last = RuntimeError::Image { message: "there are no credentials to try".into() };
    for login in tries {
        match fetch(store, reference, login).await {
            Ok(image) => return Ok(image),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn fetch(
    store: &ImageStore,
    reference: &Reference,
    login: Option<(String, String)>,
) -> Result<ImageRef, RuntimeError> {
    let host = reference.registry();
    let plain = is_local(host) || is_plain_by_config(&store.certs_dir, host);
    let registry = Registry::new(host, reference.path(), plain, login).map_err(|e| failed(&e))?;
    let wanted = reference.digest().or(reference.tag()).unwrap_or("latest");
    let mut text = registry.manifest(wanted, ACCEPTED).await.map_err(|e| failed(&e))?;
    let mut digest = reference.digest().map_or_else(|| digest_of(&text), str::to_owned);
    check_digest(&text, &digest)?;
    let asked = digest.clone();
    let mut manifest: Manifest = content::parse("manifest", &digest, &text)?;
    if manifest.config.is_none() {
        let chosen = select_platform(&manifest.manifests, &reference.to_string())?;
        digest.clone_from(&chosen.digest);
        text = registry.manifest(&digest, ACCEPTED).await.map_err(|e| failed(&e))?;
        check_digest(&text, &digest)?;
        manifest = content::parse("manifest", &digest, &text)?;
    }
    if manifest.layers.len() > MOST_LAYERS {
        let message =
            format!("the image has {} layers, at most {MOST_LAYERS}", manifest.layers.len());
        return Err(RuntimeError::Image { message });
    }
    let config = manifest.config.iter();
    futures_util::stream::iter(config.chain(&manifest.layers).map(Ok))
        .try_for_each_concurrent(PARALLEL_LAYERS, |blob| {
            fetch_blob(store, &registry, reference, blob)
        })
        .await?;
    let target = Descriptor {
        media_type: media_type(&text),
        digest: digest.clone(),
        size: i64::try_from(text.len()).unwrap_or(0),
        ..Descriptor::default()
    };
    content::write_bytes(&store.connection, &target, HashMap::new(), text.to_vec()).await?;
    // The name by digest is that of what the registry was asked for: of an index, if it is one.
    let repo_digest = format!("{}@{asked}", reference.repository());
    store.adopt(&[reference.to_string()], &target, Some(&repo_digest)).await
}

async fn fetch_blob(
    store: &ImageStore,
    registry: &Registry,
    reference: &Reference,
    blob: &BlobRef,
) -> Result<(), RuntimeError> {
    if content::has(&store.connection, &blob.digest).await {
        return Ok(());
    }
    let size = u64::try_from(blob.size).map_err(|_| RuntimeError::Image {
        message: format!("blob {} has the size {}", blob.digest, blob.size),
    })?;
    let parts = registry.blob(&blob.digest, size).await.map_err(|e| failed(&e))?;
    let source = format!("containerd.io/distribution.source.{}", reference.registry());
    let labels = HashMap::from([(source, reference.path().to_owned())]);
    content::write(&store.connection, &blob.descriptor(), labels, parts).await
}

/// The image for this machine out of an index.
pub(crate) fn select_platform<'a>(
    manifests: &'a [BlobRef],
    name: &str,
) -> Result<&'a BlobRef, RuntimeError> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let fits = |entry: &&BlobRef| match &entry.platform {
        Some(platform) => platform.os == "linux" && platform.architecture == architecture,
        None => manifests.len() == 1,
    };
    manifests.iter().find(fits).ok_or_else(|| {
        let offered: Vec<String> = manifests
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            .map(|p| {
                format!("{}/{}{}", p.os, p.architecture, p.variant.as_deref().unwrap_or_default())
            })
            .collect();
        RuntimeError::Image {
            message: format!(
                "{name} has no image for linux/{architecture}, only for {}",
                offered.join(", ")
            ),
        }
    })
}

fn digest_of(text: &[u8]) -> String {
    let hex: String = Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

fn check_digest(text: &[u8], digest: &str) -> Result<(), RuntimeError> {
    if digest == digest_of(text) {
        return Ok(());
    }
    Err(RuntimeError::Image {
        message: format!("the registry's manifest is not the one of digest {digest}"),
    })
}

fn media_type(manifest: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(manifest).unwrap_or_default();
    value["mediaType"].as_str().unwrap_or("application/vnd.oci.image.manifest.v1+json").to_owned()
}

/// A registry on this very machine is reached without TLS, as every container engine has it.
fn is_local(registry: &str) -> bool {
    let host =
        registry.rsplit_once(':').map_or(registry, |(host, _)| host).trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// `<certs.d>/<host:port>/hosts.toml` with a server (or a host) under http://.
fn is_plain_by_config(certs_dir: &Path, registry: &str) -> bool {
    let Ok(text) = std::fs::read_to_string(certs_dir.join(registry).join("hosts.toml")) else {
        return false;
    };
    names_plain(&text, registry)
}

pub(crate) fn names_plain(text: &str, registry: &str) -> bool {
    let lines = text.lines().map(str::trim);
    lines
        .filter(|line| line.starts_with("server") || line.starts_with("[host."))
        .any(|line| line.contains(&format!("\"http://{registry}\"")))
}

fn failed(error: &(dyn std::error::Error + 'static)) -> RuntimeError {
    RuntimeError::Image { message: crate::runtime::chain(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_fit_their_registry_and_no_other() {
        let fit = |registry: &str, image: &str| {
            let c = RegistryCredentials {
                registry: registry.into(),
                username: "u".into(),
                password: "p".into(),
            };
            c.fit(&Reference::parse(image).unwrap())
        };
        assert!(fit("https://index.docker.io/v1/", "nginx"));
        assert!(fit("registry.example.com:5000", "registry.example.com:5000/a/b"));
        assert!(fit("quay.io/team", "quay.io/team/app"));
        assert!(!fit("quay.io/team", "quay.io/teamster/app"));
        assert!(!fit("example.com", "example.com.evil.org/app"));
    }

    #[test]
    fn passwords_are_not_printed() {
        let c = RegistryCredentials {
            registry: "r".into(),
            username: "u".into(),
            password: "secret".into(),
        };
        assert!(!format!("{c:?}").contains("secret"));
    }

    #[test]
    fn only_loopback_is_local() {
        for (registry, local) in [
            ("localhost:5000", true),
            ("127.0.0.1:5000", true),
            ("[::1]:5000", true),
            ("10.0.0.1:5000", false),
            ("a.io", false),
        ] {
            assert_eq!(is_local(registry), local, "{registry}");
        }
    }
}
