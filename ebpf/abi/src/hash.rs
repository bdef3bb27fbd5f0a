//! Which endpoint a client gets where all nodes shall choose the same.

use crate::Tuple;

impl Tuple {
    /// A number for the client and what it asks for, the same on every machine. The address that it asks is left out:
    /// a node port has another one at each node.
    #[inline(always)]
    #[must_use]
    pub const fn client_hash(&self) -> u32 {
        let [a, b, c, d] = self.source.words_be;
        let ports = u16::from_be(self.source_port_be) as u32;
        let ports = ports << 16 | u16::from_be(self.destination_port_be) as u32;
        let mut hash = mix(self.protocol as u32, u32::from_be(a));
        hash = mix(hash, u32::from_be(b));
        hash = mix(hash, u32::from_be(c));
        hash = mix(hash, u32::from_be(d));
        finish(mix(hash, ports))
    }
}

/// A step of MurmurHash3.
const fn mix(hash: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}

const fn finish(mut hash: u32) -> u32 {
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Address;

    fn client(address: u32, port: u16) -> Tuple {
        let source = Address::v4(address.to_be());
        Tuple { source, source_port_be: port.to_be(), protocol: 6, ..Tuple::default() }
    }

    #[test]
    fn it_is_the_same_everywhere_and_at_every_address_of_the_service() {
        let tuple = client(0xc633_6407, 40001);
        assert_eq!(tuple.client_hash(), 0x58da_13fc);
        let elsewhere = Tuple { destination: Address::v4(7), ..tuple };
        assert_eq!(elsewhere.client_hash(), tuple.client_hash());
    }

    #[test]
    fn neighbouring_clients_and_ports_are_spread_evenly() {
        const PARTS: usize = 10;
        let mut counts = [0u32; PARTS];
        for host in 0..100 {
            for port in 0..1000 {
                let hash = client(0x0a00_0000 + host, 40_000 + port).client_hash();
                counts[((hash as u64 * PARTS as u64) >> 32) as usize] += 1;
            }
        }
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
    }
}
