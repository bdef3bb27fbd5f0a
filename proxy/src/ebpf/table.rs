//! A BPF map with the types of its keys and values.

mod per_cpu;

use std::collections::HashMap;
use std::hash::Hash;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::error::EbpfError;
use super::sys;
pub(crate) use per_cpu::PerCpu;

/// Elements per call: some hundred kilobytes.
const BATCH: usize = 4096;

/// A map of the kernel.
pub(crate) struct Table<K, V> {
    name: &'static str,
    map: OwnedFd,
    max_entries: u32,
    types: PhantomData<(K, V)>,
}

impl<K, V> Table<K, V>
where
    K: aya::Pod + Default + Eq + Hash,
    V: aya::Pod + Default,
{
    /// Opens the map of that name in the folder of pins.
    pub(crate) fn open(pins: &Path, name: &'static str) -> Result<Self, EbpfError> {
        Self::open_at(pins.join(name), name)
    }

    /// The same, wherever it is pinned.
    pub(crate) fn open_at(path: PathBuf, name: &'static str) -> Result<Self, EbpfError> {
        let fail = |source| EbpfError::Pin { path: path.clone(), source };
        let map = sys::open_pinned(&path).map_err(fail)?;
        let info = sys::map_info(map.as_fd()).map_err(fail)?;
        let sizes = (info.key_size as usize, info.value_size as usize);
        if sizes != (size_of::<K>(), size_of::<V>()) {
            let other = io::Error::other("its keys or values have another size");
            return Err(EbpfError::Pin { path, source: other });
        }
        Ok(Table { name, map, max_entries: info.max_entries, types: PhantomData })
    }

    fn fail(&self, source: io::Error) -> EbpfError {
        let Table { name, max_entries, .. } = *self;
        match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => EbpfError::Full { name, max_entries },
            _ => EbpfError::Map { name, source },
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// What it has room for.
    pub(crate) fn max_entries(&self) -> u32 {
        self.max_entries
    }

    pub(crate) fn put(&self, key: &K, value: &V) -> Result<(), EbpfError> {
        sys::put(self.map.as_fd(), key, value).map_err(|e| self.fail(e))
    }

    pub(crate) fn get(&self, key: &K) -> Result<Option<V>, EbpfError> {
        sys::get(self.map.as_fd(), key).map_err(|e| self.fail(e))
    }

    /// Changes an element, unless it is gone.
    pub(crate) fn replace(&self, key: &K, value: &V) -> Result<(), EbpfError> {
        sys::replace(self.map.as_fd(), key, value).map(drop).map_err(|e| self.fail(e))
    }

    /// An element that is gone already counts as removed.
    pub(crate) fn delete(&self, key: &K) -> Result<(), EbpfError> {
        sys::delete(self.map.as_fd(), key).map(drop).map_err(|e| self.fail(e))
    }

    /// Adds or replaces many.
    pub(crate) fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), EbpfError> {
        if let ([key], [value]) = (keys, values) {
            return self.put(key, value);
        }
        for (keys, values) in keys.chunks(BATCH).zip(values.chunks(BATCH)) {
            sys::put_all(self.map.as_fd(), keys, values).map_err(|e| self.fail(e))?;
        }
        Ok(())
    }

    /// Everything in it. What changes meanwhile may be there or not.
    pub(crate) fn read(&self) -> Result<HashMap<K, V>, EbpfError> {
        match self.read_in_bulk() {
            // Not every kind of map can be read like that.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | 524)) => {
                self.read_one_by_one()
            }
            read => read,
        }
        .map_err(|e| self.fail(e))
    }

    /// About so many elements of a hash map, from where the last reading ended.
    pub(crate) fn read_on(
        &self,
        cursor: &mut sys::Cursor,
        room: usize,
    ) -> Result<Vec<(K, V)>, EbpfError> {
        const PART: usize = 1024;
        let (mut keys, mut values) = (vec![K::default(); PART], vec![V::default(); PART]);
        let mut found = Vec::new();
        while found.len() < room && !cursor.ended {
            let count = sys::get_some(self.map.as_fd(), cursor, &mut keys, &mut values);
            let count = count.map_err(|e| self.fail(e))?;
            found.extend(keys.iter().copied().zip(values.iter().copied()).take(count));
        }
        Ok(found)
    }

    fn read_in_bulk(&self) -> io::Result<HashMap<K, V>> {
        let mut found = HashMap::new();
        self.each(1, |key, values| found.extend(values.first().map(|value| (key, *value))))?;
        Ok(found)
    }

    /// Calls for each element of a hash map, which has so many values: one, or one for each CPU.
    fn each(&self, values_of_each: usize, mut each: impl FnMut(K, &[V])) -> io::Result<()> {
        let mut keys = vec![K::default(); BATCH];
        let mut values = vec![V::default(); BATCH * values_of_each];
        let mut cursor = sys::Cursor::default();
        while !cursor.ended {
            let count = sys::get_some(self.map.as_fd(), &mut cursor, &mut keys, &mut values)?;
            let elements = keys.iter().zip(values.chunks(values_of_each));
            elements.take(count).for_each(|(key, values)| each(*key, values));
        }
        Ok(())
    }

    fn read_one_by_one(&self) -> io::Result<HashMap<K, V>> {
        let mut found = HashMap::new();
        let mut last: Option<K> = None;
        while let Some(key) = sys::next_key(self.map.as_fd(), last.as_ref())? {
            if let Some(value) = sys::get(self.map.as_fd(), &key)? {
                found.insert(key, value);
            }
            last = Some(key);
        }
        Ok(found)
    }
}
