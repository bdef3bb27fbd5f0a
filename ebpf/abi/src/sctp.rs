//! SCTP's checksum, corrected without reading the packet: CRC32c is linear, so what a change of some bytes
//! changes in it depends only on these bytes and on how many follow.
//!
//! In the algebra of CRCs a following byte is a multiplication by x to the power of 8. These are looked up, four bits
//! at a time and without any condition: verifiers would follow each of them both ways.

/// The polynomial of CRC32c, its bits reversed as in all that follows.
const POLYNOMIAL: u32 = 0x82f6_3b78;
const ONE: u32 = 1 << 31;
/// More bytes than an IP packet has: 2 to that power.
const LENGTH_BITS: usize = 16;
const NIBBLES: usize = u32::BITS as usize / 4;

/// What each value of each nibble becomes by a multiplication. Were its size a power of two, the compiler would put
/// offsets together by `or`, after which verifiers of old kernels know nothing of them any more.
#[derive(Clone, Copy)]
struct Products {
    values: [[u32; 16]; NIBBLES],
    #[expect(dead_code, reason = "the type's size must share low bits with offsets in it")]
    odd: u32,
}

/// Element `k` stands for the bit `k` of a length: 0, and 2 to the power of `k` bytes.
static LENGTHS: [[Products; 2]; LENGTH_BITS] = lengths();

/// By what a packet's checksum changes (exclusive or, as it is in the packet) when its ports do. `length` is that of
/// the SCTP packet.
#[inline(always)]
#[must_use]
pub fn sctp_checksum_change(from: [u16; 2], to: [u16; 2], length: u32) -> u32 {
    let [a, b] = [from[0] ^ to[0], from[1] ^ to[1]].map(u16::to_ne_bytes);
    let mut change = u32::from_le_bytes([a[0], a[1], b[0], b[1]]);
    for (bit, products) in LENGTHS.iter().enumerate() {
        change = product(&products[(length >> bit & 1) as usize], change);
    }
    u32::from_ne_bytes(change.to_le_bytes())
}

#[inline(always)]
fn product(products: &Products, a: u32) -> u32 {
    let mut product = 0;
    for (nibble, values) in products.values.iter().enumerate() {
        product ^= values[(a >> (4 * nibble) & 15) as usize];
    }
    product
}

/// Multiplies by x.
const fn shift(a: u32) -> u32 {
    if a & 1 == 0 { a >> 1 } else { a >> 1 ^ POLYNOMIAL }
}

/// Multiplies modulo the polynomial.
const fn multiply(mut a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    while a != 0 {
        if a & ONE != 0 {
            product ^= b;
        }
        a <<= 1;
        b = shift(b);
    }
    product
}

const fn products(factor: u32) -> Products {
    let mut products = Products { values: [[0; 16]; NIBBLES], odd: 0 };
    let mut nibble = 0;
    while nibble < NIBBLES {
        let mut value = 0u32;
        while value < 16 {
            products.values[nibble][value as usize] = multiply(value << (4 * nibble), factor);
            value += 1;
        }
        nibble += 1;
    }
    products
}

const fn lengths() -> [[Products; 2]; LENGTH_BITS] {
    // x to the power of 8.
    let mut power = ONE >> 8;
    let mut lengths = [[products(ONE); 2]; LENGTH_BITS];
    let mut bit = 0;
    while bit < LENGTH_BITS {
        lengths[bit][1] = products(power);
        power = multiply(power, power);
        bit += 1;
    }
    lengths
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::*;

    fn crc32c(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = shift(crc);
            }
        }
        !crc
    }

    #[test]
    fn the_checksum_is_the_known_one() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_change_of_ports_changes_the_checksum_as_if_it_were_computed_again() {
        for length in (12..300).chain([1400, 9000, 65_515]) {
            let mut packet: Vec<u8> = (0..length).map(|i| (i * 7 % 256) as u8).collect();
            packet[8..12].fill(0);
            let before = crc32c(&packet);
            let port = |i: usize| u16::from_ne_bytes([packet[i], packet[i + 1]]);
            let (from, to) = ([port(0), port(2)], [0x1234u16, 0xfedc]);
            packet[..2].copy_from_slice(&to[0].to_ne_bytes());
            packet[2..4].copy_from_slice(&to[1].to_ne_bytes());
            let in_packet = |crc: u32| u32::from_ne_bytes(crc.to_le_bytes());
            let change = sctp_checksum_change(from, to, u32::try_from(length).unwrap_or(0));
            assert_eq!(in_packet(before) ^ change, in_packet(crc32c(&packet)), "{length}");
        }
    }
}
