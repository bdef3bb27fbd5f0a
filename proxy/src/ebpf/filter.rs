//! The filters in front of the programs' tables: which addresses may matter.
//!
//! What is set there is never taken back: packets of connections whose Service is gone still have to be looked at. So
//! what is lost is found again in the tables of connections.

use std::collections::BTreeMap;
use std::path::Path;

use keelson_ebpf_abi::{
    Address, FILTER_ADDRESS, FILTER_RANGE, FILTER_WORDS, FLOW_FROM_ENDPOINT, FLOW_MASQUERADE,
    FLOW_MASQUERADE_SOON, FLOW_TO_ENDPOINT, FLOW_UNMASQUERADE, FilterPlace, Flow, RangePrefix,
    Tuple,
};

use super::error::EbpfError;
use super::sys::Cursor;
use super::table::Table;

/// Where packets go that may concern Services, and who is a client.
pub(crate) const FILTERS: [&str; 2] = [DESTINATIONS, CLIENTS];
const DESTINATIONS: &str = "destinations";
const CLIENTS: &str = "clients";
/// Above that reading all of it is cheaper than reading parts.
const FEW: usize = 256;

/// The map of flags.
pub(crate) struct Filter(Table<u32, [u8; 8]>);

impl Filter {
    pub(crate) fn open(pins: &Path) -> Result<Self, EbpfError> {
        Table::open(pins, DESTINATIONS).map(Filter)
    }

    /// From now on the programs look at packets to these addresses.
    pub(crate) fn add_addresses<'a>(
        &self,
        addresses: impl Iterator<Item = &'a Address>,
    ) -> Result<(), EbpfError> {
        let named = addresses.filter(|address| !address.is_unspecified());
        self.add(named.map(|address| (FilterPlace::of_address(address), FILTER_ADDRESS)))
    }

    /// The same for all addresses of these ranges.
    pub(crate) fn add_ranges<'a>(
        &self,
        ranges: impl Iterator<Item = &'a RangePrefix>,
    ) -> Result<(), EbpfError> {
        self.add(ranges.flat_map(places_of_range))
    }

    fn add(&self, places: impl Iterator<Item = (FilterPlace, u8)>) -> Result<(), EbpfError> {
        let mut wanted: BTreeMap<u32, [u8; 8]> = BTreeMap::new();
        for (place, flag) in places {
            wanted.entry(place.word).or_default()[place.flag as usize] |= flag;
        }
        let found = match wanted.len() {
            0..FEW => None,
            _ => Some(self.0.read()?),
        };
        for (word, flags) in wanted {
            let before = match &found {
                Some(found) => found.get(&word).copied(),
                None => self.0.get(&word)?,
            };
            let before = before.unwrap_or_default();
            let after: [u8; 8] = std::array::from_fn(|i| before[i] | flags[i]);
            if before != after {
                self.0.put(&word, &after)?;
            }
        }
        Ok(())
    }
}

/// Names in a filter, one of [`FILTERS`], whom connections in these tables need there.
pub(crate) fn recall(
    name: &'static str,
    filter: &Path,
    arriving: &Path,
    leaving: &Path,
) -> Result<(), EbpfError> {
    const AT_ONCE: usize = 8192;
    let filter = Filter(Table::open_at(filter.to_owned(), name)?);
    let tables: [(_, _, Of); 2] =
        [(arriving, "flows_in", of_arriving), (leaving, "flows_out", of_leaving)];
    for (path, table, needed) in tables {
        let (table, mut cursor) = (Table::open_at(path.to_owned(), table)?, Cursor::default());
        while !cursor.ended {
            let found: Vec<(Tuple, Flow)> = table.read_on(&mut cursor, AT_ONCE)?;
            let needed = found.iter().map(|(key, flow)| needed(key, flow));
            let addresses: Vec<Address> = match name {
                CLIENTS => needed.filter_map(|needed| needed.client).collect(),
                _ => needed.filter_map(|needed| needed.destination).collect(),
            };
            filter.add_addresses(addresses.iter())?;
        }
    }
    Ok(())
}

type Of = fn(&Tuple, &Flow) -> Needed;

/// Who must be named so that packets of a connection are looked at.
struct Needed {
    client: Option<Address>,
    destination: Option<Address>,
}

fn of_arriving(key: &Tuple, flow: &Flow) -> Needed {
    let client = match flow.role {
        FLOW_TO_ENDPOINT => Some(key.source),
        FLOW_UNMASQUERADE => Some(flow.to.destination),
        // The node itself.
        _ => None,
    };
    Needed { client, destination: Some(key.destination) }
}

fn of_leaving(key: &Tuple, flow: &Flow) -> Needed {
    match flow.role {
        FLOW_FROM_ENDPOINT => Needed { client: Some(key.destination), destination: None },
        FLOW_MASQUERADE | FLOW_MASQUERADE_SOON => {
            Needed { client: Some(key.source), destination: None }
        }
        // From the node itself.
        _ => Needed { client: None, destination: Some(key.destination) },
    }
}

/// All parts of a range; everything where it has more parts than there are flags.
fn places_of_range(range: &RangePrefix) -> Box<dyn Iterator<Item = (FilterPlace, u8)>> {
    let address = range.key.address;
    let word = if address.is_v4() { 3 } else { 0 };
    // How many leading bits tell parts apart, and by how much they are shifted in their word.
    let (bits, shift) = if address.is_v4() { (96 + 16, 16) } else { (32, 0) };
    let free = bits - range.prefix_len.min(bits);
    if free >= FILTER_WORDS.trailing_zeros() {
        let flags = (0..FILTER_WORDS).flat_map(|word| (0..8).map(move |flag| (word, flag)));
        return Box::new(flags.map(|(word, flag)| (FilterPlace { word, flag }, FILTER_RANGE)));
    }
    let first = u32::from_be(address.words_be[word]) >> shift;
    Box::new((0..1 << free).map(move |part: u32| {
        let mut address = address;
        address.words_be[word] = ((first + part) << shift).to_be();
        (FilterPlace::of_range(&address), FILTER_RANGE)
    }))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use keelson_ebpf_abi::RangeKey;

    use super::*;

    #[test]
    fn every_address_of_a_range_is_in_a_part_that_is_named() {
        for (network, prefix_len, inside) in [
            ("10.96.0.0", 12, "10.111.255.255"),
            ("10.96.0.0", 24, "10.96.0.7"),
            ("0.0.0.0", 0, "203.0.113.9"),
            ("10.0.0.0", 8, "10.255.3.4"),
            ("fd96::", 108, "fd96::f:1"),
            ("fd96:0:0:1::", 64, "fd96:0:0:1::9"),
            ("fd00::", 8, "fdff:ffff::1"),
        ] {
            let [network, inside] = [network, inside].map(|ip| ip.parse::<IpAddr>().unwrap());
            let prefix_len = prefix_len + if network.is_ipv4() { 96 } else { 0 };
            let range = RangePrefix { prefix_len, key: RangeKey { address: network.into() } };
            let place = FilterPlace::of_range(&inside.into());
            assert!(places_of_range(&range).any(|(named, _)| named == place), "{network}");
        }
    }

    #[test]
    fn a_small_range_is_a_small_part() {
        let address = IpAddr::from([10, 96, 0, 0]).into();
        let range = RangePrefix { prefix_len: 96 + 12, key: RangeKey { address } };
        assert_eq!(places_of_range(&range).count(), 16);
    }
}
