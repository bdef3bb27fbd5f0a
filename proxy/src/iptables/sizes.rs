//! How many rules the old interface's tables hold: read in a few microseconds, however many they are.
#![allow(
    unsafe_code,
    reason = "getsockopt(IPT_SO_GET_INFO) has no wrapper in the libraries at hand"
)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::names::Table;
use crate::model::Family;

/// Entries and bytes of each table.
pub(crate) type TableSizes = Vec<(u32, u32)>;

/// Reads the sizes of the tables in the network namespace it was opened in.
#[derive(Clone, Debug)]
pub(crate) struct Sizes {
    sockets: Vec<(Family, Arc<OwnedFd>)>,
}

/// The kernel's `struct ipt_getinfo`, and `ip6t_getinfo`.
#[repr(C)]
struct Info {
    name: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    num_entries: u32,
    size: u32,
}

impl Sizes {
    pub(crate) fn open(families: &[Family]) -> io::Result<Self> {
        let open = |family: &Family| {
            let domain = match family {
                Family::V4 => AddressFamily::Inet,
                Family::V6 => AddressFamily::Inet6,
            };
            let flags = SockFlag::SOCK_CLOEXEC;
            let opened = socket(domain, SockType::Raw, flags, nix::sys::socket::SockProtocol::Raw)?;
            Ok((*family, Arc::new(opened)))
        };
        Ok(Sizes { sockets: families.iter().map(open).collect::<io::Result<_>>()? })
    }

    pub(crate) fn read(&self) -> io::Result<TableSizes> {
        let mut sizes = Vec::new();
        for (family, socket) in &self.sockets {
            for table in Table::OURS {
                sizes.push(size(*family, socket, table)?);
            }
        }
        Ok(sizes)
    }
}

fn size(family: Family, socket: &OwnedFd, table: Table) -> io::Result<(u32, u32)> {
    // IPT_SO_GET_INFO and IP6T_SO_GET_INFO.
    const GET_INFO: libc::c_int = 64;
    let level = match family {
        Family::V4 => libc::SOL_IP,
        Family::V6 => libc::SOL_IPV6,
    };
    let mut info = Info {
        name: [0; 32],
        valid_hooks: 0,
        hook_entry: [0; 5],
        underflow: [0; 5],
        num_entries: 0,
        size: 0,
    };
    info.name[..table.name().len()].copy_from_slice(table.name().as_bytes());
    let mut length = libc::socklen_t::try_from(size_of::<Info>()).unwrap_or_default();
    // SAFETY: `info` is a valid, writable object of the length that is passed along, and any bytes that
    // the kernel writes into it make a valid value.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            GET_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok((info.num_entries, info.size)) } else { Err(io::Error::last_os_error()) }
}
