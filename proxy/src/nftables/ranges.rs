//! Ranges as the kernel takes them.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

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
