//! Elements of maps, one by one and in bulk.

use std::io;
use std::os::fd::BorrowedFd;

use super::{address, bpf, number};

const MAP_LOOKUP_ELEM: i64 = 1;
const MAP_UPDATE_ELEM: i64 = 2;
const MAP_DELETE_ELEM: i64 = 3;
const MAP_GET_NEXT_KEY: i64 = 4;
const MAP_LOOKUP_BATCH: i64 = 24;
const MAP_UPDATE_BATCH: i64 = 26;

/// `BPF_NOEXIST`.
const NOEXIST: u64 = 1;
/// `BPF_EXIST`.
const EXIST: u64 = 2;

#[repr(C)]
struct ElementAttr {
    map: u32,
    pad: u32,
    key: u64,
    /// The value, or the next key.
    value: u64,
    flags: u64,
}

impl ElementAttr {
    fn new<K, V>(map: BorrowedFd<'_>, key: *const K, value: *const V) -> Self {
        let (key, value) = (address(key), address(value));
        ElementAttr { map: number(map), pad: 0, key, value, flags: 0 }
    }
}

/// Adds or replaces an element. The types must be the map's: see [`super::table::Table`].
pub(crate) fn put<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &V,
) -> io::Result<()> {
    let mut attr = ElementAttr::new(map, key, value);
    // SAFETY: the layout of BPF_MAP_UPDATE_ELEM; the caller has compared the types' sizes with the map's.
    unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// What an element may be put over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Over {
    Anything = 0,
    Nothing = NOEXIST,
}

/// Adds or replaces an element of a map that is known by its sizes only; false when there is one already that it may
/// not be put over.
pub(crate) fn put_bytes(
    map: BorrowedFd<'_>,
    key: &[u8],
    value: &[u8],
    over: Over,
) -> io::Result<bool> {
    let flags = over as u64;
    let mut attr = ElementAttr { flags, ..ElementAttr::new(map, key.as_ptr(), value.as_ptr()) };
    // SAFETY: as above; the caller gives slices of the map's sizes.
    match unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) } {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        result => result.map(|_| true),
    }
}

/// Reads an element of a map that is known by its sizes only; false when there is none.
pub(crate) fn get_bytes(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = ElementAttr::new(map, key.as_ptr(), value.as_mut_ptr());
    // SAFETY: as above, for BPF_MAP_LOOKUP_ELEM, which writes one value.
    some(unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) }).map(|found| found.is_some())
}

/// As [`next_key`], of a map that is known by its sizes only; false at the end.
pub(crate) fn next_key_bytes(
    map: BorrowedFd<'_>,
    key: Option<&[u8]>,
    next: &mut [u8],
) -> io::Result<bool> {
    let key = key.map_or(std::ptr::null(), <[u8]>::as_ptr);
    let mut attr = ElementAttr::new(map, key, next.as_mut_ptr());
    // SAFETY: as above, for BPF_MAP_GET_NEXT_KEY, which writes one key.
    some(unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) }).map(|found| found.is_some())
}

/// Changes an element; false when there is none.
pub(crate) fn replace<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &V,
) -> io::Result<bool> {
    let mut attr = ElementAttr { flags: EXIST, ..ElementAttr::new(map, key, value) };
    // SAFETY: as above.
    some(unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }).map(|found| found.is_some())
}

/// Removes an element; false when there is none.
pub(crate) fn delete<K: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = ElementAttr::new(map, key, std::ptr::null::<u8>());
    // SAFETY: as above, for BPF_MAP_DELETE_ELEM.
    some(unsafe { bpf(MAP_DELETE_ELEM, &mut attr) }).map(|found| found.is_some())
}

/// Reads an element.
pub(crate) fn get<K: aya::Pod, V: aya::Pod + Default>(
    map: BorrowedFd<'_>,
    key: &K,
) -> io::Result<Option<V>> {
    let mut value = V::default();
    let mut attr = ElementAttr::new(map, key, std::ptr::from_mut(&mut value));
    // SAFETY: as above, for BPF_MAP_LOOKUP_ELEM, which writes one value.
    Ok(some(unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) })?.map(|_| value))
}

/// The key after `key`, or the first one.
pub(crate) fn next_key<K: aya::Pod + Default>(
    map: BorrowedFd<'_>,
    key: Option<&K>,
) -> io::Result<Option<K>> {
    let mut next = K::default();
    let key = key.map_or(std::ptr::null(), std::ptr::from_ref);
    let mut attr = ElementAttr::new(map, key, std::ptr::from_mut(&mut next));
    // SAFETY: as above, for BPF_MAP_GET_NEXT_KEY, which writes one key.
    Ok(some(unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) })?.map(|_| next))
}

/// Reads an element that has a value for each CPU; false when there is none. There must be room for all of them.
pub(crate) fn get_each<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    values: &mut [V],
) -> io::Result<bool> {
    let mut attr = ElementAttr::new(map, key, values.as_mut_ptr());
    // SAFETY: as above; the kernel writes one value, rounded up to 8 bytes, for each CPU that can be.
    Ok(some(unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) })?.is_some())
}

fn some(result: io::Result<i64>) -> io::Result<Option<i64>> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        result => result.map(Some),
    }
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

/// Adds or replaces elements. Those before one that is refused stay.
pub(crate) fn put_all<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> io::Result<()> {
    let count = keys.len().min(values.len());
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: address(keys.as_ptr()),
        values: address(values.as_ptr()),
        count: u32::try_from(count).unwrap_or(u32::MAX),
        map: number(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the layout of BPF_MAP_UPDATE_BATCH; both slices have `count` elements of the map's sizes.
    unsafe { bpf(MAP_UPDATE_BATCH, &mut attr) }.map(drop)
}

/// Where a reading in bulk has come to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    /// Of a hash map: the bucket that is read next.
    pub(crate) position: u32,
    begun: bool,
    pub(crate) ended: bool,
}

/// Reads the next elements of a hash map into the slices, and says how many; 0 at the end. There must be as many
/// values for each key as the map has: one, or one for each CPU.
pub(crate) fn get_some<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<usize> {
    let room = keys.len();
    let (keys, values) = (address(keys.as_mut_ptr()), address(values.as_mut_ptr()));
    // SAFETY: both slices have room for so many elements of the map's sizes: the caller has compared them.
    unsafe { lookup_batch(map, cursor, keys, values, room) }
}

/// As [`get_some`], of a map that is known by its sizes only. The slices have room for so many.
pub(crate) fn get_some_bytes(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut [u8],
    values: &mut [u8],
    room: usize,
) -> io::Result<usize> {
    let (keys, values) = (address(keys.as_mut_ptr()), address(values.as_mut_ptr()));
    // SAFETY: the caller gives slices with room for so many elements of the map's sizes.
    unsafe { lookup_batch(map, cursor, keys, values, room) }
}

/// # Safety
/// At both addresses there must be room for so many elements of the map's sizes.
unsafe fn lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: u64,
    values: u64,
    room: usize,
) -> io::Result<usize> {
    if cursor.ended {
        return Ok(0);
    }
    let from = cursor.position;
    let mut attr = BatchAttr {
        in_batch: if cursor.begun { address(&raw const from) } else { 0 },
        out_batch: address(&raw mut cursor.position),
        keys,
        values,
        count: u32::try_from(room).unwrap_or(u32::MAX),
        map: number(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the layout of BPF_MAP_LOOKUP_BATCH; the kernel writes at most `count` elements of the map's sizes.
    let result = unsafe { bpf(MAP_LOOKUP_BATCH, &mut attr) };
    cursor.begun = true;
    // The last part comes with ENOENT.
    cursor.ended = some(result)?.is_none();
    Ok((attr.count as usize).min(room))
}
