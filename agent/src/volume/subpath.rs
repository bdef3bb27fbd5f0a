//! `subPath`: a part of a volume, mounted safely though the pod may change the volume at the same time.
//!
//! The kernel resolves the path below the volume's root and refuses to leave it (`openat2` with `RESOLVE_BENEATH`); the file
//! descriptor that comes out is what gets bind-mounted, so nothing can be swapped between check and use.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, fstat, mkdirat};

use super::teardown;

/// Mounts what `sub_path` names inside `volume` on `target`, making folders that are missing. Idempotent: what is mounted
/// already stays when it is still the same file.
///
/// # Errors
/// When the path leaves the volume or the system refuses a step.
pub fn bind(volume: &Path, sub_path: &str, target: &Path) -> io::Result<PathBuf> {
    let source = open_beneath(volume, sub_path)?;
    let wanted = fstat(&source)?;
    if teardown::is_mount_point(target)? {
        let current = fs::metadata(target)?;
        if current.ino() == wanted.st_ino && current.dev() == wanted.st_dev {
            return Ok(target.to_owned());
        }
        teardown::unmount(target)?;
    }
    prepare_target(target, wanted.st_mode & libc::S_IFMT == libc::S_IFDIR)?;
    let path = format!("/proc/self/fd/{}", source.as_raw_fd());
    let none: Option<&str> = None;
    mount(Some(path.as_str()), target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    Ok(target.to_owned())
}

fn prepare_target(target: &Path, directory: bool) -> io::Result<()> {
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    match (directory, target.is_dir(), target.exists()) {
        (true, true, _) | (false, false, true) => Ok(()),
        (true, false, true) => fs::remove_file(target).and_then(|()| fs::create_dir(target)),
        (false, true, _) => fs::remove_dir(target).and_then(|()| touch(target)),
        (true, ..) => fs::create_dir(target),
        (false, ..) => touch(target),
    }
}

fn touch(path: &Path) -> io::Result<()> {
    fs::OpenOptions::new().create(true).append(true).open(path).map(drop)
}

fn open_beneath(volume: &Path, sub_path: &str) -> io::Result<OwnedFd> {
    let relative = Path::new(sub_path);
    if relative.components().any(|c| !matches!(c, Component::Normal(_) | Component::CurDir)) {
        let problem = format!("subPath {sub_path:?} must be relative and without \"..\"");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    let root = open(volume, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    match beneath(&root, relative) {
        Err(nix::errno::Errno::ENOENT) => make_beneath(&root, relative),
        found => found.map_err(io::Error::from),
    }
}

fn beneath(root: &OwnedFd, path: &Path) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root.as_fd(), path, how)
}

fn make_beneath(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let mode = Mode::from_bits_truncate(fstat(root)?.st_mode & 0o777);
    let (mut parent, mut done) = (root.try_clone()?, PathBuf::new());
    for part in path.components() {
        done.push(part);
        parent = match beneath(root, &done) {
            Err(nix::errno::Errno::ENOENT) => {
                mkdirat(&parent, part.as_os_str(), mode)?;
                beneath(root, &done)?
            }
            found => found?,
        };
    }
    Ok(parent)
}
