//! Files that survive a power cut.
//!
//! Every state file of keelson is written through this crate: to a temporary name in the same folder, fsynced, renamed
//! over the old one, and the folder fsynced. A reader therefore sees the old content or the new, never a part, and after
//! a crash at any instant one of the two is on the disk. Left-over temporary files start with [`TEMP_PREFIX`] and may be
//! removed by whoever owns the folder.
#![warn(missing_docs)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What the names of unfinished files start with.
pub const TEMP_PREFIX: &str = ".keelson-tmp-";

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A step of a durable write that the system refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {path}")]
pub struct DurableError {
    /// What was being done, e.g. `create` or `rename`.
    pub step: &'static str,
    /// The file it was done to.
    pub path: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// Replaces `path` by a file with `content` and the permission bits `mode`, whatever the umask.
///
/// # Errors
/// The first step that failed; `path` is then untouched and the temporary file is gone.
pub fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), DurableError> {
    let temp = temp_name(path);
    let fail = |step, source| DurableError { step, path: path.to_owned(), source };
    let result = write_temp(&temp, content, mode)
        .map_err(|e| fail("write", e))
        .and_then(|()| fs::rename(&temp, path).map_err(|e| fail("rename a new file to", e)));
    if let Err(error) = result {
        // The write already failed; what it left behind is only untidy.
        drop(fs::remove_file(&temp));
        return Err(error);
    }
    sync_parent(path)
}

/// Removes `path` and makes the removal durable. A file that is not there is a success.
///
/// # Errors
/// When the file exists and cannot be removed, or its folder cannot be synced.
pub fn remove(path: &Path) -> Result<(), DurableError> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(DurableError { step: "remove", path: path.to_owned(), source }),
    }
}

/// Makes a creation, rename or removal in `path`'s folder durable.
///
/// # Errors
/// When the folder cannot be opened or synced.
pub fn sync_parent(path: &Path) -> Result<(), DurableError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|source| DurableError {
        step: "sync the folder of",
        path: path.to_owned(),
        source,
    })
}

fn write_temp(temp: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let create = || OpenOptions::new().write(true).create_new(true).mode(mode).open(temp);
    let mut file = match create() {
        // A process with the same id lost power while it wrote: the first process of a container, or one early at boot.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(temp)?;
            create()?
        }
        created => created?,
    };
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()
}

fn temp_name(path: &Path) -> PathBuf {
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!("{TEMP_PREFIX}{}-{count}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_content_and_mode_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        write(&path, b"old", 0o644).unwrap();
        write(&path, b"new", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_process_of_the_same_id_left_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let temp = dir.path().join("temp");
        fs::write(&temp, "half").unwrap();
        write_temp(&temp, b"whole", 0o600).unwrap();
        assert_eq!(fs::read(&temp).unwrap(), b"whole");
        assert_eq!(fs::metadata(&temp).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_failed_write_names_the_file_and_keeps_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing/state.json");
        let error = write(&path, b"x", 0o600).unwrap_err();
        assert!(error.to_string().contains("missing/state.json"), "{error}");
    }

    #[test]
    fn removing_what_is_not_there_is_a_success() {
        let dir = tempfile::tempdir().unwrap();
        remove(&dir.path().join("nothing")).unwrap();
    }
}
