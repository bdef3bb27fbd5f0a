//! nf_tables over netlink, without libnftables and without `nft`.
//!
//! A [`Batch`] collects what shall change; [`Nft::commit`] makes it one transaction: all of it takes
//! effect at one moment, or none. What the kernel has is read with [`Nft::tables`], [`Nft::chains`],
//! [`Nft::rules`], [`Nft::sets`] and [`Nft::elements`]; [`Monitor`] tells when others change it.
//!
//! ```no_run
//! use keelson_netlink::nft::*;
//! # fn main() -> Result<(), NftError> {
//! let table = Table::inet("example");
//! let mut batch = Batch::new();
//! batch.add_table(table);
//! let base = Base { kind: ChainKind::Nat, hook: Hook::Postrouting, priority: PRIORITY_SNAT };
//! batch.add_chain(table, "postrouting", Some(base));
//! // ip saddr 10.66.0.0/24 ip daddr != 10.66.0.0/24 masquerade fully-random
//! let pods = [10, 66, 0];
//! let rule = Rule::new()
//!     .only_ipv4()
//!     .payload(Header::Network, IPV4_SOURCE, 3, Register(0))
//!     .compare(Register(0), Compare::Equal, &pods)
//!     .payload(Header::Network, IPV4_DESTINATION, 3, Register(0))
//!     .compare(Register(0), Compare::NotEqual, &pods)
//!     .masquerade();
//! batch.add_rule(table, "postrouting", &rule);
//! Nft::open()?.commit(batch)
//! # }
//! ```

pub(crate) mod attribute;
pub(crate) mod batch;
pub(crate) mod dump;
mod error;
mod expression;
mod monitor;
mod set;

use std::io;
use std::os::fd::AsFd;

use netlink_sys::Socket;
use nix::sys::socket::{setsockopt, sockopt};

use attribute::{Reader, Writer, read_text};
use batch::{REQUEST, SUBSYSTEM, describe, element_at, finish_header, messages, push_header};
pub(crate) use expression::find_user_data;

pub use batch::{
    Base, Batch, ChainKind, Family, Hook, PRIORITY_DNAT, PRIORITY_RAW, PRIORITY_SNAT, Table,
};
pub use dump::{ChainFound, ElementFound, RuleFound, SetFound, TableFound};
pub use error::{NftError, Refused};
pub use expression::{
    CT_ESTABLISHED, CT_INVALID, CT_NEW, CT_RELATED, CT_STATUS_DNAT, Compare, Conntrack, Dynamic,
    FIB_LOCAL, FibAddress, Header, Meta, Nat, Original, Refusal, Register, Rule, Verdict,
};
pub use monitor::{Announcement, Monitor, Seen};
pub use set::{Element, Field, Set, Value, Values};

pub(crate) const NETLINK_NETFILTER: isize = 12;
const DUMP: u16 = 0x300;
const MESSAGE_ERROR: u16 = 2;
const MESSAGE_DONE: u16 = 3;
const DUMP_INTERRUPTED: u16 = 0x10;

/// Offset of the source address in an IPv4 header.
pub const IPV4_SOURCE: u32 = 12;
/// Offset of the destination address in an IPv4 header.
pub const IPV4_DESTINATION: u32 = 16;
/// Offset of the source address in an IPv6 header.
pub const IPV6_SOURCE: u32 = 8;
/// Offset of the destination address in an IPv6 header.
pub const IPV6_DESTINATION: u32 = 24;
/// Offset of the destination port in a TCP, UDP or SCTP header.
pub const DESTINATION_PORT: u32 = 2;

impl Rule {
    /// Goes on only with IPv4 packets: `meta nfproto ipv4`.
    #[must_use]
    pub fn only_ipv4(self) -> Self {
        self.meta(Meta::NetworkProtocol, Register(0)).compare(Register(0), Compare::Equal, &[2])
    }

    /// Goes on only with IPv6 packets: `meta nfproto ipv6`.
    #[must_use]
    pub fn only_ipv6(self) -> Self {
        self.meta(Meta::NetworkProtocol, Register(0)).compare(Register(0), Compare::Equal, &[10])
    }
}

/// A connection to the nf_tables of the network namespace in which it was opened.
pub struct Nft {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    port: u32,
}

impl Nft {
    /// Connects. Needs CAP_NET_ADMIN.
    pub fn open() -> Result<Self, NftError> {
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(NftError::Open)?;
        let port = socket.bind_auto().map_err(NftError::Open)?.port_number();
        // Both only make error reports better and are missing on old kernels.
        for unavailable in [socket.set_ext_ack(true), socket.set_cap_ack(true)] {
            if let Err(error) = unavailable {
                tracing::debug!(%error, "No extended netlink errors");
            }
        }
        Ok(Nft { socket, sequence: 1, buffer: Vec::with_capacity(64 * 1024), port })
    }

    /// The number under which [`Monitor`] sees this connection's changes.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Puts a transaction in force. An empty one does nothing.
    pub fn commit(&mut self, batch: Batch) -> Result<(), NftError> {
        if batch.is_empty() {
            return Ok(());
        }
        let (bytes, acknowledged) = batch.finish();
        self.make_room(bytes.len());
        self.discard_leftovers();
        self.socket.send_to(&bytes, &monitor::kernel(), 0).map_err(NftError::Send)?;
        self.collect_answers(&bytes, acknowledged)
    }

    /// The kernel works on a batch inside of sendmsg: all answers are queued when it returns.
    fn collect_answers(&mut self, sent: &[u8], acknowledged: u32) -> Result<(), NftError> {
        let mut refusal: Option<NftError> = None;
        let mut confirmed = false;
        loop {
            self.buffer.clear();
            match self.socket.recv_from(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // More refusals than the socket holds: the first ones are known already.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => continue,
                Err(error) => return Err(NftError::Receive(error)),
            }
            for (kind, sequence, message) in messages(&self.buffer) {
                if kind != MESSAGE_ERROR {
                    continue;
                }
                match errno_of(message) {
                    0 => confirmed |= sequence == acknowledged,
                    errno if refusal.is_none() => {
                        refusal = Some(refused(sent, sequence, errno, message));
                    }
                    _ => {}
                }
            }
        }
        match (refusal, confirmed) {
            (Some(refusal), _) => Err(refusal),
            (None, true) => Ok(()),
            (None, false) => Err(NftError::Malformed("the transaction was not acknowledged")),
        }
    }

    /// Asks for something and hands every answer (family, attributes) to `visit`.
    fn request(
        &mut self,
        kind: u16,
        dump: bool,
        family: u8,
        fill: impl FnOnce(&mut Writer<'_>),
        mut visit: impl FnMut(u8, &[u8]),
    ) -> Result<(), NftError> {
        self.discard_leftovers();
        self.sequence += 1;
        let mut request = Vec::with_capacity(128);
        let flags = REQUEST | if dump { DUMP } else { 0 };
        push_header(&mut request, SUBSYSTEM << 8 | kind, flags, self.sequence, family, 0);
        fill(&mut Writer::new(&mut request));
        finish_header(&mut request, 0);
        self.socket.send_to(&request, &monitor::kernel(), 0).map_err(NftError::Send)?;
        let mut interrupted = false;
        loop {
            self.buffer.clear();
            match self.socket.recv_from(&mut self.buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(NftError::Receive(error)),
            }
            for (kind, sequence, message) in messages(&self.buffer) {
                if sequence != self.sequence {
                    continue;
                }
                let flags = u16::from_ne_bytes([message[6], message[7]]);
                interrupted |= flags & DUMP_INTERRUPTED != 0;
                match kind {
                    MESSAGE_DONE if interrupted => return Err(NftError::Interrupted),
                    MESSAGE_DONE => return Ok(()),
                    MESSAGE_ERROR => return answer_error(&request, self.sequence, message),
                    _ if message.len() >= batch::HEADER_LEN => {
                        visit(message[16], &message[batch::HEADER_LEN..]);
                        if !dump {
                            return Ok(());
                        }
                    }
                    _ => return Err(NftError::Malformed("a short message")),
                }
            }
        }
    }

    /// Lets the socket take a message of that size, whatever the host's limits are.
    fn make_room(&self, bytes: usize) {
        const ORDINARY: usize = 128 * 1024;
        if bytes < ORDINARY {
            return;
        }
        if let Err(error) = setsockopt(&self.socket.as_fd(), sockopt::SndBufForce, &(2 * bytes)) {
            tracing::debug!(%error, bytes, "Cannot enlarge the netlink send buffer");
        }
    }

    fn discard_leftovers(&mut self) {
        loop {
            self.buffer.clear();
            match self.socket.recv_from(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }
}

fn errno_of(message: &[u8]) -> i32 {
    message.get(16..20).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes)
}

/// A dump that finds nothing to dump may end in an error with number 0.
fn answer_error(request: &[u8], sequence: u32, message: &[u8]) -> Result<(), NftError> {
    match -errno_of(message) {
        0 => Ok(()),
        libc::EINTR => Err(NftError::Interrupted),
        libc::EPERM => Err(NftError::Open(io::Error::from_raw_os_error(libc::EPERM))),
        // What netfilter answers for a subsystem that is not there.
        libc::EINVAL | libc::EOPNOTSUPP if is_kind(request, batch::GET_GENERATION) => {
            Err(NftError::Unsupported)
        }
        errno => {
            let action = describe_request(request, sequence);
            Err(NftError::Answer { action, source: io::Error::from_raw_os_error(errno) })
        }
    }
}

fn is_kind(request: &[u8], kind: u16) -> bool {
    messages(request).next().is_some_and(|(found, _, _)| found & 0xff == kind)
}

fn describe_request(request: &[u8], sequence: u32) -> String {
    let body = request.get(batch::HEADER_LEN..).unwrap_or(&[]);
    let kind = messages(request).find(|(_, found, _)| *found == sequence).map_or(0, |m| m.0 & 0xff);
    let names: Vec<&str> = Reader::new(body).map(|(_, value)| read_text(value)).collect();
    let what = match kind {
        batch::GET_TABLE => "tables",
        batch::GET_CHAIN => "chains",
        batch::GET_RULE => "rules",
        batch::GET_SET => "sets",
        batch::GET_ELEMENT => "elements",
        batch::GET_GENERATION => "the generation",
        _ => "objects",
    };
    format!("list {what} {}", names.join(" ")).trim_end().to_owned()
}

fn refused(sent: &[u8], sequence: u32, errno: i32, message: &[u8]) -> NftError {
    let errno = -errno;
    let first = messages(sent).next().map_or(0, |(_, sequence, _)| sequence);
    match errno {
        libc::ERESTART => return NftError::Raced,
        libc::EOPNOTSUPP | libc::EPROTONOSUPPORT if sequence == first => {
            return NftError::Unsupported;
        }
        _ => {}
    }
    let (remark, offset) = extended_acknowledgement(message);
    NftError::Refused(Box::new(Refused {
        action: describe(sent, sequence).unwrap_or_else(|| "change the ruleset".to_owned()),
        message: sequence,
        element: offset.and_then(|offset| element_at(sent, sequence, offset)),
        remark,
        source: io::Error::from_raw_os_error(errno),
    }))
}

/// The kernel's remark and the offset of the attribute that it complains about.
pub(crate) fn extended_acknowledgement(message: &[u8]) -> (Option<String>, Option<usize>) {
    const NLM_F_CAPPED: u16 = 0x100;
    const NLM_F_ACK_TLVS: u16 = 0x200;
    let flags = u16::from_ne_bytes([message[6], message[7]]);
    if flags & NLM_F_ACK_TLVS == 0 {
        return (None, None);
    }
    let copied = if flags & NLM_F_CAPPED != 0 {
        16
    } else {
        message.get(20..24).map_or(16, |length| {
            u32::from_ne_bytes([length[0], length[1], length[2], length[3]]) as usize
        })
    };
    let attributes = message.get(20 + copied..).unwrap_or(&[]);
    let remark = Reader::find(attributes, 1).map(|text| read_text(text).to_owned());
    let offset = Reader::find(attributes, 2).and_then(|value| value.try_into().ok());
    (remark, offset.map(|offset| u32::from_ne_bytes(offset) as usize))
}

#[cfg(test)]
mod tests;
