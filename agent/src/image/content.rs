//! containerd's content store: blobs by digest.

use std::collections::HashMap;

use containerd_client::services::v1::{
    Info, InfoRequest, ReadContentRequest, UpdateRequest, WriteAction, WriteContentRequest,
};
use containerd_client::types::Descriptor;
use futures_util::{Stream, StreamExt};
use prost_types::FieldMask;
use serde::Deserialize;
use tonic::Code;

use crate::runtime::RuntimeError;
use crate::runtime::connection::Connection;

/// One message of a write: well below what containerd accepts in one.
pub(super) const CHUNK: usize = 1 << 20;

/// Manifests and configurations are small; whatever claims to be one and is not must not fill our memory.
const MAX_DOCUMENT: usize = 8 << 20;

/// A blob's place in a manifest.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BlobRef {
    #[serde(default)]
    pub(super) media_type: String,
    pub(crate) digest: String,
    pub(crate) size: i64,
    #[serde(default)]
    pub(super) platform: Option<Platform>,
    #[serde(default)]
    pub(super) annotations: HashMap<String, String>,
}

impl BlobRef {
    pub(super) fn descriptor(&self) -> Descriptor {
        Descriptor {
            media_type: self.media_type.clone(),
            digest: self.digest.clone(),
            size: self.size,
            ..Descriptor::default()
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Platform {
    pub(super) architecture: String,
    pub(super) os: String,
    #[serde(default)]
    pub(super) variant: Option<String>,
}

/// An image manifest (OCI or Docker) or an index of such.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    #[serde(default)]
    pub(crate) config: Option<BlobRef>,
    #[serde(default)]
    pub(crate) layers: Vec<BlobRef>,
    #[serde(default)]
    pub(crate) manifests: Vec<BlobRef>,
}

pub(crate) fn parse<'a, T: Deserialize<'a>>(
    what: &str,
    digest: &str,
    text: &'a [u8],
) -> Result<T, RuntimeError> {
    serde_json::from_slice(text).map_err(|e| RuntimeError::Image {
        message: format!("{what} {digest} cannot be read: {e}"),
    })
}

/// Whether the whole blob is here.
pub(super) async fn has(connection: &Connection, digest: &str) -> bool {
    connection.content().info(InfoRequest { digest: digest.to_owned() }).await.is_ok()
}

/// Reads a small blob.
pub(super) async fn read(connection: &Connection, digest: &str) -> Result<Vec<u8>, RuntimeError> {
    let fail = || RuntimeError::call("read blob", digest);
    let request = ReadContentRequest { digest: digest.to_owned(), ..ReadContentRequest::default() };
    let mut stream = connection.content().read(request).await.map_err(fail())?.into_inner();
    let mut data = Vec::new();
    while let Some(part) = stream.message().await.map_err(fail())? {
        data.extend_from_slice(&part.data);
        if data.len() > MAX_DOCUMENT {
            return Err(RuntimeError::Image {
                message: format!("blob {digest} is too large for what it should be"),
            });
        }
    }
    Ok(data)
}

/// Writes a blob that arrives in parts; containerd checks size and digest.
pub(super) async fn write(
    connection: &Connection,
    blob: &Descriptor,
    labels: HashMap<String, String>,
    parts: impl Stream<Item = Result<Vec<u8>, String>> + Send + 'static,
) -> Result<(), RuntimeError> {
    let digest = blob.digest.clone();
    let (failed, failure) = std::sync::mpsc::channel::<String>();
    let first = WriteContentRequest {
        action: WriteAction::Write.into(),
        // Unique: a write that another one left unfinished must not be continued with other data.
        r#ref: format!("keelson-{}-{}", uuid::Uuid::new_v4(), digest),
        total: blob.size,
        expected: digest.clone(),
        ..WriteContentRequest::default()
    };
    let (reference, total, expected) = (first.r#ref.clone(), blob.size, digest.clone());
    let mut offset = 0_i64;
    let writes = parts
        .take_while(move |part| {
            let failed = failed.clone();
            let ok = match part {
                Ok(_) => true,
                Err(error) => {
                    // Nobody listens any more once the write itself has failed.
                    drop(failed.send(error.clone()));
                    false
                }
            };
            std::future::ready(ok)
        })
        .map(move |part| {
            let data = part.unwrap_or_default();
            let at = offset;
            offset += i64::try_from(data.len()).unwrap_or(i64::MAX);
            WriteContentRequest {
                action: WriteAction::Write.into(),
                offset: at,
                data,
                ..WriteContentRequest::default()
            }
        });
    let commit = WriteContentRequest {
        action: WriteAction::Commit.into(),
        r#ref: reference,
        total,
        offset: total,
        expected,
        labels,
        ..WriteContentRequest::default()
    };
    let stream = futures_util::stream::iter([first])
        .chain(writes)
        .chain(futures_util::stream::iter([commit]));
    let result = async {
        let mut replies = connection.content().write(stream).await?.into_inner();
        while replies.message().await?.is_some() {}
        Ok::<(), tonic::Status>(())
    }
    .await;
    if let Ok(error) = failure.try_recv() {
        return Err(RuntimeError::Image { message: error });
    }
    match result {
        Ok(()) => Ok(()),
        Err(status) if status.code() == Code::AlreadyExists => Ok(()),
        Err(status) => Err(RuntimeError::call("store blob", &digest)(status)),
    }
}

/// Writes a blob that is in memory.
pub(super) async fn write_bytes(
    connection: &Connection,
    blob: &Descriptor,
    labels: HashMap<String, String>,
    data: Vec<u8>,
) -> Result<(), RuntimeError> {
    let parts: Vec<Result<Vec<u8>, String>> =
        data.chunks(CHUNK).map(|part| Ok(part.to_vec())).collect();
    write(connection, blob, labels, futures_util::stream::iter(parts)).await
}

/// Sets labels on a blob that is here, for example references for containerd's garbage collection.
pub(super) async fn label(
    connection: &Connection,
    digest: &str,
    labels: HashMap<String, String>,
) -> Result<(), RuntimeError> {
    let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
    let info = Info { digest: digest.to_owned(), labels, ..Info::default() };
    let request = UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
    connection
        .content()
        .update(request)
        .await
        .map(drop)
        .map_err(RuntimeError::call("label blob", digest))
}

/// An image's id, and the bytes of its configuration and layers.
pub(super) async fn id_and_size(
    connection: &Connection,
    target: &Descriptor,
) -> Result<(String, u64), RuntimeError> {
    let text = read(connection, &target.digest).await?;
    let manifest: Manifest = parse("manifest", &target.digest, &text)?;
    let blobs = manifest.config.iter().chain(&manifest.layers);
    let size = blobs.map(|blob| u64::try_from(blob.size).unwrap_or(0)).sum();
    Ok((manifest.config.map_or_else(|| target.digest.clone(), |config| config.digest), size))
}
