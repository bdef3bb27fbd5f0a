//! Filters in front of the tables. Most packets are no business of Services, and to see that must cost next to nothing:
//! a flag for the hash of an address tells that the address may matter.
//!
//! A flag that is set stays, so a flow is found also when its Service is gone. Two addresses may have one flag: then a
//! packet is looked at for nothing.

use crate::Address;

/// Elements of a filter, eight flags each.
pub const FILTER_WORDS: u32 = 16_384;

const BITS: u32 = FILTER_WORDS.trailing_zeros() + 3;

/// One flag of a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilterPlace {
    /// The element.
    pub word: u32,
    /// Below 8: the byte in it.
    pub flag: u32,
}

/// The byte says: an address that may matter.
pub const FILTER_ADDRESS: u8 = 1;
/// The byte says: a part of a range that may matter.
pub const FILTER_RANGE: u8 = 2;

impl FilterPlace {
    #[inline(always)]
    const fn of_hash(hash: u32) -> Self {
        let place = hash >> (32 - BITS);
        FilterPlace { word: place >> 3, flag: place & 7 }
    }

    /// Where an address has its flag.
    #[inline(always)]
    #[must_use]
    pub const fn of_address(address: &Address) -> Self {
        let [a, b, c, d] = address.words_be;
        let mixed = a.wrapping_mul(0x85eb_ca6b) ^ b.wrapping_mul(0xc2b2_ae35);
        let mixed = mixed ^ c.wrapping_mul(0x27d4_eb2f) ^ d;
        Self::of_hash(mixed.wrapping_mul(0x9e37_79b1))
    }

    /// Where the part of a range has its flag that an address is in: 16 bits of IPv4, 32 of IPv6.
    #[inline(always)]
    #[must_use]
    pub const fn of_range(address: &Address) -> Self {
        let part = match address.is_v4() {
            true => u32::from_be(address.words_be[3]) >> 16,
            false => u32::from_be(address.words_be[0]),
        };
        Self::of_hash(part.wrapping_mul(0x85eb_ca6b))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use core::net::Ipv4Addr;
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn addresses_of_a_range_have_different_flags() {
        let first = u32::from(Ipv4Addr::new(10, 96, 0, 0));
        let places = (0..10_000).map(|n| {
            let place = FilterPlace::of_address(&Address::v4((first + n).to_be()));
            assert!(place.word < FILTER_WORDS && place.flag < 8);
            (place.word, place.flag)
        });
        assert!(places.collect::<HashSet<_>>().len() > 9_000);
    }

    #[test]
    fn a_range_has_one_flag_for_each_part() {
        let of = |a, b, c, d| FilterPlace::of_range(&Address::v4(u32::from_ne_bytes([a, b, c, d])));
        assert_eq!(of(10, 96, 0, 1), of(10, 96, 255, 255));
        assert_ne!(of(10, 96, 0, 1), of(10, 97, 0, 1));
        assert_ne!(of(10, 96, 0, 1), of(10, 244, 0, 1));
    }
}
