//! A blocking netlink socket for any protocol family.
//!
//! Every answer is matched to its request by sequence number, so a stray or late message can never be taken for
//! another's answer. Errors carry the kernel's own words (extended acknowledgement) where it has some.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use netlink_sys::SocketAddr;
use netlink_sys::protocols::{
    NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_SOCK_DIAG,
};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::message::{Attrs, HEADER_LEN, Message, Replies, Reply, text, u32_at};

/// `NLM_F_REQUEST`.
pub const NLM_F_REQUEST: u16 = 0x1;
/// `NLM_F_ACK`.
pub const NLM_F_ACK: u16 = 0x4;
/// `NLM_F_DUMP`.
pub const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// How often an interrupted dump (`NLM_F_DUMP_INTR`: the table changed meanwhile) is begun anew.
const DUMP_ATTEMPTS: usize = 16;
/// The kernel fills at most 32 KiB per dump datagram; the rest is room for large single answers.
const BUFFER_LEN: usize = 128 * 1024;
/// What one batch may hold before its answers are read: their total must fit the default receive buffer.
const PIPELINE: usize = 64;
/// The kernel answers at once; a longer silence means that the request was lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// The netlink protocol that a socket speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes, neighbours.
    Route,
    /// nftables, conntrack, queues.
    Netfilter,
    /// Kernel parts that are found by name, such as IPVS.
    Generic,
    /// Other sockets.
    SockDiag,
}

/// What can go wrong between us and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket itself failed.
    #[error("cannot {step} a netlink socket")]
    Socket {
        /// What was being done.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a request.
    #[error("{}{}", .errno.desc(), .explanation.as_deref().map(|t| format!(" ({t})")).unwrap_or_default())]
    Refused {
        /// Which request of a batch, counted from 0.
        index: usize,
        /// The kernel's own words, where it has some.
        explanation: Option<String>,
        /// The errno.
        errno: Errno,
    },
    /// A dump changed under us again and again.
    #[error("the table kept changing while it was read")]
    Interrupted,
    /// Messages were lost because we read too slowly (`ENOBUFS`): what we know may be stale.
    #[error("netlink messages were lost, read the tables again")]
    Overrun,
    /// Bytes that make no sense.
    #[error("malformed netlink answer: {0}")]
    Malformed(&'static str),
}

impl NetlinkError {
    /// The kernel's errno if it refused the request.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether the thing exists already.
    #[must_use]
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EEXIST)
    }

    /// Whether the thing is not there (links say ENODEV, routes ESRCH, addresses EADDRNOTAVAIL, tables ENOENT).
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(
            self.errno(),
            Some(
                Errno::ENODEV | Errno::ESRCH | Errno::EADDRNOTAVAIL | Errno::ENOENT | Errno::ENXIO
            )
        )
    }
}

/// A netlink socket of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Socket {
    inner: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace; it keeps that namespace for life.
    ///
    /// # Errors
    /// When the kernel lacks the protocol or a socket cannot be made.
    pub fn open(protocol: Protocol) -> Result<Self, NetlinkError> {
        let number = match protocol {
            Protocol::Route => NETLINK_ROUTE,
            Protocol::Netfilter => NETLINK_NETFILTER,
            Protocol::Generic => NETLINK_GENERIC,
            Protocol::SockDiag => NETLINK_SOCK_DIAG,
        };
        let fail = |step| move |source| NetlinkError::Socket { step, source };
        let mut inner = netlink_sys::Socket::new(number).map_err(fail("open"))?;
        inner.bind_auto().map_err(fail("bind"))?;
        // Both only improve error texts and sizes: a kernel without them still works.
        drop(inner.set_ext_ack(true));
        drop(inner.set_cap_ack(true));
        let mut socket = Self { inner, sequence: 0, buffer: vec![0; BUFFER_LEN] };
        socket.set_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(socket)
    }

    /// Makes the kernel obey the filters of dump requests (`NETLINK_GET_STRICT_CHK`) and check headers strictly.
    ///
    /// # Errors
    /// When the kernel is older than 4.20.
    pub fn set_strict(&mut self) -> Result<(), NetlinkError> {
        let fail = |source| NetlinkError::Socket { step: "set strict checks on", source };
        self.inner.set_netlink_get_strict_chk(true).map_err(fail)
    }

    /// Limits how long a receive waits; `None` waits for ever.
    ///
    /// # Errors
    /// When the socket refuses the option.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<(), NetlinkError> {
        let timeout = timeout.unwrap_or_default();
        let micros = i64::from(timeout.subsec_micros());
        let seconds = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX);
        setsockopt(&self.inner, sockopt::ReceiveTimeout, &TimeVal::new(seconds, micros))
            .map_err(|e| NetlinkError::Socket { step: "set the timeout of", source: e.into() })
    }

    /// Asks for kernel-side buffers of this many bytes, beyond the system's limit where we may.
    pub fn set_buffers(&mut self, receive: usize, send: usize) {
        // The plain option is capped by net.core.*mem_max but always allowed; a small buffer is caught as an overrun.
        if setsockopt(&self.inner, sockopt::RcvBufForce, &receive).is_err() {
            let _capped = setsockopt(&self.inner, sockopt::RcvBuf, &receive);
        }
        if setsockopt(&self.inner, sockopt::SndBufForce, &send).is_err() {
            let _capped = setsockopt(&self.inner, sockopt::SndBuf, &send);
        }
    }

    /// Subscribes to a multicast group (`RTNLGRP_*`, `NFNLGRP_*`).
    ///
    /// # Errors
    /// When the group does not exist or may not be joined.
    pub fn join(&mut self, group: u32) -> Result<(), NetlinkError> {
        let fail = |source| NetlinkError::Socket { step: "join a group on", source };
        self.inner.add_membership(group).map_err(fail)
    }

    /// A sequence number that no earlier request of this socket used.
    pub fn next_sequence(&mut self) -> u32 {
        // 0 marks notifications.
        self.sequence = self.sequence.checked_add(1).unwrap_or(1);
        self.sequence
    }

    /// Sends bytes that are complete netlink messages.
    ///
    /// # Errors
    /// `EMSGSIZE` when they exceed the send buffer: see [`Self::set_buffers`].
    pub fn send_bytes(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        loop {
            match self.inner.send_to(bytes, &SocketAddr::new(0, 0), 0) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(NetlinkError::Socket { step: "send to", source }),
                Ok(_) => return Ok(()),
            }
        }
    }

    /// The next datagram, which holds one or more messages: walk it with [`Replies`].
    ///
    /// # Errors
    /// [`NetlinkError::Overrun`] when messages were lost; a timeout shows as a socket error of kind `WouldBlock`.
    pub fn receive_bytes(&mut self) -> Result<&[u8], NetlinkError> {
        self.receive_with(0)
    }

    /// As [`Socket::receive_bytes`], but where nothing is there the kind is `WouldBlock` at once.
    pub(crate) fn receive_waiting_bytes(&mut self) -> Result<&[u8], NetlinkError> {
        self.receive_with(libc::MSG_DONTWAIT)
    }

    fn receive_with(&mut self, flags: i32) -> Result<&[u8], NetlinkError> {
        let length = loop {
            match self.inner.recv(&mut &mut self.buffer[..], libc::MSG_TRUNC | flags) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Err(NetlinkError::Overrun);
                }
                Err(source) => return Err(NetlinkError::Socket { step: "receive from", source }),
                Ok(length) => break length,
            }
        };
        self.buffer.get(..length).ok_or(NetlinkError::Malformed("longer than the receive buffer"))
    }

    /// Sends one request and waits for its acknowledgement.
    ///
    /// # Errors
    /// The kernel's refusal, or a failing socket.
    pub fn request(&mut self, message: Message) -> Result<(), NetlinkError> {
        self.request_all(vec![message])
    }

    /// Sends requests back to back and waits for all acknowledgements.
    ///
    /// # Errors
    /// The first refusal in the order of the requests; those behind it may have been carried out all the same.
    pub fn request_all(&mut self, messages: Vec<Message>) -> Result<(), NetlinkError> {
        let mut messages = messages.into_iter().peekable();
        let mut done = 0;
        let mut first_refusal = None;
        while messages.peek().is_some() {
            let first = self.sequence.wrapping_add(1);
            let mut bytes = Vec::new();
            let mut count: u32 = 0;
            for message in messages.by_ref().take(PIPELINE) {
                bytes.extend(message.finish(self.next_sequence(), NLM_F_REQUEST | NLM_F_ACK));
                count += 1;
            }
            self.send_bytes(&bytes)?;
            self.acknowledgements(first, count, done, &mut first_refusal)?;
            done += count as usize;
        }
        first_refusal.map_or(Ok(()), Err)
    }

    fn acknowledgements(
        &mut self,
        first: u32,
        count: u32,
        done: usize,
        first_refusal: &mut Option<NetlinkError>,
    ) -> Result<(), NetlinkError> {
        let mut left = count;
        while left > 0 {
            for reply in Replies::new(self.receive_bytes()?) {
                let position = reply.sequence.wrapping_sub(first);
                if reply.kind != NLMSG_ERROR || position >= count {
                    continue;
                }
                left -= 1;
                if let Some(error) = refusal(&reply, done + position as usize)? {
                    first_refusal.get_or_insert(error);
                }
            }
        }
        Ok(())
    }

    /// Sends one request that is answered by one message (a GET without a dump).
    ///
    /// # Errors
    /// The kernel's refusal, or a failing socket.
    pub fn ask(&mut self, message: Message) -> Result<Reply<'static>, NetlinkError> {
        let sequence = self.next_sequence();
        self.send_bytes(&message.finish(sequence, NLM_F_REQUEST))?;
        loop {
            for reply in Replies::new(self.receive_bytes()?) {
                if reply.sequence != sequence {
                    continue;
                }
                if reply.kind != NLMSG_ERROR {
                    return Ok(reply.into_owned());
                }
                if let Some(error) = refusal(&reply, 0)? {
                    return Err(error);
                }
            }
        }
    }

    /// Reads a whole table; begins anew when the kernel says that it changed meanwhile.
    ///
    /// # Errors
    /// The kernel's refusal, [`NetlinkError::Interrupted`] when it never stood still, or a failing socket.
    pub fn dump(&mut self, message: &Message) -> Result<Vec<Reply<'static>>, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(replies) = self.dump_once(message.clone())? {
                return Ok(replies);
            }
        }
        Err(NetlinkError::Interrupted)
    }

    /// `None` when the table changed while it was read.
    fn dump_once(&mut self, message: Message) -> Result<Option<Vec<Reply<'static>>>, NetlinkError> {
        let sequence = self.next_sequence();
        self.send_bytes(&message.finish(sequence, NLM_F_REQUEST | NLM_F_DUMP))?;
        let mut replies = Vec::new();
        let mut interrupted = false;
        loop {
            for reply in Replies::new(self.receive_bytes()?) {
                if reply.sequence != sequence {
                    continue;
                }
                interrupted |= reply.flags & NLM_F_DUMP_INTR != 0;
                match reply.kind {
                    NLMSG_DONE => return dump_end(&reply, replies, interrupted),
                    NLMSG_ERROR => {
                        if let Some(error) = refusal(&reply, 0)? {
                            return Err(error);
                        }
                    }
                    NLMSG_OVERRUN => return Err(NetlinkError::Overrun),
                    _ => replies.push(reply.into_owned()),
                }
            }
        }
    }
}

/// A dump can fail after it began: then its last message carries the errno.
fn dump_end(
    done: &Reply<'_>,
    replies: Vec<Reply<'static>>,
    interrupted: bool,
) -> Result<Option<Vec<Reply<'static>>>, NetlinkError> {
    match errno_of(done) {
        Some(errno) => Err(NetlinkError::Refused {
            index: 0,
            explanation: None,
            errno: Errno::from_raw(errno),
        }),
        None => Ok((!interrupted).then_some(replies)),
    }
}

fn errno_of(reply: &Reply<'_>) -> Option<i32> {
    let code = u32_at(&reply.payload, 0)?.cast_signed();
    (code != 0).then(|| code.saturating_neg())
}

/// Reads an acknowledgement: `None` is success.
///
/// # Errors
/// When the message is too short to be one.
pub fn refusal(reply: &Reply<'_>, index: usize) -> Result<Option<NetlinkError>, NetlinkError> {
    if reply.payload.len() < 4 + HEADER_LEN {
        return Err(NetlinkError::Malformed("short acknowledgement"));
    }
    let Some(errno) = errno_of(reply) else { return Ok(None) };
    let explanation = (reply.flags & NLM_F_ACK_TLVS != 0).then(|| explanation(reply)).flatten();
    Ok(Some(NetlinkError::Refused { index, explanation, errno: Errno::from_raw(errno) }))
}

/// The text behind the (capped or whole) copy of the request.
fn explanation(reply: &Reply<'_>) -> Option<String> {
    let copied = if reply.flags & NLM_F_CAPPED != 0 {
        HEADER_LEN
    } else {
        usize::try_from(u32_at(&reply.payload, 4)?).ok()?.next_multiple_of(4)
    };
    Attrs::new(reply.payload.get(4 + copied..)?).find(NLMSGERR_ATTR_MSG).map(text)
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}
