//! IP addresses as keys.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::layout;

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d`: one set of maps serves both families.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    pub words_be: [u32; 4],
}

layout! { Address: 16, }

const MAPPED_BE: u32 = 0xffffu32.to_be();

impl Address {
    /// `0.0.0.0`, which stands for "the node's own IPv4 addresses" in a key.
    pub const ANY4: Address = Address::v4(0);
    /// `::`, which stands for "the node's own IPv6 addresses" in a key.
    pub const ANY6: Address = Address { words_be: [0; 4] };

    pub const LOOPBACK4: Address = Address::v4(0x7f00_0001_u32.to_be());
    pub const LOOPBACK6: Address = Address { words_be: [0, 0, 0, 1_u32.to_be()] };

    /// From an IPv4 address in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn v4(address_be: u32) -> Self {
        Address { words_be: [0, 0, MAPPED_BE, address_be] }
    }

    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.words_be[0] == 0 && self.words_be[1] == 0 && self.words_be[2] == MAPPED_BE
    }

    /// The address that stands for the node's own ones in this address' family.
    #[inline(always)]
    #[must_use]
    pub const fn any(&self) -> Self {
        if self.is_v4() { Address::ANY4 } else { Address::ANY6 }
    }

    /// Equality without a call to `memcmp`, which BPF programs do not have.
    #[inline(always)]
    #[must_use]
    pub const fn is(&self, other: &Self) -> bool {
        let (a, b) = (&self.words_be, &other.words_be);
        a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
    }

    /// `0.0.0.0` or `::`.
    #[inline(always)]
    #[must_use]
    pub const fn is_unspecified(&self) -> bool {
        let [a, b, c, d] = self.words_be;
        a | b | d == 0 && (c == 0 || c == MAPPED_BE)
    }

    /// A copy word by word: BPF programs have `memmove` only byte by byte.
    #[inline(always)]
    pub const fn set(&mut self, from: &Self) {
        let [a, b, c, d] = from.words_be;
        self.words_be[0] = a;
        self.words_be[1] = b;
        self.words_be[2] = c;
        self.words_be[3] = d;
    }

    /// 127.0.0.0/8 or `::1`.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        let [a, b, c, d] = self.words_be;
        if self.is_v4() {
            u32::from_be(d) >> 24 == 127
        } else {
            a | b | c == 0 && d == 1u32.to_be()
        }
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Address::v4(u32::from_ne_bytes(v4.octets())),
            IpAddr::V6(v6) => {
                let octets = v6.octets();
                let word = |i: usize| {
                    u32::from_ne_bytes([octets[i], octets[i + 1], octets[i + 2], octets[i + 3]])
                };
                Address { words_be: [word(0), word(4), word(8), word(12)] }
            }
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        if address.is_v4() {
            return Ipv4Addr::from(u32::from_be(address.words_be[3])).into();
        }
        let [a, b, c, d] = address.words_be.map(|word| u128::from(u32::from_be(word)));
        Ipv6Addr::from(a << 96 | b << 64 | c << 32 | d).into()
    }
}
