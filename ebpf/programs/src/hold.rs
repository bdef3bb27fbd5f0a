//! For a moment, no connection begins: user space moves those that there are to other maps.

use aya_ebpf::helpers::bpf_ktime_get_ns;

use crate::maps::SETTINGS;

/// Whether it is such a moment. Clients try again.
#[inline(always)]
pub fn is_held() -> bool {
    let Some(settings) = SETTINGS.get(0) else { return false };
    // SAFETY: the helper has no preconditions.
    settings.held_until_ns != 0 && unsafe { bpf_ktime_get_ns() } < settings.held_until_ns
}
