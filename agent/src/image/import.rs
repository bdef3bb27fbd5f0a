//! Takes images over from an OCI archive (`docker save` of today and every OCI tool write one).

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use containerd_client::types::Descriptor;
use tokio::sync::mpsc;

use super::content::{self, BlobRef, CHUNK, Manifest};
use super::pull::select_platform;
use super::{ImageStore, Reference};
use crate::runtime::{RuntimeError, lease};

/// Larger documents in an archive are not what they claim to be.
const MAX_DOCUMENT: u64 = 8 << 20;

/// A file of the archive on its way into the content store.
pub(crate) struct Blob {
    pub(crate) digest: String,
    size: i64,
    pub(crate) parts: mpsc::Receiver<Result<Vec<u8>, String>>,
}

pub(super) async fn archive(store: &ImageStore, path: &Path) -> Result<Vec<String>, RuntimeError> {
    let lease = lease::create(&store.connection, "import").await?;
    let leased = ImageStore { connection: store.connection.under_lease(&lease), ..store.clone() };
    let result = import(&leased, path).await;
    lease::delete(&store.connection, &lease).await;
    result
}

async fn import(store: &ImageStore, path: &Path) -> Result<Vec<String>, RuntimeError> {
    let shown = path.display().to_string();
    let bad = |why: String| RuntimeError::Image {
        message: format!("{shown} is not an OCI archive: {why}"),
    };
    let (sender, mut blobs) = mpsc::channel::<Blob>(1);
    let file = path.to_owned();
    let reader = tokio::task::spawn_blocking(move || read_archive(&file, &sender));
    while let Some(blob) = blobs.recv().await {
        let descriptor =
            Descriptor { digest: blob.digest, size: blob.size, ..Descriptor::default() };
        if content::has(&store.connection, &descriptor.digest).await {
            // Its parts are not wanted; the reader notices that nobody takes them.
            continue;
        }
        let parts = futures_util::stream::unfold(blob.parts, |mut parts| async move {
            parts.recv().await.map(|part| (part, parts))
        });
        content::write(&store.connection, &descriptor, HashMap::new(), parts).await?;
    }
    let index = reader.await.map_err(|e| bad(e.to_string()))?.map_err(bad)?;
    let index: Manifest =
        serde_json::from_slice(&index).map_err(|e| bad(format!("index.json: {e}")))?;
    let mut names = Vec::new();
    for entry in &index.manifests {
        names.extend(adopt(store, entry).await?);
    }
    if names.is_empty() {
        return Err(bad(
            "index.json names no image (annotation io.containerd.image.name)".to_owned()
        ));
    }
    Ok(names)
}

async fn adopt(store: &ImageStore, entry: &BlobRef) -> Result<Vec<String>, RuntimeError> {
    let annotation = |key: &str| entry.annotations.get(key).cloned();
    let name = annotation("io.containerd.image.name")
        .or_else(|| annotation("org.opencontainers.image.ref.name"));
    let Some(name) = name else { return Ok(Vec::new()) };
    let name = Reference::parse(&name)?.to_string();
    let text = content::read(&store.connection, &entry.digest).await?;
    let document: Manifest = content::parse("manifest", &entry.digest, &text)?;
    let manifest = match document.config {
        Some(_) => entry.descriptor(),
        None => select_platform(&document.manifests, &name)?.descriptor(),
    };
    store.adopt(std::slice::from_ref(&name), &manifest, None).await?;
    Ok(vec![name])
}

/// Sends every blob, and returns the text of `index.json`. Blocking.
fn read_archive(path: &Path, blobs: &mpsc::Sender<Blob>) -> Result<Vec<u8>, String> {
    read_entries(File::open(path).map_err(|e| e.to_string())?, blobs)
}

pub(crate) fn read_entries(file: impl Read, blobs: &mpsc::Sender<Blob>) -> Result<Vec<u8>, String> {
    let mut index = None;
    let mut archive = tar::Archive::new(file);
    for entry in archive.entries().map_err(|e| e.to_string())? {
        let mut entry = entry.map_err(|e| e.to_string())?;
        let name = entry
            .path()
            .map_err(|e| e.to_string())?
            .to_string_lossy()
            .trim_start_matches("./")
            .to_owned();
        if name == "index.json" {
            let mut text = Vec::new();
            entry.by_ref().take(MAX_DOCUMENT).read_to_end(&mut text).map_err(|e| e.to_string())?;
            index = Some(text);
        } else if let Some(hex) = name.strip_prefix("blobs/sha256/").filter(|hex| !hex.is_empty()) {
            let size = i64::try_from(entry.size()).map_err(|e| e.to_string())?;
            let (sender, parts) = mpsc::channel(2);
            let blob = Blob { digest: format!("sha256:{hex}"), size, parts };
            if blobs.blocking_send(blob).is_err() {
                return Err("the import was given up".to_owned());
            }
            send_parts(&mut entry, &sender);
        }
    }
    index.ok_or_else(|| "it has no index.json".to_owned())
}

fn send_parts(entry: &mut impl Read, sender: &mpsc::Sender<Result<Vec<u8>, String>>) {
    loop {
        let mut part = vec![0; CHUNK];
        let (done, message) = match entry.read(&mut part) {
            Ok(0) => return,
            Ok(length) => {
                part.truncate(length);
                (false, Ok(part))
            }
            Err(error) => (true, Err(error.to_string())),
        };
        if sender.blocking_send(message).is_err() || done {
            return;
        }
    }
}
