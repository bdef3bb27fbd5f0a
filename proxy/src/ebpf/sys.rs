//! The calls of bpf(2) that aya lacks: pins, links that outlive the process, and maps read and written in bulk.
#![expect(unsafe_code, reason = "bpf(2)")]

mod elements;
mod features;
mod links;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::error::EbpfError;
pub(crate) use elements::*;
pub(crate) use features::*;
pub(crate) use links::*;

const OBJ_PIN: i64 = 6;
const OBJ_GET: i64 = 7;
const OBJ_GET_INFO_BY_FD: i64 = 15;

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
