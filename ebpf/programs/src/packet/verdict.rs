//! What becomes of a packet.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};

use crate::maps::DROPS;

/// Other programs on the interface see it, then it goes on.
pub const PASS: i32 = TC_ACT_UNSPEC;

/// Ends here, and is counted.
#[inline(always)]
pub fn dropped(reason: u32) -> i32 {
    if let Some(count) = DROPS.get_ptr_mut(reason) {
        // SAFETY: the element is this CPU's.
        unsafe { *count += 1 };
    }
    TC_ACT_SHOT as i32
}
