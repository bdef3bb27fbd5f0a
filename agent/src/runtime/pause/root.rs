//! The mount namespace that all pause processes of this agent share: in it there is nothing but their own program.
//!
//! Made once instead of once per pod, and held by a file descriptor only, so that nothing of it stays behind when the
//! last pause process and the agent are gone.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};

/// Makes the namespace, with `rootfs` read-only as its root, on a thread that ends with the call.
pub(super) fn mount_namespace(rootfs: &Path) -> io::Result<File> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("pause-root".to_owned())
            .spawn_scoped(scope, || make(rootfs))?;
        match thread.join() {
            Ok(made) => made,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn make(rootfs: &Path) -> io::Result<File> {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    // What the node unmounts later shall go here, too; nothing done here shall reach the node.
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?;
    mount(Some(rootfs), rootfs, none, MsFlags::MS_BIND, none)?;
    let read_only = MsFlags::MS_REMOUNT
        | MsFlags::MS_BIND
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV;
    mount(none, rootfs, none, read_only, none)?;
    let namespace = File::open("/proc/thread-self/ns/mnt")?;
    chdir(rootfs)?;
    match pivot_root(".", ".") {
        Ok(()) => umount2(".", MntFlags::MNT_DETACH)?,
        // The machine runs from its initial RAM disk, which cannot be put aside (pivot_root(2)): lie on top of it.
        Err(Errno::EINVAL) => mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?,
        Err(errno) => return Err(errno.into()),
    }
    Ok(namespace)
}
