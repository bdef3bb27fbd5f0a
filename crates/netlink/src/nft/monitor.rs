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
        self.read_if(|kind, message| is_foreign(kind, message, table, own_port))
    }

    /// Reads all announcements that are there and asks `concerns` about each of them: for tables that
    /// are not ours alone, such as those that `iptables-nft` keeps.
    pub fn read_each(
        &mut self,
        mut concerns: impl FnMut(&Announcement<'_>) -> bool,
    ) -> Result<Seen, NftError> {
        self.read_if(|kind, message| {
            Announcement::parse(kind, message).is_some_and(|a| concerns(&a))
        })
    }

    fn read_if(&mut self, mut concerns: impl FnMut(u16, &[u8]) -> bool) -> Result<Seen, NftError> {
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
                seen.table_changed |= concerns(kind, message);
            }
        }
    }
}

/// What happened to a table, chain or rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement<'a> {
    /// False when it was added.
    pub removed: bool,
    /// Socket that did it; the first netlink socket of a process has the process's id.
    pub port: u32,
    /// Address family (`NFPROTO_*`) of the table.
    pub family: u8,
    /// Table.
    pub table: &'a str,
    /// Chain that came or went, or whose rules changed; nothing when it is the table itself.
    pub chain: Option<&'a str>,
}

impl<'a> Announcement<'a> {
    /// Nothing when it is about something else.
    pub(crate) fn parse(kind: u16, message: &'a [u8]) -> Option<Self> {
        const TABLE: u16 = 1;
        const RULE_CHAIN: u16 = 2;
        const CHAIN_NAME: u16 = 3;
        if kind >> 8 != SUBSYSTEM || message.len() < 20 {
            return None;
        }
        let attributes = &message[20..];
        // NFT_MSG_NEWTABLE and DELTABLE, NEWCHAIN and DELCHAIN, NEWRULE and DELRULE.
        let (removed, chain) = match kind & 0xff {
            0 => (false, None),
            2 => (true, None),
            3 => (false, Some(CHAIN_NAME)),
            5 => (true, Some(CHAIN_NAME)),
            6 => (false, Some(RULE_CHAIN)),
            8 => (true, Some(RULE_CHAIN)),
            _ => return None,
        };
        Some(Announcement {
            removed,
            port: u32::from_ne_bytes([message[12], message[13], message[14], message[15]]),
            family: message[16],
            table: Reader::find(attributes, TABLE).map(read_text)?,
            chain: chain.and_then(|at| Reader::find(attributes, at)).map(read_text),
        })
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
