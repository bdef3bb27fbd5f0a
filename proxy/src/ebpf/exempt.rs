//! Network namespaces whose sockets are left to the packet layer: of virtual machines, whose packets come from no
//! socket here, and of sidecars that must see the Service's address.
//!
//! A folder says which; the node agent keeps it, or whoever wants to. It is looked at whenever it changes, and as long
//! as something in it is no namespace (yet). What goes there goes from the map.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use keelson_netlink::netns::Netns;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use super::error::EbpfError;
use super::own_cookie;
use crate::switch::with_sources;

#[derive(Default)]
pub(crate) struct Exempt {
    changes: Option<Inotify>,
    watch: Option<WatchDescriptor>,
    /// What was found in the folder; nothing is known of what is no namespace.
    found: HashMap<OsString, Option<Namespace>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Namespace {
    identity: (u64, u64),
    cookie: u64,
}

impl Exempt {
    /// What tells of changes, when it is opened now.
    pub(crate) fn open(&mut self) -> Result<Option<BorrowedFd<'_>>, Errno> {
        if self.changes.is_some() {
            return Ok(None);
        }
        let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
        let changes: &Inotify = self.changes.insert(Inotify::init(flags)?);
        Ok(Some(changes.as_fd()))
    }

    /// Whether the folder may say something else by now. Silences what tells of changes.
    pub(crate) fn may_differ(&mut self, folder: &Path) -> bool {
        let Some(changes) = &self.changes else { return false };
        let changed = changes.read_events().is_ok_and(|events| !events.is_empty());
        // The same folder gives the same watch, another one in its place another.
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_ONLYDIR;
        let watch = changes.add_watch(folder, flags).ok();
        let is_another = std::mem::replace(&mut self.watch, watch) != watch;
        changed || is_another || self.found.values().any(Option::is_none)
    }

    /// The elements of the map `exempt`, by what is in the folder now.
    pub(crate) fn read(&mut self, folder: &Path) -> BTreeMap<u64, u32> {
        let mut before = std::mem::take(&mut self.found);
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let known = before.remove(&entry.file_name());
            let namespace = look(&entry.path(), known.flatten());
            if let Err(error) = &namespace
                && known != Some(None)
            {
                let (path, error) = (entry.path(), with_sources(error));
                tracing::warn!(path = %path.display(), %error, "Sockets there are served: not to be told by that");
            }
            self.found.insert(entry.file_name(), namespace.ok());
        }
        self.found.values().flatten().map(|namespace| (namespace.cookie, 1)).collect()
    }
}

/// The namespace at a path. To learn its cookie takes a thread, so what is known already is taken for it.
fn look(path: &Path, known: Option<Namespace>) -> Result<Namespace, EbpfError> {
    let netns = Netns::open(path)?;
    let identity = netns.identity()?;
    match known {
        Some(known) if known.identity == identity => Ok(known),
        _ => Ok(Namespace { identity, cookie: own_cookie(&netns)? }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pinned(netns: &Netns) -> std::path::PathBuf {
        use std::os::fd::AsRawFd;
        Path::new("/proc/self/fd").join(netns.as_fd().as_raw_fd().to_string())
    }

    #[test]
    fn what_leads_to_a_namespace_exempts_it_as_long_as_it_is_there() {
        let netns = Netns::anonymous().unwrap();
        let base = tempfile::tempdir().unwrap();
        let folder = base.path().join("exempt");
        let mut exempt = Exempt::default();
        exempt.open().unwrap();
        // No folder is no reason to look again.
        assert!(!exempt.may_differ(&folder));
        assert_eq!(exempt.read(&folder), BTreeMap::new());

        fs::create_dir(&folder).unwrap();
        assert!(exempt.may_differ(&folder));
        let link = folder.join("pod");
        std::os::unix::fs::symlink(pinned(&netns), &link).unwrap();
        assert!(exempt.may_differ(&folder));
        assert_eq!(exempt.read(&folder), BTreeMap::from([(netns.cookie().unwrap(), 1)]));
        assert!(!exempt.may_differ(&folder));

        fs::remove_file(&link).unwrap();
        assert!(exempt.may_differ(&folder));
        assert_eq!(exempt.read(&folder), BTreeMap::new());

        // Also when the whole folder is another one.
        fs::remove_dir(&folder).unwrap();
        exempt.may_differ(&folder);
        fs::create_dir(&folder).unwrap();
        assert!(exempt.may_differ(&folder));
        std::os::unix::fs::symlink(pinned(&netns), &link).unwrap();
        assert!(exempt.may_differ(&folder));
    }

    #[test]
    fn what_is_no_namespace_yet_is_looked_at_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut exempt = Exempt::default();
        exempt.open().unwrap();
        exempt.may_differ(folder.path());
        std::os::unix::fs::symlink("nowhere", folder.path().join("pod")).unwrap();
        assert!(exempt.may_differ(folder.path()));
        assert_eq!(exempt.read(folder.path()), BTreeMap::new());
        assert!(exempt.may_differ(folder.path()));
        fs::remove_file(folder.path().join("pod")).unwrap();
        assert!(exempt.may_differ(folder.path()));
        exempt.read(folder.path());
        assert!(!exempt.may_differ(folder.path()));
    }
}
