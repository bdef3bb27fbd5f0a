//! The folder of a container's logs. A pod may own what is in it (hostPath), so that names are only looked up beneath
//! the folder of all logs, links are not followed, and nothing but regular files is opened.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

/// `<all logs>/<pod>/<container>/<run>.log`: who runs the node chooses the first part, and it may be a link.
const DEPTH: usize = 3;

/// A container's log with the files that were rotated away.
#[derive(Debug)]
pub(crate) struct Folder {
    fd: OwnedFd,
    /// The log's own name.
    log: OsString,
}

impl Folder {
    /// The folder of the log at `path`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let log = path.file_name().ok_or_else(missing)?.to_owned();
        let parent = path.parent().ok_or_else(missing)?;
        let root = path.ancestors().nth(DEPTH).unwrap_or(Path::new("/"));
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root_fd = open(root, flags, Mode::empty())?;
        let below = parent.strip_prefix(root).unwrap_or(parent);
        if below.as_os_str().is_empty() {
            return Ok(Self { fd: root_fd, log });
        }
        Ok(Self { fd: openat2(&root_fd, below, beneath(flags))?, log })
    }

    /// The log itself.
    pub(super) fn log(&self) -> &OsStr {
        &self.log
    }

    /// Opens one of the files.
    ///
    /// # Errors
    /// When it is not there, or is no regular file.
    pub(super) fn open(&self, name: &OsStr) -> io::Result<File> {
        // Looked at before it is opened: opening a device or a pipe can do things.
        let found = openat2(&self.fd, Path::new(name), beneath(OFlag::O_PATH | OFlag::O_CLOEXEC))?;
        let found = File::from(found);
        if !found.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        File::open(path_of(&found))
    }

    /// The rotated files, oldest first: their names end in the time of their rotation.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) fn rotated(&self) -> io::Result<Vec<OsString>> {
        let prefix = self.log.to_string_lossy().into_owned() + ".";
        let mut files = Vec::new();
        for entry in std::fs::read_dir(self.path())? {
            let name = entry?.file_name();
            let text = name.to_string_lossy();
            // A half-written compressed file has its plain twin still beside it.
            if text.starts_with(&prefix) && !text.ends_with(".tmp") {
                files.push(name);
            }
        }
        files.sort();
        Ok(files)
    }

    /// A path to the folder that nobody else can change.
    pub(super) fn path(&self) -> PathBuf {
        path_of(&self.fd)
    }
}

/// The name that the kernel has for an open file now.
pub(super) fn name_of(file: &File) -> io::Result<OsString> {
    let path = std::fs::read_link(path_of(file))?;
    Ok(path.file_name().unwrap_or_default().to_owned())
}

fn path_of(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn beneath(flags: OFlag) -> OpenHow {
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    OpenHow::new().flags(flags).resolve(resolve)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// As a pod does that has `/var/log` as a hostPath.
    #[test]
    fn a_log_that_is_a_link_or_a_pipe_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("ns_pod_uid/main");
        std::fs::create_dir_all(&folder).unwrap();
        let secret = dir.path().join("shadow");
        std::fs::write(&secret, "secret").unwrap();
        symlink(&secret, folder.join("0.log")).unwrap();
        nix::unistd::mkfifo(&folder.join("1.log"), Mode::S_IRUSR).unwrap();
        std::fs::write(folder.join("2.log"), "mine").unwrap();
        let read = |name: &str| {
            let log = Folder::of(&folder.join(name))?;
            std::io::read_to_string(log.open(log.log())?)
        };
        assert!(read("0.log").is_err());
        assert!(read("1.log").is_err());
        assert_eq!(read("2.log").unwrap(), "mine");
        symlink("/etc", folder.join("../other")).unwrap();
        assert!(Folder::of(&folder.join("../other/passwd")).is_err());
        assert!(Folder::of(&dir.path().join("ns_pod_uid/other/passwd")).is_err());
    }
}
