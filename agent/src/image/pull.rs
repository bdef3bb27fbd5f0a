//! Fetches images from registries.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use containerd_client::types::Descriptor;
use futures_util::{StreamExt, TryStreamExt};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, RegistryOperation};
use sha2::{Digest, Sha256};

use super::content::{self, BlobRef, Manifest};
use super::{ImageStore, Reference};
use crate::runtime::types::ImageRef;
use crate::runtime::{RuntimeError, lease};

/// Layers of one image that are fetched side by side.
const PARALLEL_LAYERS: usize = 3;

/// A registry that does not answer must not hold up everybody who wants the same image.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Between two pieces of a blob.
const READ_LIMIT: Duration = Duration::from_secs(60);

const ACCEPTED: &[&str] = &[
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

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
    let mut tries: Vec<RegistryAuth> = credentials
        .iter()
        .filter(|c| c.fit(reference))
        .map(|c| RegistryAuth::Basic(c.username.clone(), c.password.clone()))
        .collect();
    if tries.is_empty() {
        tries.push(RegistryAuth::Anonymous);
    }
    let lease = lease::create(&store.connection, "pull").await?;
    let leased = ImageStore { connection: store.connection.under_lease(&lease), ..store.clone() };
    let result = elsewhere(leased, reference.clone(), tries).await;
    lease::delete(&store.connection, &lease).await;
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
    tries: Vec<RegistryAuth>,
) -> Result<ImageRef, RuntimeError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let work = move || {
        if let Some(netns) = &store.pull_netns {
            keelson_netlink::netns::enter(netns)
                .map_err(|e| RuntimeError::invalid(e.to_string()))?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(RuntimeError::system("start a thread for", "image pull"))?;
        runtime.block_on(fetch_with(&store, &reference, &tries))
    };
    std::thread::Builder::new()
        .name("image-pull".into())
        .spawn(move || sender.send(work()))
        .map_err(RuntimeError::system("start a thread for", "image pull"))?;
    receiver.await.map_err(|_| RuntimeError::invalid("the pull ended unexpectedly"))?
}

async fn fetch_with(
    store: &ImageStore,
    reference: &Reference,
    tries: &[RegistryAuth],
) -> Result<ImageRef, RuntimeError> {
    let mut last = RuntimeError::Image { message: "there are no credentials to try".into() };
    for auth in tries {
        let client = client(store, reference);
        let name = oci_reference(reference)?;
        match client.auth(&name, auth, RegistryOperation::Pull).await {
            Ok(_) => {}
            Err(error) => {
                last = failed(&error);
                continue;
            }
        }
        match fetch(store, reference, &client, auth).await {
            Ok(image) => return Ok(image),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn fetch(
    store: &ImageStore,
    reference: &Reference,
    client: &Client,
    auth: &RegistryAuth,
) -> Result<ImageRef, RuntimeError> {
    let name = oci_reference(reference)?;
    let (mut text, mut digest) =
        client.pull_manifest_raw(&name, auth, ACCEPTED).await.map_err(|e| failed(&e))?;
    check_digest(&text, &digest)?;
    let asked = digest.clone();
    let mut manifest: Manifest = content::parse("manifest", &digest, &text)?;
    if manifest.config.is_none() {
        let chosen = select_platform(&manifest.manifests, &reference.to_string())?;
        digest.clone_from(&chosen.digest);
        let by_digest = name.clone_with_digest(digest.clone());
        text =
            client.pull_manifest_raw(&by_digest, auth, ACCEPTED).await.map_err(|e| failed(&e))?.0;
        check_digest(&text, &digest)?;
        manifest = content::parse("manifest", &digest, &text)?;
    }
    let config = manifest.config.iter();
    futures_util::stream::iter(config.chain(&manifest.layers).map(Ok))
        .try_for_each_concurrent(PARALLEL_LAYERS, |blob| {
            fetch_blob(store, client, &name, reference, blob)
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
    client: &Client,
    name: &oci_client::Reference,
    reference: &Reference,
    blob: &BlobRef,
) -> Result<(), RuntimeError> {
    if content::has(&store.connection, &blob.digest).await {
        return Ok(());
    }
    let descriptor = OciDescriptor {
        media_type: blob.media_type.clone(),
        digest: blob.digest.clone(),
        size: blob.size,
        ..OciDescriptor::default()
    };
    let stream = client.pull_blob_stream(name, &descriptor).await.map_err(|e| failed(&e))?;
    let digest = blob.digest.clone();
    let parts = stream.stream.map(move |part| match part {
        Ok(bytes) => Ok(bytes.to_vec()),
        Err(error) => Err(format!("layer {digest}: {error}")),
    });
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

fn check_digest(text: &[u8], digest: &str) -> Result<(), RuntimeError> {
    let hex: String = Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect();
    if digest == format!("sha256:{hex}") {
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

fn client(store: &ImageStore, reference: &Reference) -> Client {
    let plain = is_local(reference.registry())
        || is_plain_by_config(&store.certs_dir, reference.registry());
    let protocol = if plain { ClientProtocol::Http } else { ClientProtocol::Https };
    Client::new(ClientConfig {
        protocol,
        connect_timeout: Some(CONNECT_LIMIT),
        read_timeout: Some(READ_LIMIT),
        ..ClientConfig::default()
    })
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

fn oci_reference(reference: &Reference) -> Result<oci_client::Reference, RuntimeError> {
    let (registry, path) = (reference.registry().to_owned(), reference.path().to_owned());
    let (tag, digest) = (reference.tag().map(str::to_owned), reference.digest().map(str::to_owned));
    Ok(match (tag, digest) {
        (_, Some(digest)) => oci_client::Reference::with_digest(registry, path, digest),
        (tag, None) => {
            oci_client::Reference::with_tag(registry, path, tag.unwrap_or_else(|| "latest".into()))
        }
    })
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
