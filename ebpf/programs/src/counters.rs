//! Counters of frontends.

use aya_ebpf::bindings::BPF_NOEXIST;
use keelson_ebpf_abi::Counters;

use crate::maps::COUNTERS;

/// Changes this CPU's counters of a frontend. Not counted when the map is full.
#[inline(always)]
pub fn count(frontend: u32, change: impl FnOnce(&mut Counters)) {
    let counters = COUNTERS.get_ptr_mut(frontend).or_else(|| {
        begin(frontend);
        COUNTERS.get_ptr_mut(frontend)
    });
    if let Some(counters) = counters {
        // SAFETY: no other program of this kind runs on this CPU meanwhile, and the map is not preallocated.
        change(unsafe { &mut *counters });
    }
}

/// A function of its own, so that its stack is nobody else's. Another CPU may have been faster.
#[inline(never)]
fn begin(frontend: u32) {
    let _ = COUNTERS.insert(frontend, Counters::default(), u64::from(BPF_NOEXIST));
}
