//! A BPF map whose elements have a value for each CPU, read as the sum of them.

use std::collections::HashMap;
use std::hash::Hash;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use keelson_ebpf_abi::Counters;

use super::Table;
use crate::ebpf::error::EbpfError;
use crate::ebpf::sys;

/// What CPUs count apart. A multiple of 8 bytes, as the kernel hands it out.
pub(crate) trait Sum: aya::Pod + Default {
    fn add(&mut self, other: &Self);
}

impl Sum for u64 {
    fn add(&mut self, other: &Self) {
        *self = self.wrapping_add(*other);
    }
}

impl Sum for Counters {
    fn add(&mut self, other: &Self) {
        self.connections.add(&other.connections);
        self.packets.add(&other.packets);
        self.bytes.add(&other.bytes);
        self.refused.add(&other.refused);
    }
}

pub(crate) struct PerCpu<K, V> {
    table: Table<K, V>,
    cpus: usize,
}

impl<K, V> PerCpu<K, V>
where
    K: aya::Pod + Default + Eq + Hash,
    V: Sum,
{
    const WHOLE_WORDS: () = assert!(size_of::<V>().is_multiple_of(8));

    /// Opens the map of that name in the folder of pins.
    pub(crate) fn open(pins: &Path, name: &'static str) -> Result<Self, EbpfError> {
        let () = Self::WHOLE_WORDS;
        let table = Table::open(pins, name)?;
        Ok(PerCpu { table, cpus: sys::cpus()? as usize })
    }

    /// The sum; that of nothing where there is no such element.
    pub(crate) fn get(&self, key: &K) -> Result<V, EbpfError> {
        let mut values = vec![V::default(); self.cpus];
        sys::get_each(self.table.map.as_fd(), key, &mut values).map_err(|e| self.table.fail(e))?;
        Ok(sum(&values))
    }

    /// All sums of a hash map. What changes meanwhile may be there or not.
    pub(crate) fn read(&self) -> Result<HashMap<K, V>, EbpfError> {
        self.read_in_bulk().map_err(|e| self.table.fail(e))
    }

    fn read_in_bulk(&self) -> io::Result<HashMap<K, V>> {
        let mut found = HashMap::new();
        self.table.each(self.cpus, |key, values| _ = found.insert(key, sum(values)))?;
        Ok(found)
    }

    /// An element that is gone already counts as removed.
    pub(crate) fn delete(&self, key: &K) -> Result<(), EbpfError> {
        self.table.delete(key)
    }
}

fn sum<V: Sum>(values: &[V]) -> V {
    let mut sum = V::default();
    values.iter().for_each(|value| sum.add(value));
    sum
}
