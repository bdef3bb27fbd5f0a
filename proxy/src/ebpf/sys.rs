//! The calls of bpf(2) that aya lacks: pins, links that outlive the process, and maps read and written in bulk.
#![expect(unsafe_code, reason = "bpf(2)")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::error::EbpfError;

const MAP_CREATE: i64 = 0;
const MAP_LOOKUP_ELEM: i64 = 1;
const MAP_UPDATE_ELEM: i64 = 2;
const MAP_DELETE_ELEM: i64 = 3;
const MAP_GET_NEXT_KEY: i64 = 4;
const PROG_LOAD: i64 = 5;
const OBJ_PIN: i64 = 6;
const OBJ_GET: i64 = 7;
const OBJ_GET_INFO_BY_FD: i64 = 15;
const MAP_LOOKUP_BATCH: i64 = 24;
const MAP_UPDATE_BATCH: i64 = 26;
const LINK_CREATE: i64 = 28;
const LINK_UPDATE: i64 = 29;
const LINK_DETACH: i64 = 34;

/// `BPF_NOEXIST`.
const NOEXIST: u64 = 1;
/// `BPF_EXIST`.
const EXIST: u64 = 2;

/// What a program is attached as (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub(crate) enum AttachType {
    Connect4 = 10,
    Connect6 = 11,
    SendMsg4 = 14,
    SendMsg6 = 15,
    RecvMsg4 = 19,
    RecvMsg6 = 20,
    GetPeerName4 = 29,
    GetPeerName6 = 30,
    SockRelease = 34,
    TcxIngress = 46,
    TcxEgress = 47,
    Xdp = 37,
}

/// Calls bpf(2) with one of the layouts of `union bpf_attr`.
///
/// # Safety
/// `attr` must be the layout of `command`, and each pointer in it must be good for what the command does with it.
unsafe fn bpf<T>(command: i64, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the kernel reads, and for some commands writes, at most the given size at that address.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), std::mem::size_of::<T>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address<T: ?Sized>(of: *const T) -> u64 {
    of.cast::<u8>().addr() as u64
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    // A borrowed descriptor is never negative.
    fd.as_raw_fd().unsigned_abs()
}

/// An event as a program wrote it.
pub(crate) fn read_event(bytes: &[u8]) -> Option<keelson_ebpf_abi::Event> {
    if bytes.len() < size_of::<keelson_ebpf_abi::Event>() {
        return None;
    }
    // SAFETY: long enough, and plain data that any bytes are a value of.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Gives an object a name in a BPF file system, so that it outlives the process.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: address(path.as_ptr()), fd: number(object), flags: 0 };
    // SAFETY: the layout of BPF_OBJ_PIN; the path ends with a zero and lives through the call.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens a pinned object.
pub(crate) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: address(path.as_ptr()), fd: 0, flags: 0 };
    // SAFETY: as above, for BPF_OBJ_GET.
    owned(unsafe { bpf(OBJ_GET, &mut attr) }?)
}

#[repr(C)]
struct LinkCreateAttr {
    program: u32,
    /// A cgroup's descriptor, or an interface index.
    target: u32,
    attach_type: u32,
    flags: u32,
    rest: [u64; 4],
}

/// Attaches a program to a cgroup (by descriptor) or an interface (by index, in the calling thread's network namespace).
pub(crate) fn create_link(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    create_link_with(program, target, attach_type, 0)
}

/// Attaches a program to an interface at XDP, in the mode that the flags (`XDP_FLAGS_*`) say.
pub(crate) fn create_xdp_link(
    program: BorrowedFd<'_>,
    interface: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    create_link_with(program, interface, AttachType::Xdp, flags)
}

fn create_link_with(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: AttachType,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program: number(program),
        target,
        attach_type: attach_type as u32,
        flags,
        rest: [0; 4],
    };
    // SAFETY: the layout of BPF_LINK_CREATE without pointers.
    owned(unsafe { bpf(LINK_CREATE, &mut attr) }?)
}

/// Why a link of no program is refused: what the kernel does not know at all, it refuses otherwise.
pub(crate) fn refusal_of_link(attach_type: AttachType) -> io::Error {
    let program = u32::MAX;
    let attach_type = attach_type as u32;
    let mut attr = LinkCreateAttr { program, target: 0, attach_type, flags: 0, rest: [0; 4] };
    // SAFETY: as above.
    let result = unsafe { bpf(LINK_CREATE, &mut attr) };
    result.err().unwrap_or_else(|| io::ErrorKind::AlreadyExists.into())
}

/// Whether the kernel makes ring buffers, or refuses for another reason than not knowing them.
pub(crate) fn knows_ring_buffers() -> bool {
    const RING_BUFFER: u32 = 27;
    const SIZE: u32 = 65_536;
    // Kind, sizes of key and value, number of elements, flags.
    let mut attr = [RING_BUFFER, 0, 0, SIZE, 0, 0];
    // SAFETY: the beginning of the layout of BPF_MAP_CREATE.
    let result = unsafe { bpf(MAP_CREATE, &mut attr) };
    known(result.and_then(owned).map(drop))
}

#[repr(C)]
struct ProgramLoadAttr {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    /// Log, kernel version, flags, name, interface.
    rest: [u32; 11],
    attach_type: u32,
}

/// A kind of programs, and what they are attached as where that must be said.
#[derive(Clone, Copy)]
pub(crate) struct ProgramKind(u32, u32);

pub(crate) const CLASSIFIER: ProgramKind = ProgramKind(3, 0);
pub(crate) const ON_CONNECT: ProgramKind = ProgramKind(18, AttachType::Connect4 as u32);

/// Whether such programs may call that function, with four zeros.
pub(crate) fn knows_helper(ProgramKind(kind, attach_type): ProgramKind, number: u32) -> bool {
    const SET: u64 = 0xb7;
    const CALL: u64 = 0x85;
    const EXIT: u64 = 0x95;
    // The register is in the second byte, the number in the last four.
    let set = |register: u64, number: u64| SET | register << 8 | number << 32;
    let call = CALL | u64::from(number) << 32;
    let instructions = [set(1, 0), set(2, 0), set(3, 0), set(4, 0), call, set(0, 1), EXIT];
    let mut attr = ProgramLoadAttr {
        kind,
        count: 7,
        instructions: address(instructions.as_ptr()),
        license: address(c"GPL".as_ptr()),
        rest: [0; 11],
        attach_type,
    };
    // SAFETY: the beginning of the layout of BPF_PROG_LOAD; instructions and license live through the call.
    let result = unsafe { bpf(PROG_LOAD, &mut attr) };
    known(result.and_then(owned).map(drop))
}

fn known(result: io::Result<()>) -> bool {
    result.err().is_none_or(|error| error.raw_os_error() != Some(libc::EINVAL))
}

#[repr(C)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Puts another program in the place of a link's, between two packets.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (link, program) = (number(link), number(program));
    let mut attr = LinkUpdateAttr { link, program, flags: 0, old_program: 0 };
    // SAFETY: the layout of BPF_LINK_UPDATE without pointers.
    unsafe { bpf(LINK_UPDATE, &mut attr) }.map(drop)
}

/// Takes a link's program away at once; without this it goes some time after the last descriptor and pin.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut link = number(link);
    // SAFETY: the layout of BPF_LINK_DETACH is one descriptor.
    unsafe { bpf(LINK_DETACH, &mut link) }.map(drop)
}

/// What the kernel says of a link. The target is 0 when what it was attached to is gone.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    kind: u32,
    pub(crate) id: u32,
    pub(crate) program: u32,
    pad: u32,
    /// Interface index, or a cgroup's number.
    target: [u32; 2],
    rest: [u64; 5],
}

impl LinkInfo {
    const CGROUP: u32 = 3;

    /// Interface index, or a cgroup's number (that of its folder).
    fn target(&self) -> u64 {
        let [low, high] = self.target.map(u64::from);
        if self.kind == Self::CGROUP { high << 32 | low } else { low }
    }

    /// Whether it is still attached to something.
    pub(crate) fn is_attached(&self) -> bool {
        self.target() != 0
    }

    pub(crate) fn is_attached_to(&self, target: u64) -> bool {
        self.target() == target
    }
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    size: u32,
    info: u64,
}

/// Fills in what the kernel says of an object.
///
/// # Safety
/// `T` must be the beginning of the layout for that kind of object, and pointers in it good for the lengths beside them.
unsafe fn info<T>(object: BorrowedFd<'_>, mut found: T) -> io::Result<T> {
    let size = u32::try_from(std::mem::size_of::<T>()).map_err(io::Error::other)?;
    let info = address(std::ptr::from_mut(&mut found));
    let mut attr = InfoAttr { fd: number(object), size, info };
    // SAFETY: the layout of BPF_OBJ_GET_INFO_BY_FD; the kernel writes at most `size` bytes of plain data there.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(found)
}

pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    // SAFETY: the layout for links; it has no pointers that the kernel would follow unless a length beside them is given.
    unsafe { info(link, LinkInfo::default()) }
}

/// The beginning of what the kernel says of a program.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
}

/// The number of a program.
pub(crate) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: the layout for programs, all lengths 0.
    unsafe { info(program, ProgramInfo::default()) }.map(|info| info.id)
}

/// The beginning of what the kernel says of a map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MapInfo {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
}

pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    // SAFETY: the layout for maps, without pointers.
    unsafe { info(map, MapInfo::default()) }
}

/// CPUs that there may be: so many values has an element of a map per CPU.
pub(crate) fn cpus() -> Result<u32, EbpfError> {
    let cpus = aya::util::nr_cpus();
    let cpus = cpus.map_err(|(path, source)| EbpfError::Read { path: path.into(), source })?;
    Ok(u32::try_from(cpus).unwrap_or(u32::MAX))
}

/// Gives memory that is free back to the kernel: the allocator would keep what was needed for a moment.
pub(crate) fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: a call without pointers.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Waits until no program runs any more that ran when this was called.
pub(crate) fn wait_for_programs() {
    const GLOBAL: i64 = 1;
    // SAFETY: a call without pointers. Where the kernel cannot do it nothing is waited for, and programs are quick.
    unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
}

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
