//! How the node that a client asks tells the node of the endpoint which Service was asked (direct server return): in an
//! option of IPv4, or in an extension header of IPv6, right behind the IP header. Both are of the numbers for
//! experiments (RFC 4727), copied into pieces, and skipped by who does not know them.

use crate::{Address, layout};

/// The option of IPv4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told4 {
    /// [`TOLD4_KIND`].
    pub kind: u8,
    /// Of all of it.
    pub length: u8,
    pub port_be: u16,
    pub address_be: u32,
}

/// The extension header of IPv6: destination options with one option.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told6 {
    /// The protocol that follows.
    pub next: u8,
    /// In eight bytes, without the first ones.
    pub header_length: u8,
    /// [`TOLD6_KIND`].
    pub kind: u8,
    /// Of what follows.
    pub length: u8,
    pub address: Address,
    pub port_be: u16,
    pub zero: u16,
}

pub const TOLD4_KIND: u8 = 0x9e;
pub const TOLD4_LENGTH: u32 = size_of::<Told4>() as u32;
pub const TOLD6_KIND: u8 = 0x1e;
pub const TOLD6_LENGTH: u32 = size_of::<Told6>() as u32;
/// Destination options of IPv6.
pub const PROTOCOL_OPTIONS6: u8 = 60;

impl Told4 {
    #[inline(always)]
    #[must_use]
    pub const fn new(address: &Address, port_be: u16) -> Self {
        let [.., address_be] = address.words_be;
        Told4 { kind: TOLD4_KIND, length: TOLD4_LENGTH as u8, port_be, address_be }
    }

    #[inline(always)]
    #[must_use]
    pub const fn is_one(&self) -> bool {
        self.kind == TOLD4_KIND && self.length as u32 == TOLD4_LENGTH
    }
}

impl Told6 {
    const HEADER_LENGTH: u8 = (TOLD6_LENGTH / 8 - 1) as u8;
    const LENGTH: u8 = TOLD6_LENGTH as u8 - 4;

    #[inline(always)]
    #[must_use]
    pub const fn new(next: u8, address: &Address, port_be: u16) -> Self {
        Told6 {
            next,
            header_length: Self::HEADER_LENGTH,
            kind: TOLD6_KIND,
            length: Self::LENGTH,
            address: *address,
            port_be,
            zero: 0,
        }
    }

    #[inline(always)]
    #[must_use]
    pub const fn is_one(&self) -> bool {
        self.header_length == Self::HEADER_LENGTH
            && self.kind == TOLD6_KIND
            && self.length == Self::LENGTH
    }
}

layout! {
    Told4: 8,
    Told6: 24,
}
