//! From a destination to the Service that answers there.

use keelson_ebpf_abi::{
    ADDRESS_CLUSTER_IP, ADDRESS_NODE_PORTS, Address, Frontend, FrontendKey, RangeKey, SourceKey,
};

use aya_ebpf::btf_maps::lpm_trie::Key;

use crate::filter;
use crate::maps::{ADDRESSES, FRONTENDS, SERVICE_RANGES, SOURCES};

/// What is at a destination.
pub enum Found<'m> {
    Frontend(&'m Frontend),
    /// A ClusterIP, but no port of its Service.
    NoSuchPort,
    /// Nothing that Services concern.
    Nothing,
}

/// Looks a destination up: the address itself, then, if it is the node's, node ports.
#[inline(always)]
pub fn find(address: &Address, port_be: u16, protocol: u8) -> Found<'static> {
    // As a key it means node ports, which is not what somebody who sends there means.
    if address.is_unspecified() || !filter::may_be_served(address) {
        return Found::Nothing;
    }
    let mut key = FrontendKey { address: *address, port_be, protocol, zero: 0 };
    // SAFETY: the map is not preallocated, so an element is freed only after a grace period.
    if let Some(frontend) = unsafe { FRONTENDS.get(&key) } {
        return Found::Frontend(frontend);
    }
    // SAFETY: as above.
    let Some(flags) = (unsafe { ADDRESSES.get(address) }) else { return Found::Nothing };
    if flags & ADDRESS_CLUSTER_IP != 0 {
        return Found::NoSuchPort;
    }
    if flags & ADDRESS_NODE_PORTS == 0 {
        return Found::Nothing;
    }
    key.address = address.any();
    // SAFETY: as above.
    match unsafe { FRONTENDS.get(&key) } {
        Some(frontend) => Found::Frontend(frontend),
        None => Found::Nothing,
    }
}

/// What another node was asked for: here nobody knows which addresses are nodes' own.
#[inline(always)]
pub fn find_anywhere(address: &Address, port_be: u16, protocol: u8) -> Option<&'static Frontend> {
    let mut key = FrontendKey { address: *address, port_be, protocol, zero: 0 };
    // SAFETY: the map is not preallocated, so an element is freed only after a grace period.
    if let Some(frontend) = unsafe { FRONTENDS.get(&key) } {
        return Some(frontend);
    }
    key.address = address.any();
    // SAFETY: as above.
    unsafe { FRONTENDS.get(&key) }
}

/// Whether an address is one of such: `ADDRESS_*`.
#[inline(always)]
pub fn is_address(address: &Address, such: u32) -> bool {
    // SAFETY: the map is not preallocated, so an element is freed only after a grace period.
    unsafe { ADDRESSES.get(address) }.is_some_and(|flags| flags & such != 0)
}

/// Whether an address is one that only a Service could have.
#[inline(always)]
pub fn is_in_service_range(address: &Address) -> bool {
    let key = Key::new(128, RangeKey { address: *address });
    SERVICE_RANGES.get(&key).is_some()
}

/// Whether loadBalancerSourceRanges let a client in. Only for frontends that have such.
#[inline(always)]
pub fn lets_in(frontend: u32, client: &Address) -> bool {
    let key = Key::new(32 + 128, SourceKey { frontend, address: *client });
    SOURCES.get(&key).is_some()
}
