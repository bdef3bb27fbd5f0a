//! Network namespaces: made, pinned to a path, opened, entered by a thread of its own, deleted.
//!
//! A thread that has changed its namespace is never given back to anyone: every entry happens on a thread that ends with
//! the call, so an error or a panic cannot leave the caller in the wrong namespace.

mod existing;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

pub use existing::existing;

/// A step on a namespace that the system refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} network namespace {path}")]
pub struct NetnsError {
    /// What was being done.
    pub step: &'static str,
    /// The namespace's path.
    pub path: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// Which namespace to pin to which path; see [`pin`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Network.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host and domain name.
    Uts,
}

impl Kind {
    fn flag(self) -> CloneFlags {
        match self {
            Self::Net => CloneFlags::CLONE_NEWNET,
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Uts => CloneFlags::CLONE_NEWUTS,
        }
    }

    fn own_path(self) -> &'static str {
        match self {
            Self::Net => "/proc/thread-self/ns/net",
            Self::Ipc => "/proc/thread-self/ns/ipc",
            Self::Uts => "/proc/thread-self/ns/uts",
        }
    }
}

/// An open network namespace; it lives at least as long as this.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
}

impl Netns {
    /// Makes a new namespace and pins it to `path` by a bind mount, so that it outlives this process.
    /// The folder must exist; nothing may be pinned to the path yet.
    ///
    /// # Errors
    /// The step that failed; nothing is left behind then.
    pub fn create(path: &Path) -> Result<Self, NetnsError> {
        pin(&[(Kind::Net, path)], || Ok(()))?;
        Self::open(path)
    }

    /// Makes a namespace that ends with the last of its users, without any path.
    ///
    /// # Errors
    /// When the kernel refuses a new namespace.
    pub fn anonymous() -> Result<Self, NetnsError> {
        let path = PathBuf::from(Kind::Net.own_path());
        let fail = |step| {
            let path = path.clone();
            move |source| NetnsError { step, path, source }
        };
        let file = on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open(Kind::Net.own_path())
        })
        .map_err(fail("make"))?;
        Ok(Self { file, path })
    }

    /// Opens the namespace at `path`, which may also be a `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// When the path is missing or is no network namespace.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let fail = |source| NetnsError { step: "open", path: path.to_owned(), source };
        let file = File::open(path).map_err(fail)?;
        let is_namespace = nix::sys::statfs::fstatfs(&file)
            .map(|s| s.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
            .map_err(|e| fail(e.into()))?;
        if !is_namespace {
            let reason = "this file is not a namespace (nothing is mounted on it)";
            return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, reason)));
        }
        Ok(Self { file, path: path.to_owned() })
    }

    /// The calling thread's namespace.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub fn current() -> Result<Self, NetnsError> {
        Self::open(Path::new(Kind::Net.own_path()))
    }

    /// A second handle to the same namespace.
    ///
    /// # Errors
    /// When the process has too many open files.
    pub fn try_clone(&self) -> Result<Self, NetnsError> {
        let fail = |source| NetnsError { step: "duplicate", path: self.path.clone(), source };
        Ok(Self { file: self.file.try_clone().map_err(fail)?, path: self.path.clone() })
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode, by which two handles can be compared.
    ///
    /// # Errors
    /// When the handle cannot be examined.
    pub fn identity(&self) -> Result<(u64, u64), NetnsError> {
        let fail = |source| NetnsError { step: "examine", path: self.path.clone(), source };
        let metadata = self.file.metadata().map_err(fail)?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// The number by which BPF programs know it (Linux 5.14).
    ///
    /// # Errors
    /// When the namespace cannot be entered, or the kernel is older.
    pub fn cookie(&self) -> Result<u64, NetnsError> {
        let fail = |source| NetnsError { step: "number", path: self.path.clone(), source };
        self.run(own_cookie)?.map_err(fail)
    }

    /// Runs `work` inside, on a thread of its own, and returns what it returned. A panic in it continues here.
    ///
    /// # Errors
    /// When the namespace cannot be entered; `work` has not run then.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        on_own_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })
        .map_err(|source| NetnsError { step: "enter", path: self.path.clone(), source })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[expect(unsafe_code, reason = "nix has no SO_NETNS_COOKIE")]
fn own_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let (mut cookie, mut length) = (0_u64, 8);
    // SAFETY: the kernel writes at most `length` bytes, those of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Moves the calling thread for good. Only for programs that do so before they start any other thread.
///
/// # Errors
/// When the namespace cannot be opened or entered.
pub fn enter(path: &Path) -> Result<(), NetnsError> {
    let netns = Netns::open(path)?;
    setns(&netns.file, CloneFlags::CLONE_NEWNET).map_err(|e| NetnsError {
        step: "enter",
        path: path.to_owned(),
        source: e.into(),
    })
}

/// Makes new namespaces together on one thread and pins each to its path; `inside` runs in them before (for example to
/// set the host name). On failure nothing stays behind.
///
/// # Errors
/// The step that failed and the path it concerns.
pub fn pin(
    wanted: &[(Kind, &Path)],
    inside: impl FnOnce() -> io::Result<()> + Send,
) -> Result<(), NetnsError> {
    let first = wanted.first().map(|(_, path)| path.to_path_buf()).unwrap_or_default();
    let fail = |step, path: &Path, source| NetnsError { step, path: path.to_owned(), source };
    on_own_thread(|| {
        let flags = wanted.iter().fold(CloneFlags::empty(), |all, (kind, _)| all | kind.flag());
        if let Err(errno) = unshare(flags) {
            return Ok(Err(fail("make", &first, errno.into())));
        }
        if let Err(source) = inside() {
            return Ok(Err(fail("prepare", &first, source)));
        }
        for (position, (kind, path)) in wanted.iter().enumerate() {
            if let Err(source) = pin_own(*kind, path) {
                for (_, pinned) in &wanted[..position] {
                    // The first error counts; a pin that stays is found and removed by `delete` later.
                    delete(pinned).ok();
                }
                return Ok(Err(fail("pin", path, source)));
            }
        }
        Ok(Ok(()))
    })
    .unwrap_or_else(|source| Err(fail("start a thread for", &first, source)))
}

/// Unpins the namespace at `path`; it ends when its last user does. Nothing there is a success.
///
/// # Errors
/// When it cannot be unmounted or its file cannot be removed.
pub fn delete(path: &Path) -> Result<(), NetnsError> {
    let fail = |step, source| NetnsError { step, path: path.to_owned(), source };
    // More than one bind mount can lie on the path if an earlier creation was repeated.
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(errno) => return Err(fail("unmount", errno.into())),
        }
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(fail("remove", e)),
        _ => Ok(()),
    }
}

fn pin_own(kind: Kind, path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(0o444).open(path)?;
    let none: Option<&str> = None;
    mount(Some(kind.own_path()), path, none, MsFlags::MS_BIND, none).map_err(|errno| {
        fs::remove_file(path).ok();
        errno.into()
    })
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work);
        match thread?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
