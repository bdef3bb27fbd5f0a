//! What becomes of a packet.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use keelson_ebpf_abi::EVENT_DROPPED;

use crate::events;
use crate::maps::{DROPS, Scratch};

/// Other programs on the interface see it, then it goes on.
pub const PASS: i32 = TC_ACT_UNSPEC;

/// Ends here, and is counted.
#[inline(never)]
pub fn dropped(skb: *mut __sk_buff, scratch: &Scratch, reason: u32) -> i32 {
    if let Some(count) = DROPS.get_ptr_mut(reason) {
        // SAFETY: the element is this CPU's.
        unsafe { *count += 1 };
    }
    events::tell(skb, scratch, EVENT_DROPPED, reason);
    TC_ACT_SHOT as i32
}
