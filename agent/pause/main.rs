//! The sandbox's process: holds the pod's namespaces, reaps orphans where it is PID 1, ends when asked to. It is started as
//! root and becomes nobody before anything else.
//!
//! No libc and no std: a few system calls in a static binary of a few kilobytes, which is what stays resident per pod.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

const SIGINT: u64 = 2;
const SIGTERM: u64 = 15;
const SIGCHLD: u64 = 17;
const SIG_BLOCK: usize = 0;
const WNOHANG: usize = 1;
const PR_CAPBSET_DROP: usize = 24;
/// Neither root nor anybody that an image is likely to use.
const NOBODY: usize = 65535;

#[cfg(target_arch = "x86_64")]
mod nr {
    pub(crate) const RT_SIGPROCMASK: usize = 14;
    pub(crate) const WAIT4: usize = 61;
    pub(crate) const RT_SIGTIMEDWAIT: usize = 128;
    pub(crate) const SETGROUPS: usize = 116;
    pub(crate) const SETRESUID: usize = 117;
    pub(crate) const SETRESGID: usize = 119;
    pub(crate) const PRCTL: usize = 157;
    pub(crate) const EXIT_GROUP: usize = 231;
}

#[cfg(target_arch = "aarch64")]
mod nr {
    pub(crate) const EXIT_GROUP: usize = 94;
    pub(crate) const RT_SIGPROCMASK: usize = 135;
    pub(crate) const RT_SIGTIMEDWAIT: usize = 137;
    pub(crate) const SETRESUID: usize = 147;
    pub(crate) const SETRESGID: usize = 149;
    pub(crate) const SETGROUPS: usize = 159;
    pub(crate) const PRCTL: usize = 167;
    pub(crate) const WAIT4: usize = 260;
}

// The kernel starts a program with nothing on the stack that a compiler would expect: align it, then enter Rust.
#[cfg(target_arch = "x86_64")]
global_asm!(".globl _start", "_start:", "and rsp, -16", "call {main}", "ud2", main = sym main);
#[cfg(target_arch = "aarch64")]
global_asm!(".globl _start", "_start:", "bl {main}", "brk #1", main = sym main);

extern "C" fn main() -> ! {
    drop_privileges();
    let signals: u64 = (1 << (SIGINT - 1)) | (1 << (SIGTERM - 1)) | (1 << (SIGCHLD - 1));
    let size = size_of::<u64>();
    syscall(nr::RT_SIGPROCMASK, [SIG_BLOCK, &raw const signals as usize, 0, size]);
    loop {
        match syscall(nr::RT_SIGTIMEDWAIT, [&raw const signals as usize, 0, 0, size]) as u64 {
            SIGINT | SIGTERM => {
                syscall(nr::EXIT_GROUP, [0; 4]);
            }
            SIGCHLD => while syscall(nr::WAIT4, [usize::MAX, 0, WNOHANG, 0]) > 0 {},
            _ => {}
        }
    }
}

/// Ends the process if it cannot: a pause process with privileges is none.
fn drop_privileges() {
    for capability in 0..64 {
        // Those that this kernel does not know are refused.
        syscall(nr::PRCTL, [PR_CAPBSET_DROP, capability, 0, 0]);
    }
    let dropped = syscall(nr::SETGROUPS, [0; 4])
        | syscall(nr::SETRESGID, [NOBODY, NOBODY, NOBODY, 0])
        | syscall(nr::SETRESUID, [NOBODY, NOBODY, NOBODY, 0]);
    if dropped != 0 {
        syscall(nr::EXIT_GROUP, [1, 0, 0, 0]);
    }
}

#[cfg(target_arch = "x86_64")]
fn syscall(number: usize, args: [usize; 4]) -> isize {
    let result: isize;
    // SAFETY: the calls made here only read the signal set that lives in `main`, and write nothing of ours.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") args[0], in("rsi") args[1],
            in("rdx") args[2], in("r10") args[3], out("rcx") _, out("r11") _);
    }
    result
}

#[cfg(target_arch = "aarch64")]
fn syscall(number: usize, args: [usize; 4]) -> isize {
    let result: isize;
    // SAFETY: as above.
    unsafe {
        asm!("svc #0", in("x8") number, inlateout("x0") args[0] as isize => result, in("x1") args[1],
            in("x2") args[2], in("x3") args[3]);
    }
    result
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    syscall(nr::EXIT_GROUP, [1, 0, 0, 0]);
    loop {}
}
