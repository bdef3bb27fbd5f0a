//! Process descriptors: a process that cannot be confused with a later one of the same number, and whose end can be waited
//! for.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// A descriptor of process `pid`; `None` when there is no such process.
///
/// # Errors
/// When the kernel refuses, e.g. for too many open files.
#[allow(unsafe_code, reason = "pidfd_open(2) has no wrapper in the libraries at hand")]
pub(crate) fn open(pid: i32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd >= 0 {
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error) }
}
