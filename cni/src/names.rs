//! Names and hardware addresses that follow from an attachment alone, so that they can be found again without a record.

use keelson_netlink::route::Mac;

use crate::ledger::Key;

/// What the names of our host side links start with.
pub const LINK_PREFIX: &str = "keel";
/// The kernel's limit for an alias (IFALIASZ) without its closing zero.
const ALIAS_LIMIT: usize = 255;

/// The names of one attachment's parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The host side link: `keel` and 11 hex digits, 15 bytes as the kernel allows.
    pub host: String,
    /// The host side link's alias. It is set as the last step of ADD: a link without it is unfinished.
    pub alias: String,
    /// The host side's hardware address.
    pub host_mac: Mac,
    /// The pod side's hardware address.
    pub pod_mac: Mac,
}

impl Names {
    /// The names for `key` in the network `network`.
    #[must_use]
    pub fn of(network: &str, key: &Key) -> Self {
        let text = format!("{network}/{}/{}", key.container_id, key.ifname);
        let hash = mix(fnv1a(text.as_bytes()));
        let alias = format!("{}{}:{}", alias_prefix(network), key.container_id, key.ifname);
        let alias = if alias.len() > ALIAS_LIMIT { format!("keelson:#{hash:016x}") } else { alias };
        Self {
            host: format!("{LINK_PREFIX}{:011x}", hash & 0xfff_ffff_ffff),
            alias,
            host_mac: mac(mix(hash ^ 1)),
            pod_mac: mac(mix(hash ^ 2)),
        }
    }
}

/// What the aliases of a network's links start with.
#[must_use]
pub fn alias_prefix(network: &str) -> String {
    format!("keelson:{network}:")
}

/// A locally administered unicast address.
fn mac(hash: u64) -> Mac {
    let [first, rest @ ..] = hash.to_be_bytes();
    let [b, c, d, e, f, ..] = rest;
    Mac([(first & 0xfc) | 2, b, c, d, e, f])
}

/// FNV-1a, 64 bits: enough to tell a torn line from a whole one and to spread names.
#[must_use]
pub fn fnv1a(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// The finishing step of splitmix64, which spreads a change of any bit over all of them.
fn mix(hash: u64) -> u64 {
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(id: &str, ifname: &str) -> Names {
        Names::of("net", &Key { container_id: id.to_owned(), ifname: ifname.to_owned() })
    }

    #[test]
    fn names_are_stable_and_differ() {
        let names = of("abc", "eth0");
        assert_eq!(names, of("abc", "eth0"));
        assert_eq!(names.host.len(), 15);
        assert_eq!(names.alias, "keelson:net:abc:eth0");
        let other = of("abc", "eth1");
        assert_ne!(names.host, other.host);
        assert_ne!(names.pod_mac, other.pod_mac);
        assert_ne!(names.pod_mac, names.host_mac);
        assert_eq!(names.pod_mac.0[0] & 3, 2);
    }

    #[test]
    fn an_alias_that_is_too_long_is_shortened() {
        assert!(of(&"x".repeat(300), "eth0").alias.len() <= ALIAS_LIMIT);
    }
}
