//! Removing a pod's folder: unmounts what is mounted below it, and never deletes through a mount.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

/// Removes the folder of a pod with all its volumes. Idempotent.
///
/// # Errors
/// When something is still mounted below it (nothing is then deleted) or the file system refuses.
pub fn remove_pod_dir(pod_dir: &Path) -> io::Result<()> {
    for mount in mounts_below(pod_dir)? {
        unmount(&mount)?;
    }
    let left = mounts_below(pod_dir)?;
    if let Some(mount) = left.first() {
        let problem = format!("{} is still mounted; hint: unmount it by hand", mount.display());
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, problem));
    }
    match fs::remove_dir_all(pod_dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether something is mounted on exactly this path.
///
/// # Errors
/// When the mount table cannot be read.
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    Ok(mount_points()?.iter().any(|mount| mount == path))
}

/// Takes the topmost mount off a path. Lazily: the mount disappears at once even when a process still has a file open.
pub(super) fn unmount(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Deepest first.
fn mounts_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> =
        mount_points()?.into_iter().filter(|m| m.starts_with(dir)).collect();
    found.sort_by_key(|mount| std::cmp::Reverse(mount.components().count()));
    Ok(found)
}

fn mount_points() -> io::Result<Vec<PathBuf>> {
    Ok(keelson_procfs::own_mounts()?.into_iter().map(|mount| mount.point).collect())
}
