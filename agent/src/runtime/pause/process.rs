//! From the agent to a pause process: one clone(2), a dozen system calls in the child, one execve(2).
#![allow(
    unsafe_code,
    reason = "clone3(2) and what its child may do have no wrapper in the libraries at hand"
)]

use std::ffi::{CStr, c_int, c_long, c_void};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow};

/// The program in the root of its mount namespace.
const PROGRAM: &CStr = c"/pause";

/// Of the child, for the few calls that it makes.
const STACK: usize = 64 << 10;

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
    "give pause a session, /dev/null and no blocked signals",
    "keep pause from gaining privileges",
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

/// What the child needs, in a form that can be used between clone(2) and execve(2): no allocation, no locks,
/// nothing written that the agent has.
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
    let mut stack = vec![0_u8; STACK];
    let mut pidfd: c_int = -1;
    let new_pid = if own_pid_namespace { libc::CLONE_NEWPID } else { 0 };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | new_pid | libc::SIGCHLD;
    // A handler of the agent's must not run in the child, where it would see the agent's memory.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: the stack grows down from its end, which is aligned; it, `child` and `pidfd` are not touched by anyone else
    // until the child has left this memory, for which the kernel keeps this thread waiting (CLONE_VFORK).
    let result = unsafe {
        let top = stack.as_mut_ptr_range().end;
        let top = top.sub(top as usize % 16);
        let child = (&raw const *child).cast_mut();
        libc::clone(become_pause, top.cast(), flags, child.cast(), &raw mut pidfd)
    };
    let result = Errno::result(result);
    mask.thread_set_mask()?;
    result?;
    // SAFETY: the kernel has just opened this descriptor for us (CLONE_PIDFD).
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

extern "C" fn become_pause(child: *mut c_void) -> c_int {
    // SAFETY: `clone` hands over a Child that lives until this process has executed another program or exited.
    unsafe { (*child.cast::<Child<'_>>()).run() }
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
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            let nowhere = std::ptr::null_mut();
            step(6)(c_long::from(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, nowhere)))?;
            // Privileges are dropped by the program: here that would be done to the agent's memory, too (prctl(2),
            // PR_SET_DUMPABLE).
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
