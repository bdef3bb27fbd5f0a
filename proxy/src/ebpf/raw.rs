//! A BPF map as bytes: carries elements from one map to another, which may be larger, or of another version.
//!
//! Layouts only grow at their end, and zero there means what was before. So an element of another version is cut off or
//! filled up with zeros. Where keys have another size nothing is carried.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use keelson_ebpf_abi::{Affinity, Flow};

use super::sys::{self, Cursor, MapInfo, Over};

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PERCPU_HASH: u32 = 5;
const PERCPU_ARRAY: u32 = 6;
const LRU_HASH: u32 = 9;
const LPM_TRIE: u32 = 11;

/// Elements per call.
const BATCH: usize = 4096;

/// A map of whatever type.
pub(crate) struct Raw {
    map: OwnedFd,
    info: MapInfo,
    /// Elements of maps per CPU have so many values.
    cpus: usize,
}

/// What is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// Everything, over whatever is there.
    All,
    /// What was used since that time, by the monotonic clock; in maps without times, everything.
    Since(u64),
    /// What was used since that time, and is not there or was used later than what is there; in maps without times,
    /// what is not there.
    MissingSince(u64),
}

/// Where in a map's values the time of their last use is.
fn time_in(map: &str) -> Option<usize> {
    match map {
        "flows_in" | "flows_out" => Some(offset_of!(Flow, last_seen_ns)),
        "affinity" => Some(offset_of!(Affinity, last_used_ns)),
        _ => None,
    }
}

fn time(value: &[u8], at: Option<usize>) -> Option<u64> {
    let bytes = value.get(at?..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

impl Raw {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let map = sys::open_pinned(path)?;
        let info = sys::map_info(map.as_fd())?;
        let cpus = match info.kind {
            PERCPU_HASH | PERCPU_ARRAY => aya::util::nr_cpus().map_err(|(_, error)| error)?,
            _ => 1,
        };
        Ok(Raw { map, info, cpus })
    }

    pub(crate) fn info(&self) -> &MapInfo {
        &self.info
    }

    pub(crate) fn descriptor(&self) -> &OwnedFd {
        &self.map
    }

    /// Bytes of one CPU's value, as they are read and written.
    fn stride(&self) -> usize {
        let size = self.info.value_size as usize;
        if self.cpus > 1 || matches!(self.info.kind, PERCPU_HASH | PERCPU_ARRAY) {
            size.next_multiple_of(8)
        } else {
            size
        }
    }

    fn key_len(&self) -> usize {
        self.info.key_size as usize
    }

    fn value_len(&self) -> usize {
        self.stride() * self.cpus
    }

    fn is_array(&self) -> bool {
        matches!(self.info.kind, ARRAY | PERCPU_ARRAY)
    }

    /// Whether it has elements that can be read and written.
    fn has_elements(&self) -> bool {
        matches!(self.info.kind, HASH | ARRAY | PERCPU_HASH | PERCPU_ARRAY | LRU_HASH | LPM_TRIE)
    }

    /// Writes bytes into the value of an element of an array; nothing when the layout has no such place.
    pub(crate) fn patch(&self, index: u32, at: usize, bytes: &[u8]) -> io::Result<()> {
        let (key, mut value) = (index.to_ne_bytes(), vec![0; self.value_len()]);
        let Some(place) = value.get_mut(at..at + bytes.len()) else { return Ok(()) };
        let length = place.len();
        if sys::get_bytes(self.map.as_fd(), &key, &mut value)? {
            value[at..at + length].copy_from_slice(bytes);
            self.put(&key, &value, Over::Anything)?;
        }
        Ok(())
    }

    /// Carries elements of the map of that name over from another one.
    pub(crate) fn carry(&self, name: &str, from: &Raw, what: What) -> io::Result<()> {
        if !self.has_elements() || !from.has_elements() || self.key_len() != from.key_len() {
            return Ok(());
        }
        let at = time_in(name);
        let mut value = vec![0; self.value_len()];
        from.each(|key, found| {
            if self.is_array() && is_beyond(key, self.info.max_entries) {
                return Ok(());
            }
            fit(found, from.stride(), &mut value, self.stride());
            let before = |since| time(&value, at).is_some_and(|time| time < since);
            match what {
                What::Since(since) | What::MissingSince(since) if before(since) => Ok(()),
                What::All | What::Since(_) => self.put(key, &value, Over::Anything).map(drop),
                What::MissingSince(_) => self.put_if_later(key, &value, at),
            }
        })
    }

    fn put_if_later(&self, key: &[u8], value: &[u8], at: Option<usize>) -> io::Result<()> {
        if self.put(key, value, Over::Nothing)? || at.is_none() {
            return Ok(());
        }
        let mut there = vec![0; self.value_len()];
        let found = sys::get_bytes(self.map.as_fd(), key, &mut there)?;
        if found && time(&there, at) >= time(value, at) {
            return Ok(());
        }
        self.put(key, value, Over::Anything).map(drop)
    }

    /// What does not fit into a full map is left out.
    fn put(&self, key: &[u8], value: &[u8], over: Over) -> io::Result<bool> {
        match sys::put_bytes(self.map.as_fd(), key, value, over) {
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => Ok(true),
            result => result,
        }
    }

    /// Calls for each element. What changes meanwhile may be met or not.
    fn each(&self, mut each: impl FnMut(&[u8], &[u8]) -> io::Result<()>) -> io::Result<()> {
        if !matches!(self.info.kind, HASH | PERCPU_HASH | LRU_HASH) {
            return self.each_by_key(each);
        }
        let (key, value) = (self.key_len(), self.value_len());
        let (mut keys, mut values) = (vec![0; key * BATCH], vec![0; value * BATCH]);
        let mut cursor = Cursor::default();
        loop {
            let map = self.map.as_fd();
            let count = sys::get_some_bytes(map, &mut cursor, &mut keys, &mut values, BATCH)?;
            if count == 0 && cursor.ended {
                return Ok(());
            }
            let elements = keys.chunks(key).zip(values.chunks(value));
            elements.take(count).try_for_each(|(key, value)| each(key, value))?;
        }
    }

    /// Nobody removes elements of such maps meanwhile.
    fn each_by_key(&self, mut each: impl FnMut(&[u8], &[u8]) -> io::Result<()>) -> io::Result<()> {
        let (mut key, mut value) = (vec![0; self.key_len()], vec![0; self.value_len()]);
        let mut last: Option<Vec<u8>> = None;
        while sys::next_key_bytes(self.map.as_fd(), last.as_deref(), &mut key)? {
            if sys::get_bytes(self.map.as_fd(), &key, &mut value)? {
                each(&key, &value)?;
            }
            last = Some(key.clone());
        }
        Ok(())
    }
}

fn is_beyond(index: &[u8], max_entries: u32) -> bool {
    index.first_chunk().is_none_or(|index| u32::from_ne_bytes(*index) >= max_entries)
}

/// One CPU's value after the other, cut off or filled up with zeros.
fn fit(from: &[u8], from_stride: usize, to: &mut [u8], to_stride: usize) {
    to.fill(0);
    for (from, to) in from.chunks(from_stride).zip(to.chunks_mut(to_stride)) {
        let length = from.len().min(to.len());
        to[..length].copy_from_slice(&from[..length]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_another_version_are_cut_off_or_filled_up() {
        let mut to = [9; 4];
        fit(&[1, 2, 3], 3, &mut to, 4);
        assert_eq!(to, [1, 2, 3, 0]);
        fit(&[1, 2, 3, 4, 5, 6], 6, &mut to, 4);
        assert_eq!(to, [1, 2, 3, 4]);
        let mut per_cpu = [9; 6];
        fit(&[1, 2, 3, 4], 2, &mut per_cpu, 3);
        assert_eq!(per_cpu, [1, 2, 0, 3, 4, 0]);
    }

    #[test]
    fn a_value_that_is_too_short_has_no_time() {
        assert_eq!(time(&7u64.to_ne_bytes(), Some(0)), Some(7));
        assert_eq!(time(&[0; 8], Some(1)), None);
        assert_eq!(time(&[0; 8], None), None);
    }

    #[test]
    fn elements_beyond_the_end_of_an_array_are_told() {
        assert!(!is_beyond(&9u32.to_ne_bytes(), 10));
        assert!(is_beyond(&10u32.to_ne_bytes(), 10));
        assert!(is_beyond(&[], 10));
    }
}
