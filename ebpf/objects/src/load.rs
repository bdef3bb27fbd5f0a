//! Hands programs to the kernel.

use std::io;

use aya::programs::{Program, ProgramError};
use nix::sys::signal::{SigSet, SigmaskHow};

/// How often a program is handed over when the kernel breaks off, as libbpf does.
const TRIES: usize = 5;

/// Does `work` with BPF while no signal can reach this thread, a few milliseconds.
///
/// The kernel breaks off verifying (`EAGAIN`) when the thread that asks has a signal to handle. Then a program would not
/// be loaded, and aya, which asks the kernel for its features by loading small programs, would take it for an old one.
pub fn undisturbed<T>(work: impl FnOnce() -> T) -> nix::Result<T> {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let done = work();
    before.thread_set_mask()?;
    Ok(done)
}

/// Loads a program of any kind that keelson has.
///
/// Signals wait meanwhile ([`undisturbed`]); what else makes the kernel break off only makes it be asked again.
///
/// # Errors
/// When the kernel takes the program not.
pub fn load(program: &mut Program) -> Result<(), ProgramError> {
    let tries = || {
        let mut loaded = hand_over(program);
        for _ in 1..TRIES {
            if !loaded.as_ref().is_err_and(broken_off) {
                break;
            }
            loaded = hand_over(program);
        }
        loaded
    };
    undisturbed(tries).map_err(|errno| ProgramError::IOError(errno.into()))?
}

fn broken_off(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. } if io_error.kind() == io::ErrorKind::WouldBlock)
}

fn hand_over(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}
