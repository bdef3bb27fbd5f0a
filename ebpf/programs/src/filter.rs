//! Whether an address may matter at all; see `abi/src/filter.rs`.

use aya_ebpf::btf_maps::Array;
use aya_ebpf::macros::btf_map;
use keelson_ebpf_abi::{Address, FILTER_ADDRESS, FILTER_RANGE, FILTER_WORDS, FilterPlace};

type Filter = Array<[u8; 8], { FILTER_WORDS as usize }>;

/// Addresses of Services, of the node, and ranges where Services have theirs. User space writes it before it writes
/// the tables.
#[btf_map(name = "destinations")]
static DESTINATIONS: Filter = Filter::new();

/// Who has ever been a client of the packet layer.
#[btf_map(name = "clients")]
static CLIENTS: Filter = Filter::new();

/// Whether what goes there may concern Services: new connections, and those that are known where they arrive.
#[inline(always)]
pub fn may_be_served(to: &Address) -> bool {
    has(&DESTINATIONS, FilterPlace::of_address(to), FILTER_ADDRESS)
        || has(&DESTINATIONS, FilterPlace::of_range(to), FILTER_RANGE)
}

/// Whether there may be connections of that client.
#[inline(always)]
pub fn may_be_client(client: &Address) -> bool {
    has(&CLIENTS, FilterPlace::of_address(client), FILTER_ADDRESS)
}

/// To be called before a connection of a client is entered anywhere. Answers to the node's own packets arrive at
/// the address that it speaks from, which may be none of its own.
#[inline(always)]
pub fn know(client: &Address, is_node: bool) {
    let filter = if is_node { &DESTINATIONS } else { &CLIENTS };
    let place = FilterPlace::of_address(client);
    let Some(word) = filter.get_ptr_mut(place.word) else { return };
    // SAFETY: an element of the map. Whoever writes this byte at the same time writes the same.
    let byte = unsafe { &mut (*word)[(place.flag & 7) as usize] };
    if *byte & FILTER_ADDRESS == 0 {
        *byte |= FILTER_ADDRESS;
    }
}

#[inline(always)]
fn has(filter: &'static Filter, place: FilterPlace, flag: u8) -> bool {
    filter.get(place.word).is_some_and(|word| word[(place.flag & 7) as usize] & flag != 0)
}
