//! The way to a monitor, if one is there.

use aya_ebpf::maps::ring_buf::RingBufEntry;
use keelson_ebpf_abi::{EVENT_CONNECTED, EVENT_MASQUERADED, Event, WATCH_ALL, WATCH_FAILURES};

use crate::maps::{EVENTS, EVENTS_LOST, WATCHED};

/// Whether somebody wants to know of such an event.
#[inline(always)]
pub fn is_wanted(what: u32) -> bool {
    let least = match what {
        EVENT_CONNECTED | EVENT_MASQUERADED => WATCH_ALL,
        _ => WATCH_FAILURES,
    };
    WATCHED.get(0).is_some_and(|watched| *watched >= least)
}

/// Room for an event, to be submitted; counts it as lost when there is none.
#[inline(always)]
pub fn reserve() -> Option<RingBufEntry<Event>> {
    let entry = EVENTS.reserve(0);
    if entry.is_none()
        && let Some(lost) = EVENTS_LOST.get_ptr_mut(0)
    {
        // SAFETY: the element is this CPU's.
        unsafe { *lost += 1 };
    }
    entry
}
