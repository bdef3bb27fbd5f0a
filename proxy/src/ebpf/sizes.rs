//! How many entries maps have room for. Pure.
//!
//! The least is small, so that a node with little to do needs little memory. From there maps grow by doubling, up
//! to what the configuration allows.

use std::collections::BTreeMap;

use super::config::{Algorithm, EbpfConfig};
use super::item::Key;
use super::maglev;
use super::numbering::is_hashed;
use crate::model::{PortPlan, Protocol, Scope, ServicePlan};

/// Entries of the maps that Services are written into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amounts {
    pub(crate) slots: u32,
    pub(crate) members: u32,
    pub(crate) pools: u32,
    pub(crate) sources: u32,
    pub(crate) frontends: u32,
    pub(crate) addresses: u32,
}

impl Amounts {
    /// What plans will need, or a little more.
    pub(crate) fn of_plans<'a>(
        plans: impl Iterator<Item = &'a ServicePlan>,
        algorithm: Algorithm,
    ) -> Self {
        let mut amounts = Amounts::default();
        for plan in plans {
            amounts.addresses += length(plan.guarded.len());
            for port in &plan.ports {
                amounts.add_port(port, is_hashed(plan, port, algorithm));
            }
        }
        amounts
    }

    fn add_port(&mut self, port: &PortPlan, hashed: bool) {
        self.frontends += length(port.frontends.len());
        let sources = port.frontends.iter().filter_map(|frontend| frontend.sources.as_ref());
        self.sources += sources.map(|sources| length(sources.len())).sum::<u32>();
        for scope in [Scope::Cluster, Scope::Local] {
            let endpoints = port.pool(scope).len();
            let slots = length(endpoints);
            self.slots += if hashed { length(maglev::size(endpoints)) } else { slots };
            self.pools += 1;
            if port.protocol == Protocol::Udp || port.affinity_secs.is_some() {
                self.members += slots + length(port.draining.len());
            }
        }
    }

    pub(crate) fn of_keys<'a>(keys: impl Iterator<Item = &'a Key>) -> Self {
        let mut amounts = Amounts::default();
        keys.for_each(|key| amounts.count(key));
        amounts
    }

    pub(crate) fn count(&mut self, key: &Key) {
        let entries = match key {
            Key::Slot(_) => &mut self.slots,
            Key::Member(_) => &mut self.members,
            Key::Pool(_) => &mut self.pools,
            Key::Source(_) => &mut self.sources,
            Key::Frontend(_) => &mut self.frontends,
            Key::Address(_) => &mut self.addresses,
        };
        *entries = entries.saturating_add(1);
    }

    fn with(self, other: Amounts, each: impl Fn(u32, u32) -> u32) -> Amounts {
        Amounts {
            slots: each(self.slots, other.slots),
            members: each(self.members, other.members),
            pools: each(self.pools, other.pools),
            sources: each(self.sources, other.sources),
            frontends: each(self.frontends, other.frontends),
            addresses: each(self.addresses, other.addresses),
        }
    }

    pub(crate) fn plus(self, other: Amounts) -> Amounts {
        self.with(other, u32::saturating_add)
    }

    pub(crate) fn minus(self, other: Amounts) -> Amounts {
        self.with(other, u32::saturating_sub)
    }

    /// By map.
    pub(crate) fn entries(&self) -> [(&'static str, u32); 6] {
        [
            ("addresses", self.addresses),
            ("frontends", self.frontends),
            ("members", self.members),
            ("pools", self.pools),
            ("slots", self.slots),
            ("sources", self.sources),
        ]
    }
}

/// As many as a map can tell.
pub(crate) fn length(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

/// Between what bounds a map is sized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) least: u32,
    pub(crate) most: u32,
}

impl Bounds {
    /// Those of a map; nothing for one whose size is fixed.
    pub(crate) fn of(map: &str, config: &EbpfConfig, cpus: u32) -> Option<Self> {
        let endpoints = config.max_endpoints;
        let (least, most) = match map {
            // Each CPU keeps some hundred entries ready for itself, which nobody else gets.
            "flows_in" | "flows_out" => (cpus.saturating_mul(1024).max(16_384), config.max_flows),
            "affinity" => (cpus.saturating_mul(1024).max(4_096), config.max_flows),
            "slots" => (16_384, endpoints),
            "frontends" | "members" => (4_096, endpoints / 4),
            "counters" => (16_384, endpoints / 4),
            "pools" | "addresses" => (4_096, endpoints / 8),
            // Room that is not used costs nothing.
            "sources" => (endpoints / 16, endpoints / 16),
            _ => return None,
        };
        let most = most.max(1);
        Some(Bounds { least: least.min(most), most })
    }

    /// The size for so many entries, of a map that may be there already. It becomes smaller only when the
    /// configuration allows less.
    pub(crate) fn size(self, found: Option<u32>, needed: u32) -> u32 {
        let size = needed.checked_next_power_of_two().unwrap_or(u32::MAX);
        size.max(self.least).max(found.unwrap_or(0)).min(self.most)
    }
}

/// What maps must have room for, by name; those that are not named keep what they have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs(BTreeMap<&'static str, u32>);

impl Needs {
    pub(crate) fn services(amounts: &Amounts) -> Self {
        let mut needs: BTreeMap<_, _> = amounts.entries().into();
        // Each Service port is counted, and has a frontend at least.
        needs.insert("counters", amounts.frontends);
        Needs(needs)
    }

    pub(crate) fn also(mut self, map: &'static str, entries: u32) -> Self {
        self.0.insert(map, entries);
        self
    }

    pub(crate) fn of(&self, map: &str) -> u32 {
        self.0.get(map).copied().unwrap_or(0)
    }
}

/// How many entries a table that programs fill should have room for instead, if it is too full.
pub(crate) fn grown(entries: u32, max_entries: u32) -> Option<u32> {
    let (entries, max) = (u64::from(entries), u64::from(max_entries));
    // From a full one nobody knows how much was pushed out.
    let factor = match entries * 100 / max.max(1) {
        95.. => 4,
        75.. => 2,
        _ => return None,
    };
    Some(u32::try_from(max * factor).unwrap_or(u32::MAX))
}

/// How many entries a hash table has, when `found` were met in a part of its buckets; nothing when that part is none.
pub(crate) fn estimate(found: u32, part: std::ops::Range<u32>, max_entries: u32) -> Option<u32> {
    let buckets = u64::from(max_entries.checked_next_power_of_two()?);
    let covered = u64::from(part.end.checked_sub(part.start)?);
    let all = (u64::from(found) * buckets).checked_div(covered)?;
    u32::try_from(all).ok().map(|all| all.min(max_entries))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> EbpfConfig {
        EbpfConfig { max_flows: 100_000, max_endpoints: 1 << 20, ..EbpfConfig::default() }
    }

    #[test]
    fn a_map_begins_small_and_doubles_up_to_what_is_allowed() {
        let slots = Bounds::of("slots", &config(), 2).unwrap();
        for (found, needed, size) in [
            (None, 0, 16_384),
            (None, 16_384, 16_384),
            (None, 16_385, 32_768),
            (Some(16_384), 100_000, 131_072),
            // It was larger before.
            (Some(131_072), 10, 131_072),
            (Some(131_072), 2_000_000, 1_048_576),
            (Some(2_097_152), 10, 1_048_576),
            (None, u32::MAX, 1_048_576),
        ] {
            assert_eq!(slots.size(found, needed), size, "{found:?} {needed}");
        }
    }

    #[test]
    fn what_is_allowed_counts_more_than_what_is_usual() {
        let tiny = EbpfConfig { max_flows: 100, max_endpoints: 8, ..EbpfConfig::default() };
        for (map, most) in [("flows_in", 100), ("slots", 8), ("frontends", 2), ("pools", 1)] {
            let bounds = Bounds::of(map, &tiny, 2).unwrap();
            assert_eq!((bounds.least, bounds.most), (most, most), "{map}");
        }
        // Not none, which the kernel refuses.
        assert_eq!(Bounds::of("sources", &tiny, 2).unwrap().most, 1);
        assert_eq!(Bounds::of("settings", &tiny, 2), None);
    }

    #[test]
    fn many_cpus_need_larger_tables() {
        let flows = |cpus| Bounds::of("flows_in", &config(), cpus).unwrap().least;
        assert_eq!((flows(2), flows(64)), (16_384, 65_536));
    }

    #[test]
    fn a_table_grows_when_three_quarters_are_used_and_faster_when_it_is_full() {
        assert_eq!(grown(11_999, 16_000), None);
        assert_eq!(grown(12_000, 16_000), Some(32_000));
        assert_eq!(grown(15_999, 16_000), Some(64_000));
        assert_eq!(grown(0, 0), None);
        assert_eq!(grown(u32::MAX, u32::MAX), Some(u32::MAX));
    }

    #[test]
    fn a_part_of_the_buckets_tells_how_full_the_table_is() {
        assert_eq!(estimate(100, 0..1024, 16_384), Some(1600));
        assert_eq!(estimate(1600, 0..16_384, 16_384), Some(1600));
        // The kernel rounds up, and a table is never more than full.
        assert_eq!(estimate(100, 0..128, 100), Some(100));
        assert_eq!(estimate(5, 7..7, 100), None);
    }
}
