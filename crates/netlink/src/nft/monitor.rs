//! Notices when somebody changes a table.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use netlink_sys::{Socket, SocketAddr};

use super::attribute::{Reader, read_text};
use super::batch::{NEW_GENERATION, SUBSYSTEM, Table, messages};
use super::error::NftError;

const GROUP_NFTABLES: u32 = 7;

/// Listens to the kernel's announcements of ruleset changes in the namespace it was opened in.
pub struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

/// What [`Monitor::read`] saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Another process changed something in the watched table (or announcements were lost).
    pub table_changed: bool,
    /// Something, anywhere in the ruleset, changed.
    pub anything: bool,
}

impl Monitor {
    /// Starts to listen; reads do not block.
    pub fn open() -> Result<Self, NftError> {
        let mut socket = Socket::new(super::NETLINK_NETFILTER).map_err(NftError::Open)?;
        socket.bind_auto().map_err(NftError::Open)?;
        socket.set_non_blocking(true).map_err(NftError::Open)?;
        let monitor = Monitor { socket, buffer: Vec::with_capacity(64 * 1024) };
        monitor.resume()?;
        Ok(monitor)
    }

    /// Stops to listen, so that a big transaction of our own does not have to be announced to us.
    pub fn pause(&self) -> Result<(), NftError> {
        self.socket.drop_membership(GROUP_NFTABLES).map_err(NftError::Open)
    }

    /// Listens again. What happened meanwhile is not told: compare the generation.
    pub fn resume(&self) -> Result<(), NftError> {
        self.socket.add_membership(GROUP_NFTABLES).map_err(NftError::Open)
    }

    /// Reads all announcements that are there. Those of the socket `own_port` are left out.
    pub fn read(&mut self, table: Table<'_>, own_port: u32) -> Result<Seen, NftError> {
        let mut seen = Seen::default();
        loop {
            self.buffer.clear();
            match self.socket.recv_from(&mut self.buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(seen),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    seen = Seen { table_changed: true, anything: true };
                    continue;
                }
                Err(error) => return Err(NftError::Receive(error)),
            }
            for (kind, _, message) in messages(&self.buffer) {
                seen.anything = true;
                seen.table_changed |= is_foreign(kind, message, table, own_port);
            }
        }
    }
}

fn is_foreign(kind: u16, message: &[u8], table: Table<'_>, own_port: u32) -> bool {
    if kind >> 8 != SUBSYSTEM || kind & 0xff == NEW_GENERATION || message.len() < 20 {
        return false;
    }
    let port = u32::from_ne_bytes([message[12], message[13], message[14], message[15]]);
    port != own_port
        && message[16] == table.family as u8
        && Reader::find(&message[20..], 1).map(read_text) == Some(table.name)
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A socket address of the kernel.
pub(crate) fn kernel() -> SocketAddr {
    SocketAddr::new(0, 0)
}
