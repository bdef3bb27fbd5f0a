//! Checksums of the Internet (RFC 1071, 1624), corrected without reading the packet. For programs that have nobody who
//! does that for them.
//!
//! Sums are taken over words as they are in memory: the result then is as it is in the packet, on every machine.

use crate::{Address, Tuple};

/// A sum that was not folded yet: room for thousands of words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    #[inline(always)]
    #[must_use]
    pub const fn and(self, word: u32) -> Self {
        Sum(self.0 + word as u64)
    }

    #[inline(always)]
    #[must_use]
    pub const fn and_address(self, address: &Address, is_v4: bool) -> Self {
        let [a, b, c, d] = address.words_be;
        if is_v4 { self.and(d) } else { self.and(a).and(b).and(c).and(d) }
    }

    /// A word becomes another one.
    #[inline(always)]
    #[must_use]
    pub const fn changed(self, from: u32, to: u32) -> Self {
        self.and(!from).and(to)
    }

    #[inline(always)]
    #[must_use]
    pub const fn changed_address(self, from: &Address, to: &Address, is_v4: bool) -> Self {
        let ([a, b, c, d], [e, f, g, h]) = (from.words_be, to.words_be);
        let last = self.changed(d, h);
        if is_v4 { last } else { last.changed(a, e).changed(b, f).changed(c, g) }
    }

    #[inline(always)]
    #[must_use]
    pub const fn changed_addresses(self, from: &Tuple, to: &Tuple, is_v4: bool) -> Self {
        self.changed_address(&from.source, &to.source, is_v4).changed_address(
            &from.destination,
            &to.destination,
            is_v4,
        )
    }

    #[inline(always)]
    #[must_use]
    pub const fn changed_ports(self, from: &Tuple, to: &Tuple) -> Self {
        self.changed(ports(from), ports(to))
    }

    /// In 16 bits.
    #[inline(always)]
    #[must_use]
    pub const fn folded(self) -> u16 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
        let sum = (sum & 0xffff) + (sum >> 16);
        ((sum & 0xffff) + (sum >> 16)) as u16
    }

    /// A checksum after the changes that this is the sum of.
    #[inline(always)]
    #[must_use]
    pub const fn correct(self, checksum: u16) -> u16 {
        !self.and(!checksum as u32 & 0xffff).folded()
    }
}

const fn ports(tuple: &Tuple) -> u32 {
    tuple.source_port_be as u32 | (tuple.destination_port_be as u32) << 16
}

/// What TCP and UDP sum up besides their own bytes, which are `length`.
#[inline(always)]
#[must_use]
pub const fn pseudo_header(tuple: &Tuple, length: u16, is_v4: bool) -> Sum {
    Sum(0)
        .and_address(&tuple.source, is_v4)
        .and_address(&tuple.destination, is_v4)
        .and((tuple.protocol as u16).to_be() as u32)
        .and(length.to_be() as u32)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::*;

    /// As in the packet.
    fn checksum(bytes: &[u8]) -> u16 {
        let words = bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
        let mut sum: u64 = words.map(u64::from).sum();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!(sum as u16)).to_be()
    }

    fn tuple(seed: u32) -> Tuple {
        let word = |i: u32| seed.wrapping_mul(0x9e37_79b9).rotate_left(i * 7) ^ i;
        let address = |i| Address { words_be: [word(i), word(i + 1), word(i + 2), word(i + 3)] };
        Tuple {
            source: address(0),
            destination: address(4),
            source_port_be: word(9) as u16,
            destination_port_be: word(10) as u16,
            protocol: 17,
            ..Tuple::default()
        }
    }

    fn bytes(tuple: &Tuple) -> Vec<u8> {
        let words = tuple.source.words_be.into_iter().chain(tuple.destination.words_be);
        let mut bytes: Vec<u8> = words.flat_map(u32::to_ne_bytes).collect();
        for port in [tuple.source_port_be, tuple.destination_port_be] {
            bytes.extend(port.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn corrections_give_what_computing_gives() {
        for seed in 0..2000 {
            let (from, to) = (tuple(seed), tuple(seed * 31 + 7));
            let change = Sum::default().changed_addresses(&from, &to, false);
            let change = change.changed_ports(&from, &to);
            assert_eq!(change.correct(checksum(&bytes(&from))), checksum(&bytes(&to)), "{seed}");
        }
    }

    #[test]
    fn of_ipv4_only_the_address_counts() {
        let (from, to) = (Address::v4(0x0102_0304), Address::v4(0xfffe_0000));
        let short = Sum::default().changed_address(&from, &to, true);
        let long = Sum::default().changed_address(&from, &to, false);
        assert_eq!(short.correct(0x1234), long.correct(0x1234));
    }

    #[test]
    fn a_pseudo_header_is_summed_up() {
        let tuple = tuple(5);
        let mut header = bytes(&Tuple { source_port_be: 0, destination_port_be: 0, ..tuple });
        header.extend([0, 17, 5, 220]);
        assert_eq!(!pseudo_header(&tuple, 1500, false).folded(), checksum(&header));
    }
}
