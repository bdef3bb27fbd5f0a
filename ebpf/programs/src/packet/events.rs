//! Tells a monitor, if one is there, what was decided.

use aya_ebpf::bindings::__sk_buff;
use keelson_ebpf::events::{is_wanted, reserve};
use keelson_ebpf_abi::{EVENT_CONNECTED, EVENT_MASQUERADED, EVENT_REFUSED, Tuple};

use crate::flow::now;
use crate::maps::Scratch;
use crate::open::Opened;

/// What was decided on the first packet of a connection, unless it is dropped.
#[inline(always)]
pub fn tell_opened(skb: *mut __sk_buff, scratch: &Scratch, opened: Opened) {
    match opened {
        Opened::TRANSLATE => tell(skb, scratch, EVENT_CONNECTED, 0),
        Opened::REFUSE => tell(skb, scratch, EVENT_REFUSED, 0),
        _ => {}
    }
}

/// `reason` goes with `EVENT_DROPPED`.
#[inline(always)]
pub fn tell(skb: *mut __sk_buff, scratch: &Scratch, what: u32, reason: u32) {
    if is_wanted(what) {
        write(skb, scratch, what, reason);
    }
}

#[inline(never)]
fn write(skb: *mut __sk_buff, scratch: &Scratch, what: u32, reason: u32) {
    let Some(mut entry) = reserve() else { return };
    let event = entry.as_mut_ptr();
    // SAFETY: the entry is ours until it is submitted. Field by field, since the stack has no room for an event.
    unsafe {
        (*event).time_ns = now();
        (*event).tuple = scratch.packet.tuple;
        if matches!(what, EVENT_CONNECTED | EVENT_MASQUERADED) {
            (*event).to = scratch.to;
        } else {
            (*event).to = Tuple::default();
        }
        (*event).frontend = scratch.flow.frontend;
        (*event).interface = (*skb).ifindex;
        (*event).what = what;
        (*event).hook = scratch.hook;
        (*event).reason = reason as u8;
        (*event).zero = 0;
    }
    entry.submit(0);
}
