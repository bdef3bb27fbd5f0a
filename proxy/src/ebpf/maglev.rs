//! Slots by consistent hashing (Maglev, NSDI 2016): every node that knows the same endpoints has the same slots, and when
//! an endpoint comes or goes hardly any slot changes that need not. Pure.

use std::net::IpAddr;

use crate::model::Endpoint;

/// Primes: how many slots there may be. Few sizes, so that a list of endpoints seldom gets another one.
const SIZES: [usize; 10] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071];
/// So many slots for each endpoint make shares differ by about one in a hundred.
const SLOTS_EACH: usize = 100;

/// How many slots so many endpoints get.
pub(crate) fn size(endpoints: usize) -> usize {
    let last = SIZES[SIZES.len() - 1];
    match endpoints {
        0 => 0,
        // There is nothing to spread any more.
        many if many > last => many,
        some => SIZES.into_iter().find(|size| *size >= some * SLOTS_EACH).unwrap_or(last),
    }
}

/// The endpoint of each slot. `endpoints` are sorted, so that their order is the same on every node.
pub(crate) fn slots(endpoints: &[Endpoint]) -> Vec<Endpoint> {
    let size = size(endpoints.len());
    if size == endpoints.len() {
        return endpoints.to_vec();
    }
    let mut preferences: Vec<Preferences> =
        endpoints.iter().map(|endpoint| Preferences::of(endpoint, size)).collect();
    let mut slots: Vec<Option<Endpoint>> = vec![None; size];
    let mut left = size;
    // Each in turn takes the first free slot of those that it prefers.
    while left > 0 {
        for (endpoint, preferences) in endpoints.iter().zip(&mut preferences) {
            if left == 0 {
                break;
            }
            let free = preferences.find(|slot| slots.get(*slot).is_some_and(Option::is_none));
            if let Some(slot) = free.and_then(|slot| slots.get_mut(slot)) {
                *slot = Some(*endpoint);
                left -= 1;
            }
        }
    }
    slots.into_iter().flatten().collect()
}

/// All slots, in an order of the endpoint's own, again and again.
struct Preferences {
    next: usize,
    skip: usize,
    size: usize,
}

impl Preferences {
    fn of(endpoint: &Endpoint, size: usize) -> Self {
        let bytes = bytes(endpoint);
        let [offset, skip] = [0, 1].map(|seed| {
            // Less than the size, so it fits.
            let below = |end: usize| usize::try_from(hash(seed, &bytes) % end.max(1) as u64);
            below(if seed == 0 { size } else { size - 1 }).unwrap_or(0)
        });
        Preferences { next: offset, skip: skip + 1, size }
    }
}

impl Iterator for Preferences {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let this = self.next;
        self.next = (this + self.skip) % self.size;
        Some(this)
    }
}

fn bytes(endpoint: &Endpoint) -> Vec<u8> {
    let mut bytes = match endpoint.address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    bytes.extend(endpoint.port.to_be_bytes());
    bytes
}

/// FNV-1a, with the last step of MurmurHash3: the same on every machine and in every version.
fn hash(seed: u64, bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x100_0000_01b3;
    let start = 0xcbf2_9ce4_8422_2325 ^ seed;
    let mut hash =
        bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME));
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn endpoints(numbers: impl IntoIterator<Item = u16>) -> Vec<Endpoint> {
        let of = |n: u16| {
            let [high, low] = n.to_be_bytes();
            Endpoint::new(IpAddr::from([10, 1, high, low]), 8080)
        };
        numbers.into_iter().map(of).collect()
    }

    fn shares(slots: &[Endpoint]) -> BTreeMap<Endpoint, usize> {
        let mut shares = BTreeMap::new();
        for endpoint in slots {
            *shares.entry(*endpoint).or_default() += 1;
        }
        shares
    }

    #[test]
    fn sizes_are_primes_and_large_enough() {
        for size in SIZES {
            assert!((2..size).take_while(|n| n * n <= size).all(|n| size % n != 0), "{size}");
        }
        for (endpoints, slots) in
            [(0, 0), (1, 251), (2, 251), (3, 509), (10, 1021), (1000, 131_071), (200_000, 200_000)]
        {
            assert_eq!(size(endpoints), slots, "{endpoints}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn shares_are_even(numbers in prop::collection::btree_set(any::<u16>(), 1..60)) {
            let all = endpoints(numbers);
            let slots = slots(&all);
            prop_assert_eq!(slots.len(), size(all.len()));
            let shares = shares(&slots);
            prop_assert_eq!(shares.len(), all.len());
            // Turns are taken: nobody gets two slots more than another one.
            let (least, most) = (shares.values().min().unwrap(), shares.values().max().unwrap());
            prop_assert!(most - least <= 1, "{} to {}", least, most);
        }

        /// Of the slots of those that stay only few go to another one.
        #[test]
        fn an_endpoint_goes_and_hardly_anything_else_changes(
            numbers in prop::collection::btree_set(any::<u16>(), 6..40),
            gone in any::<prop::sample::Index>(),
        ) {
            let all = endpoints(numbers);
            let gone = all[gone.index(all.len())];
            let left: Vec<_> = all.iter().copied().filter(|endpoint| *endpoint != gone).collect();
            prop_assume!(size(all.len()) == size(left.len()));
            let (before, after) = (slots(&all), slots(&left));
            let moved = before.iter().zip(&after).filter(|(a, b)| a != b && **a != gone).count();
            prop_assert!(moved * 8 < before.len(), "{moved} of {}", before.len());
        }
    }

    /// Another version of this program, on another node, must come to the same.
    #[test]
    fn slots_are_the_same_forever() {
        let slots = slots(&endpoints(1..=3));
        let first = slots.iter().take(8).copied().collect::<Vec<_>>();
        let expected = [2, 1, 1, 2, 1, 3, 3, 1];
        assert_eq!(first, endpoints(expected));
    }
}
