//! Tells the service proxy which sandboxes' sockets it shall leave alone: by a symbolic link to the network namespace, in a
//! folder that the proxy watches. Proxy and agent need not know of each other, nor run at the same time.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::SandboxDir;
use crate::runtime::RuntimeError;

/// Its name below the run directory.
const FOLDER: &str = "socket-exempt";

/// Makes the folder, so that a proxy watches it before the first link is there.
pub(crate) fn make_folder(run_dir: &Path) -> Result<(), RuntimeError> {
    let folder = run_dir.join(FOLDER);
    fs::create_dir_all(&folder).map_err(RuntimeError::system("create", &folder))
}

/// The link is relative, so that it leads there also where the run directory is mounted elsewhere.
fn link(dir: &SandboxDir) -> Option<(PathBuf, PathBuf)> {
    let id = dir.path().file_name()?;
    let target = Path::new("../sandboxes").join(id).join("ns/net");
    Some((dir.path().parent()?.parent()?.join(FOLDER).join(id), target))
}

pub(super) fn mark(dir: &SandboxDir) -> Result<(), RuntimeError> {
    let Some((link, target)) = link(dir) else { return Ok(()) };
    match symlink(target, &link) {
        // An earlier attempt's.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        result => result.map_err(RuntimeError::system("create", &link)),
    }
}

/// None there is as good as removed.
pub(super) fn unmark(dir: &SandboxDir) -> Result<(), RuntimeError> {
    let Some((link, _)) = link(dir) else { return Ok(()) };
    match fs::remove_file(&link) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result.map_err(RuntimeError::system("remove", &link)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_leads_to_the_sandboxes_namespace_and_goes_again() {
        let run_dir = tempfile::tempdir().unwrap();
        make_folder(run_dir.path()).unwrap();
        let dir = SandboxDir(run_dir.path().join("sandboxes/one"));
        fs::create_dir_all(dir.file("ns")).unwrap();
        fs::write(dir.namespace("net"), "here").unwrap();
        for _ in 0..2 {
            mark(&dir).unwrap();
        }
        let link = run_dir.path().join(FOLDER).join("one");
        assert_eq!(fs::read_to_string(&link).unwrap(), "here");
        for _ in 0..2 {
            unmark(&dir).unwrap();
        }
        assert!(link.symlink_metadata().is_err());
    }
}
