//! Gives memory back that the start or a burst of pods needed and nobody needs any more.
//!
//! glibc's allocator keeps what was freed, in one arena per thread that ever allocated: after forty pods at once that is
//! more than the agent itself needs. And of the program's code most runs once, at the start, while the kernel maps 16
//! pages for each one that is run, or two megabytes where the file system keeps files in huge pages: all of it counts as
//! resident for ever, several times what the agent allocates. Let go, the pages stay in the page cache for as long as
//! nobody has a better use for them, and what runs again is mapped again.

use std::time::Duration;

use tokio::sync::broadcast::{Receiver, error::RecvError};

use crate::runtime::types::RuntimeEvent;

/// No event of any pod for this long: the burst is over.
const QUIET: Duration = Duration::from_secs(5);

/// Keeps the number of arenas low. To be called before there are threads.
pub fn few_arenas() {
    allocator::few_arenas();
}

/// Gives free memory back to the system after the start and whenever pods have come to rest. Costs nothing while nothing
/// happens.
pub async fn give_back_after_bursts(mut events: Receiver<RuntimeEvent>) {
    loop {
        match tokio::time::timeout(QUIET, events.recv()).await {
            Ok(Err(RecvError::Closed)) => return,
            Ok(_) => {}
            Err(_quiet) => {
                allocator::give_back();
                code::let_go();
                if events.recv().await == Err(RecvError::Closed) {
                    return;
                }
            }
        }
    }
}

#[allow(unsafe_code, reason = "the kernel is told through the C library")]
mod code {
    /// Unmaps the pages of the program's code and constants until they are needed again.
    pub(super) fn let_go() {
        let (Ok(program), Ok(maps)) =
            (std::fs::read_link("/proc/self/exe"), std::fs::read_to_string("/proc/self/maps"))
        else {
            return;
        };
        for (start, length) in super::code_of(&program.to_string_lossy(), &maps) {
            let start = start as *mut libc::c_void;
            // SAFETY: these mappings were never written and hold nothing but the file's content, which comes back at the
            // next access; the range is whole pages of one mapping of this process. Refused, it stays mapped.
            unsafe {
                libc::madvise(start, length, libc::MADV_NOHUGEPAGE);
                libc::madvise(start, length, libc::MADV_DONTNEED);
            }
        }
    }
}

/// Start and length of the mappings of `program` that are code and constants, by the text of /proc/self/maps
/// (proc_pid_maps(5)). What follows the code can be read-only, too, but has been written: addresses that the loader put in.
fn code_of(program: &str, maps: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for line in maps.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let &[range, rights @ ("r--p" | "r-xp"), _, _, _, path] = words.as_slice() else {
            continue;
        };
        if path != program {
            continue;
        }
        let hex = |text| usize::from_str_radix(text, 16).ok();
        let range = range.split_once('-').and_then(|(start, end)| Some((hex(start)?, hex(end)?)));
        found.extend(range.and_then(|(start, end)| Some((start, end.checked_sub(start)?))));
        if rights == "r-xp" {
            break;
        }
    }
    found
}

#[cfg(target_env = "gnu")]
#[allow(unsafe_code, reason = "the allocator is told through the C library")]
mod allocator {
    pub(super) fn few_arenas() {
        // SAFETY: mallopt(3) only sets a parameter. Refused, everything stays as it was.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
    }

    pub(super) fn give_back() {
        // SAFETY: malloc_trim(3) returns pages to the system that no allocation is in.
        unsafe { libc::malloc_trim(0) };
    }
}

#[cfg(not(target_env = "gnu"))]
mod allocator {
    pub(super) fn few_arenas() {}
    pub(super) fn give_back() {}
}

#[cfg(test)]
mod tests {
    use super::{code, code_of};

    #[test]
    fn only_the_programs_own_code_and_constants_are_let_go() {
        let maps = "\
55d0a0000000-55d0a0400000 r--p 00000000 fd:00 12 /usr/bin/keelson
55d0a0400000-55d0a1000000 r-xp 00400000 fd:00 12 /usr/bin/keelson
55d0a1000000-55d0a1100000 r--p 01000000 fd:00 12 /usr/bin/keelson
55d0a1100000-55d0a1110000 rw-p 01100000 fd:00 12 /usr/bin/keelson
7f0000000000-7f0000100000 r-xp 00000000 fd:00 13 /usr/lib/libc.so.6
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
7ffc00100000-7ffc00102000 r-xp 00000000 00:00 0
";
        let want = [(0x55d0_a000_0000, 0x40_0000), (0x55d0_a040_0000, 0xc0_0000)];
        assert_eq!(code_of("/usr/bin/keelson", maps), want);
    }

    #[test]
    fn code_that_was_let_go_runs_again() {
        code::let_go();
        let program = std::fs::read_link("/proc/self/exe").unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!code_of(&program.to_string_lossy(), &maps).is_empty());
    }
}
