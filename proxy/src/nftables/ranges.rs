//! Ranges as the kernel takes them.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::item::Key;
use crate::backend::BackendConfig;
use crate::model::Family;

/// Sorted ranges of one family that neither overlap nor touch: the kernel refuses those that do.
pub(crate) fn merged(ranges: &[IpNetwork]) -> Vec<(IpAddr, IpAddr)> {
    let mut all: Vec<(IpAddr, IpAddr)> = ranges.iter().map(|range| ends(*range)).collect();
    all.sort_unstable();
    let mut merged: Vec<(IpAddr, IpAddr)> = Vec::new();
    for (first, last) in all {
        match merged.last_mut() {
            Some((_, end)) if touches(*end, first) => *end = (*end).max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn ends(range: IpNetwork) -> (IpAddr, IpAddr) {
    match range {
        IpNetwork::V4(v4) => (v4.network().into(), v4.broadcast().into()),
        IpNetwork::V6(v6) => (v6.network().into(), v6.broadcast().into()),
    }
}

fn touches(end: IpAddr, next: IpAddr) -> bool {
    let number = |address| match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    };
    number(next) <= number(end).saturating_add(1)
}

pub(crate) fn keys(ranges: &[IpNetwork], family: Family) -> Vec<(Key, Key)> {
    let of_family: Vec<IpNetwork> =
        ranges.iter().filter(|range| range.is_ipv4() == (family == Family::V4)).copied().collect();
    let key = |address| Key::new().address(address);
    merged(&of_family).into_iter().map(|(first, last)| (key(first), key(last))).collect()
}

/// In a family that the configuration does not mention, all addresses serve node ports.
pub(crate) fn node_port_ranges(config: &BackendConfig, family: Family) -> Vec<(Key, Key)> {
    let wanted = keys(&config.node_port_ranges, family);
    if !wanted.is_empty() {
        return wanted;
    }
    let all = match family {
        Family::V4 => IpNetwork::from(IpAddr::from([0u8; 4])),
        Family::V6 => IpNetwork::from(IpAddr::from([0u8; 16])),
    };
    let everything = IpNetwork::new(all.ip(), 0).unwrap_or(all);
    keys(&[everything], family)
}

/// How the kernel lists ranges: each start, and each end as the first key after it.
pub(crate) fn boundaries(ranges: &[(Key, Key)]) -> Vec<(Vec<u8>, bool)> {
    let mut found = Vec::new();
    for (first, last) in ranges {
        found.push((first.as_bytes().to_vec(), false));
        let mut end = last.as_bytes().to_vec();
        let carry = end.iter_mut().rev().all(|byte| {
            *byte = byte.wrapping_add(1);
            *byte == 0
        });
        if !carry {
            found.push((end, true));
        }
    }
    found.sort();
    found
}
