//! From the agent to a pause process: one clone(2), a dozen system calls in the child, one execve(2).
#![allow(
    unsafe_code,
    reason = "clone3(2) and what its child may do have no wrapper in the libraries at hand"
)]

use std::ffi::{CStr, c_int, c_long};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The program in the root of its mount namespace.
const PROGRAM: &CStr = c"/pause";

/// Neither root nor anybody that an image is likely to use.
const NOBODY: c_long = 65535;

/// What a pause process is made of. Everything is opened before the process exists, so that its path to execve(2) has
/// few ways to fail.
pub(super) struct Pause {
    /// The mount namespace whose root is the program's.
    pub root: File,
    /// Network, IPC and host name namespaces to join.
    pub namespaces: Vec<File>,
    /// Gets a process namespace of its own and is process 1 in it.
    pub own_pid_namespace: bool,
    /// `cgroup.procs` of its cgroup in each hierarchy.
    pub cgroups: Vec<File>,
    pub oom_score_adj: i32,
}

/// A step on the child's way that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct PauseError {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// The child's steps, in their order; the number travels through the pipe.
const STEPS: [&str; 10] = [
    "clone a process for pause",
    "close what pause does not need",
    "move pause to its cgroup",
    "set pause's oom_score_adj",
    "let pause join the pod's namespaces",
    "let pause enter its root file system",
    "give pause a session and /dev/null",
    "drop pause's privileges",
    "execute the pause program",
    "hear from the pause process",
];

/// Starts pause and returns a descriptor of its process when the program runs.
pub(super) fn spawn(pause: &Pause) -> Result<OwnedFd, PauseError> {
    let fail = |step: usize| move |source| PauseError { step: STEPS[step], source };
    let null = File::options().read(true).write(true).open("/dev/null").map_err(fail(6))?;
    let (mut hear, tell) = io::pipe().map_err(fail(0))?;
    let oom_score_adj = pause.oom_score_adj.to_string();
    let fds = |files: &[File]| files.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>();
    let (cgroups, namespaces) = (fds(&pause.cgroups), fds(&pause.namespaces));
    let own = [pause.root.as_raw_fd(), null.as_raw_fd(), tell.as_raw_fd()];
    let child = Child {
        not_needed: &gaps([&cgroups[..], &namespaces, &own].concat()),
        cgroups: &cgroups,
        namespaces: &namespaces,
        root: pause.root.as_raw_fd(),
        null: null.as_raw_fd(),
        tell: tell.as_raw_fd(),
        oom_score_adj: oom_score_adj.as_bytes(),
    };
    let process = clone(pause.own_pid_namespace, &child).map_err(fail(0))?;
    drop(tell);
    let mut report = [0; 8];
    match hear.read(&mut report) {
        // execve(2) closed the pipe.
        Ok(0) => Ok(process),
        Ok(8) => {
            let [step, errno] = [&report[..4], &report[4..]]
                .map(|half| i32::from_ne_bytes(half.try_into().unwrap_or_default()));
            reap(&process);
            let step = usize::try_from(step).ok().filter(|step| *step < STEPS.len()).unwrap_or(9);
            Err(PauseError { step: STEPS[step], source: io::Error::from_raw_os_error(errno) })
        }
        Ok(_) => Err(fail(9)(io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(fail(9)(error)),
    }
}

/// Takes the exit of a process that has ended. One that is another process's child, or reaped already, is left alone.
pub(super) fn reap(process: &OwnedFd) {
    let id = nix::sys::wait::Id::PIDFd(std::os::fd::AsFd::as_fd(process));
    nix::sys::wait::waitid(id, nix::sys::wait::WaitPidFlag::WEXITED).ok();
}

/// What the child needs, in a form that can be used between clone(2) and execve(2): no allocation, no locks.
struct Child<'a> {
    /// First and last descriptor of each range that is not needed. Closed at once and not only by execve(2): while the
    /// child had a copy of, say, the agent's lock file, the lock would outlive an agent that is killed right now.
    not_needed: &'a [(c_int, c_int)],
    cgroups: &'a [c_int],
    namespaces: &'a [c_int],
    root: c_int,
    null: c_int,
    tell: c_int,
    oom_score_adj: &'a [u8],
}

/// The ranges of descriptors from 3 on that are not in `needed`.
fn gaps(mut needed: Vec<c_int>) -> Vec<(c_int, c_int)> {
    needed.sort_unstable();
    needed.push(c_int::MAX);
    let mut first = 3;
    let mut gaps = Vec::new();
    for fd in needed {
        if fd > first {
            gaps.push((first, fd - 1));
        }
        first = fd.saturating_add(1).max(first);
    }
    gaps
}

fn clone(own_pid_namespace: bool, child: &Child<'_>) -> io::Result<OwnedFd> {
    let mut pidfd: c_int = -1;
    // SAFETY: all-zero bytes are a valid clone_args, in which zero means "not asked for" (clone3(2)).
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    let new_pid = if own_pid_namespace { libc::CLONE_NEWPID } else { 0 };
    args.flags = u64::from((libc::CLONE_PIDFD | new_pid).cast_unsigned());
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    let size = size_of::<libc::clone_args>();
    // SAFETY: `args` and `pidfd` outlive the call. Without CLONE_VM the child has its own copy of this memory, as after
    // fork(2); it is the only thread there and makes nothing but system calls until execve(2) or _exit(2).
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size) } {
        -1 => Err(io::Error::last_os_error()),
        0 => child.run(),
        // SAFETY: the kernel has just opened this descriptor for us (CLONE_PIDFD).
        _ => Ok(unsafe { OwnedFd::from_raw_fd(pidfd) }),
    }
}

impl Child<'_> {
    /// Becomes pause, or reports the step that failed and exits.
    fn run(&self) -> ! {
        let step = self.prepare().err().unwrap_or(8);
        // SAFETY: execve(2) reads the program's name and the two lists, which end with null; write(2) reads a report of
        // this size; errno belongs to this process.
        unsafe {
            if step == 8 {
                let arguments = [PROGRAM.as_ptr(), std::ptr::null()];
                libc::execve(PROGRAM.as_ptr(), arguments.as_ptr(), [std::ptr::null()].as_ptr());
            }
            let report = [step, *libc::__errno_location()];
            libc::write(self.tell, report.as_ptr().cast(), size_of_val(&report));
            libc::_exit(1)
        }
    }

    /// Raw system calls where the C library's functions would speak to other threads (set*id), which do not exist here.
    fn prepare(&self) -> Result<(), c_int> {
        let step =
            |step: c_int| move |result: c_long| if result < 0 { Err(step) } else { Ok(result) };
        // SAFETY: each call gets descriptors that are open, buffers of the given length, or plain numbers.
        unsafe {
            for (first, last) in self.not_needed {
                step(1)(libc::syscall(libc::SYS_close_range, *first, *last, 0))?;
            }
            for cgroup in self.cgroups {
                step(2)(libc::write(*cgroup, c"0".as_ptr().cast(), 1) as c_long)?;
            }
            let path = c"/proc/self/oom_score_adj".as_ptr();
            let adj = step(3)(c_long::from(libc::open(path, libc::O_WRONLY | libc::O_CLOEXEC)))?;
            let text = self.oom_score_adj;
            step(3)(libc::write(adj as c_int, text.as_ptr().cast(), text.len()) as c_long)?;
            for namespace in self.namespaces {
                step(4)(c_long::from(libc::setns(*namespace, 0)))?;
            }
            step(5)(c_long::from(libc::setns(self.root, libc::CLONE_NEWNS)))?;
            step(6)(c_long::from(libc::setsid()))?;
            for standard in 0..=2 {
                step(6)(c_long::from(libc::dup2(self.null, standard)))?;
            }
            for capability in 0..64 {
                // Those that this kernel does not know are refused.
                libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
            }
            step(7)(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()))?;
            step(7)(libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY))?;
            step(7)(libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY))?;
            step(7)(c_long::from(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_the_needed_descriptors_is_in_the_gaps() {
        const LAST: c_int = c_int::MAX - 1;
        assert_eq!(gaps(vec![]), [(3, LAST)]);
        assert_eq!(gaps(vec![7, 3, 4, 9]), [(5, 6), (8, 8), (10, LAST)]);
    }
}
