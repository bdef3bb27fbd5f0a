//! How containers ended: one small file each, on the disk before containerd may forget the task.

use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::RuntimeError;
use super::types::Exit;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Stored {
    code: i32,
    reason: String,
    message: String,
    started_at: Option<Timestamp>,
    finished_at: Timestamp,
}

/// Reads the end of container `id`, if it is known.
pub(crate) fn read(root_dir: &Path, id: &str) -> Option<Exit> {
    let text = fs::read(path(root_dir, id)).ok()?;
    let stored: Stored = serde_json::from_slice(&text).ok()?;
    Some(Exit {
        code: stored.code,
        reason: stored.reason,
        message: stored.message,
        started_at: stored.started_at,
        finished_at: stored.finished_at,
    })
}

/// Writes the end of container `id`.
///
/// # Errors
/// When it cannot be made durable: the task must not be deleted then.
pub(crate) fn write(root_dir: &Path, id: &str, exit: &Exit) -> Result<(), RuntimeError> {
    let path = path(root_dir, id);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(RuntimeError::system("create", folder))?;
    }
    let stored = Stored {
        code: exit.code,
        reason: exit.reason.clone(),
        message: exit.message.clone(),
        started_at: exit.started_at,
        finished_at: exit.finished_at,
    };
    let text = serde_json::to_vec(&stored).map_err(|e| RuntimeError::invalid(e.to_string()))?;
    keelson_durable::write(&path, &text, 0o600).map_err(|error| RuntimeError::System {
        action: "write",
        path,
        source: error.source,
    })
}

/// Forgets the end of container `id`.
pub(crate) fn remove(root_dir: &Path, id: &str) {
    // One that stays is of a container that no longer exists: it is never read again.
    drop(fs::remove_file(path(root_dir, id)));
}

fn path(root_dir: &Path, id: &str) -> PathBuf {
    root_dir.join("exits").join(id)
}
