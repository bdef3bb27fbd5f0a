//! From layers in the content store to the snapshot that containers start from.

use std::collections::HashMap;

use containerd_client::services::v1::ApplyRequest;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::types::Descriptor;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tonic::Code;

use super::content::{self, BlobRef, Manifest};
use super::{ImageConfig, ResolvedImage};
use crate::runtime::RuntimeError;
use crate::runtime::connection::Connection;
use crate::runtime::container::SNAPSHOTTER;

#[derive(Deserialize)]
pub(crate) struct ConfigFile {
    #[serde(default)]
    config: Option<ImageConfig>,
    pub(crate) rootfs: RootFs,
}

#[derive(Deserialize)]
pub(crate) struct RootFs {
    pub(crate) diff_ids: Vec<String>,
}

/// Reads an image's manifest and configuration.
pub(super) async fn read(
    connection: &Connection,
    target: &Descriptor,
) -> Result<ResolvedImage, RuntimeError> {
    Ok(load(connection, target).await?.2)
}

async fn load(
    connection: &Connection,
    target: &Descriptor,
) -> Result<(Vec<BlobRef>, Vec<String>, ResolvedImage), RuntimeError> {
    let text = content::read(connection, &target.digest).await?;
    let manifest: Manifest = content::parse("manifest", &target.digest, &text)?;
    let config = manifest.config.ok_or_else(|| RuntimeError::Image {
        message: format!("manifest {} names no configuration", target.digest),
    })?;
    let text = content::read(connection, &config.digest).await?;
    let file: ConfigFile = content::parse("image configuration", &config.digest, &text)?;
    let diff_ids = file.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        return Err(RuntimeError::Image {
            message: format!(
                "image {} has {} layers but its configuration names {}",
                target.digest,
                manifest.layers.len(),
                diff_ids.len()
            ),
        });
    }
    let image = ResolvedImage {
        id: config.digest.clone(),
        repo_digest: config.digest,
        chain_id: chain_ids(&diff_ids).pop().unwrap_or_default(),
        config: file.config.unwrap_or_default(),
    };
    Ok((manifest.layers, diff_ids, image))
}

/// Unpacks every layer that is not unpacked yet. The layers' blobs must be here, under the caller's lease.
pub(super) async fn unpack(
    connection: &Connection,
    target: &Descriptor,
) -> Result<ResolvedImage, RuntimeError> {
    let (layers, diff_ids, image) = load(connection, target).await?;
    let chain = chain_ids(&diff_ids);
    for (position, layer) in layers.iter().enumerate() {
        let parent = if position == 0 { "" } else { chain[position - 1].as_str() };
        unpack_layer(connection, layer, &diff_ids[position], parent, &chain[position]).await?;
    }
    let mut labels = HashMap::new();
    labels.insert(format!("containerd.io/gc.ref.snapshot.{SNAPSHOTTER}"), image.chain_id.clone());
    content::label(connection, &image.id, labels).await?;
    let mut children = HashMap::new();
    children.insert("containerd.io/gc.ref.content.config".to_owned(), image.id.clone());
    for (position, layer) in layers.iter().enumerate() {
        children.insert(format!("containerd.io/gc.ref.content.l.{position}"), layer.digest.clone());
    }
    content::label(connection, &target.digest, children).await?;
    Ok(image)
}

async fn unpack_layer(
    connection: &Connection,
    layer: &BlobRef,
    diff_id: &str,
    parent: &str,
    chain_id: &str,
) -> Result<(), RuntimeError> {
    let mut snapshots = connection.snapshots();
    let stat = StatSnapshotRequest { snapshotter: SNAPSHOTTER.into(), key: chain_id.to_owned() };
    if snapshots.stat(stat).await.is_ok() {
        return Ok(());
    }
    let key = format!("extract-{} {chain_id}", uuid::Uuid::new_v4());
    let prepare = PrepareSnapshotRequest {
        snapshotter: SNAPSHOTTER.into(),
        key: key.clone(),
        parent: parent.to_owned(),
        ..PrepareSnapshotRequest::default()
    };
    let mounts = snapshots
        .prepare(prepare)
        .await
        .map_err(RuntimeError::call("prepare a snapshot for layer", &layer.digest))?
        .into_inner()
        .mounts;
    let apply = ApplyRequest { diff: Some(layer.descriptor()), mounts, ..ApplyRequest::default() };
    let result = match connection.diff().apply(apply).await {
        // What was unpacked must be what the configuration names: the snapshot serves every image with this chain.
        Ok(reply) if reply.get_ref().applied.as_ref().is_none_or(|blob| blob.digest != diff_id) => {
            let message = format!(
                "layer {} does not hold what the image's configuration names",
                layer.digest
            );
            Err(RuntimeError::Image { message })
        }
        Ok(_) => {
            let commit = CommitSnapshotRequest {
                snapshotter: SNAPSHOTTER.into(),
                name: chain_id.to_owned(),
                key: key.clone(),
                ..CommitSnapshotRequest::default()
            };
            match snapshots.commit(commit).await {
                Ok(_) => return Ok(()),
                // Somebody else unpacked the same layer meanwhile.
                Err(status) if status.code() == Code::AlreadyExists => Ok(()),
                Err(status) => Err(RuntimeError::call("keep layer", &layer.digest)(status)),
            }
        }
        Err(status) => Err(RuntimeError::call("unpack layer", &layer.digest)(status)),
    };
    // What was begun is of no use; the first error counts.
    drop(snapshots.remove(RemoveSnapshotRequest { snapshotter: SNAPSHOTTER.into(), key }).await);
    result
}

/// `ChainID(n) = sha256(ChainID(n-1) + " " + DiffID(n))`, the OCI image specification's name for a stack of layers.
pub(crate) fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.clone(),
            Some(parent) => {
                let hex: String = Sha256::digest(format!("{parent} {diff_id}"))
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect();
                format!("sha256:{hex}")
            }
        };
        chain.push(next);
    }
    chain
}
