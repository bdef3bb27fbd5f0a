//! `hostPath`: the node's own files, checked as the manifest says.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Checks, and for the `…OrCreate` types makes, what is at `path`. The problem is worded to follow the path.
pub(super) fn check(path: &Path, kind: &str) -> Result<(), String> {
    if !path.is_absolute() || path.components().any(|c| c == std::path::Component::ParentDir) {
        return Err("must be absolute and without \"..\"".into());
    }
    match kind {
        "" => return Ok(()),
        "DirectoryOrCreate" if !path.exists() => {
            let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
            return made.map_err(|e| format!("cannot be made: {e}"));
        }
        "FileOrCreate" if !path.exists() => {
            let made = fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(path);
            return made.map(drop).map_err(|e| format!("cannot be made: {e}"));
        }
        _ => {}
    }
    let found = fs::metadata(path).map_err(|e| format!("cannot be used: {e}"))?.file_type();
    let (fits, wanted) = match kind {
        "Directory" | "DirectoryOrCreate" => (found.is_dir(), "a directory"),
        "File" | "FileOrCreate" => (found.is_file(), "a file"),
        "Socket" => (found.is_socket(), "a socket"),
        "CharDevice" => (found.is_char_device(), "a character device"),
        "BlockDevice" => (found.is_block_device(), "a block device"),
        other => return Err(format!("has the unknown type {other}")),
    };
    if fits { Ok(()) } else { Err(format!("is not {wanted}")) }
}
