//! The sandbox's own program: embedded, written once per start to a read-only root file system of its own. No image, no
//! snapshot, nothing to pull or to collect.

use std::fs;
use std::path::{Path, PathBuf};

use super::RuntimeError;

/// Built by build.rs from `agent/pause/main.rs`.
static PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));

/// The program's path in its root file system.
pub(crate) const PATH: &str = "/pause";

/// The folder of the root file system.
pub(crate) fn rootfs(run_dir: &Path) -> PathBuf {
    run_dir.join("pause")
}

/// Writes the root file system.
pub(crate) fn install(run_dir: &Path) -> Result<(), RuntimeError> {
    let rootfs = rootfs(run_dir);
    for folder in ["proc", "sys", "dev"] {
        let path = rootfs.join(folder);
        fs::create_dir_all(&path).map_err(RuntimeError::system("create", &path))?;
    }
    let program = rootfs.join("pause");
    // Never written in place: older sandboxes run this file.
    if fs::read(&program).is_ok_and(|there| there == PROGRAM) {
        return Ok(());
    }
    keelson_durable::write(&program, PROGRAM, 0o555).map_err(|error| RuntimeError::System {
        action: "write",
        path: program.clone(),
        source: error.source,
    })
}
