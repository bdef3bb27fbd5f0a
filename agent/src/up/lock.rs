//! One process per node: a lock file that also says which process holds it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

/// Held for the life of the process; the kernel releases it whatever happens.
pub(crate) struct NodeLock {
    _lock: Flock<File>,
}

/// Takes the lock at `path`.
///
/// # Errors
/// When another process holds it; the error names that process.
pub(crate) fn take(path: &Path) -> Result<NodeLock> {
    let file = open(path)?;
    let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((mut file, _)) => {
            bail!(
                "this node is running already (process {}); `keelson down` stops it",
                read_pid(&mut file)?
            )
        }
    };
    lock.set_len(0).and_then(|()| lock.write_all(std::process::id().to_string().as_bytes()))?;
    Ok(NodeLock { _lock: lock })
}

/// The process that holds the lock at `path`, if one does.
///
/// # Errors
/// When the file is there but cannot be read.
pub(crate) fn holder(path: &Path) -> Result<Option<i32>> {
    if !path.exists() {
        return Ok(None);
    }
    match Flock::lock(open(path)?, FlockArg::LockExclusiveNonblock) {
        Ok(_) => Ok(None),
        Err((mut file, _)) => Ok(Some(read_pid(&mut file)?)),
    }
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn read_pid(file: &mut File) -> Result<i32> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_string(&mut text)?;
    text.trim().parse().context("the lock file holds no process id")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lock_names_its_holder_and_a_free_one_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("up.lock");
        assert_eq!(holder(&path).unwrap(), None);
        let lock = take(&path).unwrap();
        assert_eq!(holder(&path).unwrap(), Some(std::process::id().cast_signed()));
        let error = take(&path).err().unwrap().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        assert_eq!(holder(&path).unwrap(), None);
    }
}
