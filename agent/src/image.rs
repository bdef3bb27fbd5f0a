//! Images: finding them in containerd, fetching them from registries, taking them over from archives.
//!
//! Works with containerd 1.6, which cannot pull by itself: blobs go into its content store, layers are unpacked by its
//! diff service, all under a lease until an image name holds them.

pub(crate) mod content;
pub mod garbage;
pub(crate) mod import;
pub(crate) mod pull;
mod reference;
mod registry;
mod remove;
pub(crate) mod unpack;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use containerd_client::services::v1::{
    CreateImageRequest, Image, ListImagesRequest, UpdateImageRequest,
};
use containerd_client::types::Descriptor;
use serde::Deserialize;
use tonic::Code;

use crate::runtime::connection::Connection;
use crate::runtime::types::ImageRef;
use crate::runtime::{RuntimeError, RuntimeOptions};

pub use pull::RegistryCredentials;
pub use reference::Reference;

/// The images of one node.
#[derive(Clone)]
pub(crate) struct ImageStore {
    connection: Connection,
    certs_dir: PathBuf,
    pull_netns: Option<PathBuf>,
    /// Configurations by digest: content never changes.
    configs: Arc<Mutex<HashMap<String, Arc<ResolvedImage>>>>,
    /// Fetches under way, by normalised name: of the same image there is one at a time.
    pulls: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>,
}

/// An image, ready to make containers from.
#[derive(Debug, Clone)]
pub(crate) struct ResolvedImage {
    /// `sha256:…` of the configuration: what Kubernetes calls the image's id.
    pub(crate) id: String,
    pub(crate) repo_digest: String,
    /// The snapshot that containers' root file systems are based on.
    pub(crate) chain_id: String,
    pub(crate) config: ImageConfig,
}

impl ResolvedImage {
    pub(crate) fn reference(&self) -> ImageRef {
        ImageRef { id: self.id.clone(), repo_digest: self.repo_digest.clone() }
    }
}

/// What an image says about its containers.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct ImageConfig {
    pub(crate) user: Option<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub(crate) env: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub(crate) entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub(crate) cmd: Vec<String>,
    pub(crate) working_dir: Option<String>,
    pub(crate) stop_signal: Option<String>,
}

fn null_as_default<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// containerd's label for images that shall stay.
const PINNED: &str = "io.cri-containerd.pinned";

/// One image in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedImage {
    /// `sha256:…` of its configuration. Two manifests may share it.
    pub id: String,
    /// All names of it.
    pub names: Vec<String>,
    pub digest: String,
    /// Bytes of its manifest's configuration and layers.
    pub size: u64,
    pub pinned: bool,
}

impl ImageStore {
    pub(crate) fn new(connection: Connection, options: &RuntimeOptions) -> ImageStore {
        ImageStore {
            connection,
            certs_dir: options.registry_config_dir.clone(),
            pull_netns: options.pull_netns.clone(),
            configs: Arc::default(),
            pulls: Arc::default(),
        }
    }

    /// The image of this name, if it is here and whole.
    pub(crate) async fn status(&self, image: &str) -> Result<Option<ImageRef>, RuntimeError> {
        let name = if image.starts_with("sha256:") {
            image.to_owned()
        } else {
            Reference::parse(image)?.to_string()
        };
        let Some(target) = self.target(&name).await? else { return Ok(None) };
        Ok(Some(self.load(&name, &target).await?.reference()))
    }

    /// An image by the id that [`ImageStore::status`] gave.
    pub(crate) async fn resolve(&self, id: &str) -> Result<Arc<ResolvedImage>, RuntimeError> {
        let cached = self.configs.lock().ok().and_then(|configs| configs.get(id).cloned());
        if let Some(image) = cached {
            return Ok(image);
        }
        let target = self
            .target(id)
            .await?
            .ok_or_else(|| RuntimeError::NotFound { what: "image", id: id.into() })?;
        self.load(id, &target).await
    }

    pub(crate) async fn list(&self) -> Result<Vec<ListedImage>, RuntimeError> {
        let reply = self.connection.images().list(ListImagesRequest::default()).await;
        let images = reply.map_err(RuntimeError::call("list", "images"))?.into_inner().images;
        let mut by_digest: HashMap<String, ListedImage> = HashMap::new();
        for image in images {
            let Some(target) = image.target else { continue };
            let entry = match by_digest.entry(target.digest.clone()) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => {
                    // One whose manifest is gone is listed all the same, so that it can be removed.
                    let (id, size) = content::id_and_size(&self.connection, &target)
                        .await
                        .unwrap_or_else(|_| (target.digest.clone(), 0));
                    let digest = target.digest;
                    let names = Vec::new();
                    place.insert(ListedImage { id, names, digest, size, pinned: false })
                }
            };
            entry.pinned |= image.labels.get(PINNED).is_some_and(|value| value == "pinned");
            if !image.name.starts_with("sha256:") {
                entry.names.push(image.name);
            }
        }
        let mut list: Vec<ListedImage> = by_digest.into_values().collect();
        list.sort_by(|a, b| b.size.cmp(&a.size).then(a.names.cmp(&b.names)));
        Ok(list)
    }

    /// Takes over every image of an OCI archive.
    pub(crate) async fn import(&self, archive: &Path) -> Result<Vec<String>, RuntimeError> {
        import::archive(self, archive).await
    }

    pub(crate) async fn pull(
        &self,
        image: &str,
        credentials: &[RegistryCredentials],
    ) -> Result<ImageRef, RuntimeError> {
        let reference = Reference::parse(image)?;
        let turn = Arc::clone(
            self.pulls
                .lock()
                .map_err(|_| RuntimeError::invalid("a pull panicked"))?
                .entry(reference.to_string())
                .or_default(),
        );
        // One after the other: the later ones find every blob in place, but ask the registry with their own
        // credentials, which may not be good for this image.
        let guard = turn.lock().await;
        let result = pull::image(self, &reference, credentials).await;
        drop(guard);
        if let Ok(mut pulls) = self.pulls.lock() {
            // Ours and the map's: nobody else waits.
            pulls.retain(|_, turn| Arc::strong_count(turn) > 1);
        }
        result
    }

    /// Names `manifest`, whose blobs are in the content store, and unpacks it.
    async fn adopt(
        &self,
        names: &[String],
        manifest: &Descriptor,
        repo_digest: Option<&str>,
    ) -> Result<ImageRef, RuntimeError> {
        let mut image = unpack::unpack(&self.connection, manifest).await?;
        let mut all = names.to_vec();
        all.extend(repo_digest.map(str::to_owned));
        all.push(image.id.clone());
        for name in &all {
            self.name(name, manifest).await?;
        }
        image.repo_digest = repo_digest.unwrap_or(&image.id).to_owned();
        let reference = image.reference();
        if let Ok(mut configs) = self.configs.lock() {
            configs.insert(image.id.clone(), Arc::new(image));
        }
        Ok(reference)
    }

    async fn name(&self, name: &str, target: &Descriptor) -> Result<(), RuntimeError> {
        let image =
            Image { name: name.to_owned(), target: Some(target.clone()), ..Image::default() };
        let create =
            CreateImageRequest { image: Some(image.clone()), ..CreateImageRequest::default() };
        match self.connection.images().create(create).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {
                let update =
                    UpdateImageRequest { image: Some(image), ..UpdateImageRequest::default() };
                let result = self.connection.images().update(update).await;
                result.map(drop).map_err(RuntimeError::call("name image", name))
            }
            Err(status) => Err(RuntimeError::call("name image", name)(status)),
        }
    }

    async fn target(&self, name: &str) -> Result<Option<Descriptor>, RuntimeError> {
        let request = containerd_client::services::v1::GetImageRequest { name: name.to_owned() };
        match self.connection.images().get(request).await {
            Ok(reply) => Ok(reply.into_inner().image.and_then(|image| image.target)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(RuntimeError::call("look up image", name)(status)),
        }
    }

    /// The name by digest that a pull gave to `target`: the digest may be that of an index above it.
    async fn repo_digest(
        &self,
        repository: &str,
        target: &Descriptor,
    ) -> Result<Option<String>, RuntimeError> {
        let filters = vec![format!("target.digest=={}", target.digest)];
        let reply = self.connection.images().list(ListImagesRequest { filters }).await;
        let images = reply.map_err(RuntimeError::call("list", "images"))?.into_inner().images;
        let prefix = format!("{repository}@");
        Ok(images.into_iter().map(|image| image.name).find(|name| name.starts_with(&prefix)))
    }

    async fn load(
        &self,
        name: &str,
        target: &Descriptor,
    ) -> Result<Arc<ResolvedImage>, RuntimeError> {
        let mut image = unpack::read(&self.connection, target).await?;
        image.repo_digest = match Reference::parse(name) {
            Ok(reference) if !name.starts_with("sha256:") => self
                .repo_digest(&reference.repository(), target)
                .await?
                .unwrap_or_else(|| image.id.clone()),
            _ => image.id.clone(),
        };
        let image = Arc::new(image);
        if let Ok(mut configs) = self.configs.lock() {
            configs.insert(image.id.clone(), Arc::clone(&image));
        }
        Ok(image)
    }
}
