//! The maps of the kernel, and writing into them.

use std::path::Path;

use keelson_ebpf_abi::{
    Address, Counters, Endpoint, Frontend, FrontendKey, Interface, MemberKey, Pool, RangePrefix,
    Settings, SlotKey, SourcePrefix, XdpInterface,
};

use super::error::EbpfError;
use super::filter::Filter;
use super::item::{Item, Key, Operations};
use super::sizes::Amounts;
use super::table::{PerCpu, Table};

/// What user space writes, and `counters`, where it only removes. Named as in `ebpf/programs/src/maps.rs`.
pub(crate) struct Maps {
    pub(crate) filter: Filter,
    pub(crate) settings: Table<u32, Settings>,
    pub(crate) interfaces: Table<u32, Interface>,
    pub(crate) pod_ranges: Table<RangePrefix, u32>,
    pub(crate) service_ranges: Table<RangePrefix, u32>,
    pub(crate) addresses: Table<Address, u32>,
    pub(crate) frontends: Table<FrontendKey, Frontend>,
    pub(crate) pools: Table<u32, Pool>,
    pub(crate) slots: Table<SlotKey, Endpoint>,
    pub(crate) members: Table<MemberKey, u32>,
    pub(crate) sources: Table<SourcePrefix, u32>,
    pub(crate) counters: PerCpu<u32, Counters>,
    pub(crate) watched: Table<u32, u32>,
    pub(crate) xdp_interfaces: Table<u32, XdpInterface>,
    pub(crate) exempt: Table<u64, u32>,
}

impl Maps {
    pub(crate) fn open(pins: &Path) -> Result<Self, EbpfError> {
        Ok(Maps {
            filter: Filter::open(pins)?,
            settings: Table::open(pins, "settings")?,
            interfaces: Table::open(pins, "interfaces")?,
            pod_ranges: Table::open(pins, "pod_ranges")?,
            service_ranges: Table::open(pins, "service_ranges")?,
            addresses: Table::open(pins, "addresses")?,
            frontends: Table::open(pins, "frontends")?,
            pools: Table::open(pins, "pools")?,
            slots: Table::open(pins, "slots")?,
            members: Table::open(pins, "members")?,
            sources: Table::open(pins, "sources")?,
            counters: PerCpu::open(pins, "counters")?,
            watched: Table::open(pins, "watched")?,
            xdp_interfaces: Table::open(pins, "xdp_interfaces")?,
            exempt: Table::open(pins, "exempt")?,
        })
    }

    /// What the maps that Services are written into have room for.
    pub(crate) fn room(&self) -> Amounts {
        Amounts {
            slots: self.slots.max_entries(),
            members: self.members.max_entries(),
            pools: self.pools.max_entries(),
            sources: self.sources.max_entries(),
            frontends: self.frontends.max_entries(),
            addresses: self.addresses.max_entries(),
        }
    }

    /// Writes, then removes. What was done before an error stays done.
    pub(crate) fn perform(&self, operations: &Operations) -> Result<(), EbpfError> {
        self.filter.add_addresses(operations.puts.iter().filter_map(Item::destination))?;
        self.put(&operations.puts)?;
        operations.deletes.iter().try_for_each(|key| self.delete(key))
    }

    /// Items in the order in which they may be published: those of one map follow each other.
    fn put(&self, items: &[Item]) -> Result<(), EbpfError> {
        let same_map = |a: &Item, b: &Item| std::mem::discriminant(a) == std::mem::discriminant(b);
        for items in items.chunk_by(same_map) {
            /// The elements of one kind, and the map that they belong into.
            macro_rules! put {
                ($kind:ident, $table:expr) => {{
                    let of_kind = items.iter().filter_map(|item| match item {
                        Item::$kind(key, value) => Some((*key, *value)),
                        _ => None,
                    });
                    let (keys, values): (Vec<_>, Vec<_>) = of_kind.unzip();
                    $table.put_all(&keys, &values)?;
                }};
            }
            match items.first() {
                Some(Item::Slot(..)) => put!(Slot, self.slots),
                Some(Item::Member(..)) => put!(Member, self.members),
                Some(Item::Pool(..)) => put!(Pool, self.pools),
                Some(Item::Source(..)) => {
                    for item in items {
                        // The kernel of 5.10 takes no ranges in bulk.
                        if let Item::Source(key, value) = item {
                            self.sources.put(key, value)?;
                        }
                    }
                }
                Some(Item::Frontend(..)) => put!(Frontend, self.frontends),
                Some(Item::Address(..)) => put!(Address, self.addresses),
                None => {}
            }
        }
        Ok(())
    }

    fn delete(&self, key: &Key) -> Result<(), EbpfError> {
        match key {
            Key::Slot(key) => self.slots.delete(key),
            Key::Member(key) => self.members.delete(key),
            Key::Pool(key) => self.pools.delete(key),
            Key::Source(key) => self.sources.delete(key),
            Key::Frontend(key) => self.frontends.delete(key),
            Key::Address(key) => self.addresses.delete(key),
        }
    }
}
