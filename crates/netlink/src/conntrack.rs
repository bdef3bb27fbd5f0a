//! Tracked connections: list them one by one, delete single ones.

use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_sys::Socket;

use crate::nft::attribute::{Reader, Writer};
use crate::nft::batch::{ACK, HEADER_LEN, REQUEST, finish_header, messages, push_header};

const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;
const DUMP: u16 = 0x300;
const MESSAGE_ERROR: u16 = 2;
const MESSAGE_DONE: u16 = 3;
const DUMP_INTERRUPTED: u16 = 0x10;

const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const ID: u16 = 12;
const ZONE: u16 = 18;

/// An error of connection tracking.
#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    /// No netlink socket.
    #[error("cannot open a netfilter netlink socket (is CAP_NET_ADMIN missing?)")]
    Open(#[source] io::Error),
    /// The kernel could not be asked.
    #[error("cannot talk to connection tracking")]
    Exchange(#[source] io::Error),
    /// The kernel refused.
    #[error("connection tracking refused to {action}")]
    Refused {
        /// What was asked.
        action: &'static str,
        /// The error number.
        #[source]
        source: io::Error,
    },
}

/// A tracked connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Transport protocol number.
    pub protocol: u8,
    /// Who began it.
    pub source: SocketAddr,
    /// Where to, as the source knows it.
    pub destination: SocketAddr,
    /// Who answers: differs from `destination` when that was translated.
    pub answerer: SocketAddr,
    /// Whether anybody has answered.
    pub answered: bool,
    /// Family and the attributes that name this very entry.
    handle: (u8, Vec<u8>),
}

/// What a walk through the table found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selected {
    /// The connections that were wanted.
    pub flows: Vec<Flow>,
    /// False when the walk was cut short or lost answers: there may be more.
    pub whole: bool,
}

/// A connection to connection tracking of the network namespace in which it was opened.
pub struct Conntrack {
    socket: Socket,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Conntrack {
    /// Connects. Needs CAP_NET_ADMIN.
    pub fn open() -> Result<Self, ConntrackError> {
        let mut socket =
            Socket::new(crate::nft::NETLINK_NETFILTER).map_err(ConntrackError::Open)?;
        socket.bind_auto().map_err(ConntrackError::Open)?;
        Ok(Conntrack { socket, buffer: Vec::with_capacity(64 * 1024), sequence: 0 })
    }

    /// Hands the connections of an address family (`AF_UNSPEC`: of all of them) to `wanted`, one by one, and
    /// returns those it wants to keep in hand; the others are never in memory together. The table may change
    /// meanwhile: what comes or goes during the walk may be missed.
    ///
    /// A walk that the kernel cuts short is no error: what it found until then comes back.
    pub fn select(
        &mut self,
        family: u8,
        mut wanted: impl FnMut(&Flow) -> bool,
    ) -> Result<Selected, ConntrackError> {
        self.send(GET, REQUEST | DUMP, family, &[])?;
        let mut selected = Selected { flows: Vec::new(), whole: true };
        loop {
            match self.receive() {
                // Answers were lost, and their end may be among them.
                Err(ConntrackError::Exchange(error))
                    if error.raw_os_error() == Some(libc::ENOBUFS) =>
                {
                    selected.whole = false;
                    return Ok(selected);
                }
                received => received?,
            }
            if selected.take_in(&self.buffer, self.sequence, &mut wanted)? {
                return Ok(selected);
            }
        }
    }

    /// Deletes a connection; false when it was gone already.
    pub fn delete(&mut self, flow: &Flow) -> Result<bool, ConntrackError> {
        let (family, attributes) = &flow.handle;
        self.send(DELETE, REQUEST | ACK, *family, attributes)?;
        loop {
            self.receive()?;
            let answer = messages(&self.buffer)
                .find(|(kind, sequence, _)| *kind == MESSAGE_ERROR && *sequence == self.sequence);
            let Some((_, _, message)) = answer else { continue };
            return match refusal(message, "delete a connection") {
                Ok(()) => Ok(true),
                Err(ConntrackError::Refused { source, .. })
                    if source.raw_os_error() == Some(libc::ENOENT) =>
                {
                    Ok(false)
                }
                Err(error) => Err(error),
            };
        }
    }

    fn send(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        attributes: &[u8],
    ) -> Result<(), ConntrackError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = Vec::with_capacity(HEADER_LEN + attributes.len());
        push_header(&mut request, SUBSYSTEM << 8 | kind, flags, self.sequence, family, 0);
        request.extend_from_slice(attributes);
        finish_header(&mut request, 0);
        let kernel = netlink_sys::SocketAddr::new(0, 0);
        self.socket.send_to(&request, &kernel, 0).map_err(ConntrackError::Exchange)?;
        Ok(())
    }

    fn receive(&mut self) -> Result<(), ConntrackError> {
        loop {
            self.buffer.clear();
            match self.socket.recv_from(&mut self.buffer, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ConntrackError::Exchange(error)),
            }
        }
    }
}

impl Selected {
    /// Takes in one datagram of the answers to a walk; true when it was the last.
    fn take_in(
        &mut self,
        datagram: &[u8],
        ours: u32,
        wanted: &mut impl FnMut(&Flow) -> bool,
    ) -> Result<bool, ConntrackError> {
        for (kind, sequence, message) in messages(datagram) {
            if sequence != ours {
                continue;
            }
            let flags = u16::from_ne_bytes([message[6], message[7]]);
            self.whole &= flags & DUMP_INTERRUPTED == 0;
            match kind {
                // A walk that began may still end with an error.
                MESSAGE_DONE => {
                    self.whole &= errno_of(message) == 0;
                    return Ok(true);
                }
                MESSAGE_ERROR => match errno_of(message) {
                    libc::EINTR | libc::EAGAIN => {
                        self.whole = false;
                        return Ok(true);
                    }
                    _ => return refusal(message, "list connections").map(|()| true),
                },
                _ => self.flows.extend(read_flow(message).filter(|flow| wanted(flow))),
            }
        }
        Ok(false)
    }
}

/// 0 when all went well.
fn errno_of(message: &[u8]) -> i32 {
    let errno = message.get(16..20).and_then(|bytes| bytes.try_into().ok());
    errno.map_or(0, i32::from_ne_bytes).saturating_neg()
}

fn refusal(message: &[u8], action: &'static str) -> Result<(), ConntrackError> {
    match errno_of(message) {
        0 => Ok(()),
        errno => {
            let source = io::Error::from_raw_os_error(errno);
            Err(ConntrackError::Refused { action, source })
        }
    }
}

pub(crate) fn read_flow(message: &[u8]) -> Option<Flow> {
    let (family, body) = (*message.get(16)?, message.get(HEADER_LEN..)?);
    let original = Reader::find(body, TUPLE_ORIGINAL)?;
    let (protocol, source, destination) = read_tuple(original)?;
    let (_, answerer, _) = read_tuple(Reader::find(body, TUPLE_REPLY)?)?;
    /// `IPS_SEEN_REPLY`.
    const SEEN_REPLY: u32 = 1 << 1;
    let status = Reader::find(body, STATUS).and_then(|bytes| bytes.try_into().ok());
    let answered = status.is_some_and(|status| u32::from_be_bytes(status) & SEEN_REPLY != 0);
    let mut attributes = Vec::new();
    let mut writer = Writer::new(&mut attributes);
    writer.nest(TUPLE_ORIGINAL, |tuple| tuple.raw(original));
    for kind in [ID, ZONE] {
        if let Some(value) = Reader::find(body, kind) {
            writer.bytes(kind, value);
        }
    }
    let handle = (family, attributes);
    Some(Flow { protocol, source, destination, answerer, answered, handle })
}

fn read_tuple(tuple: &[u8]) -> Option<(u8, SocketAddr, SocketAddr)> {
    let (ip, ports) = (Reader::find(tuple, 1)?, Reader::find(tuple, 2)?);
    let address = |v4, v6| -> Option<IpAddr> {
        if let Some(bytes) = Reader::find(ip, v4) {
            return Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?));
        }
        Some(IpAddr::from(<[u8; 16]>::try_from(Reader::find(ip, v6)?).ok()?))
    };
    let port = |kind| {
        Reader::find(ports, kind)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u16::from_be_bytes)
    };
    let protocol = *Reader::find(ports, 1)?.first()?;
    let (source, destination) = (address(1, 3)?, address(2, 4)?);
    Some((protocol, SocketAddr::new(source, port(2)), SocketAddr::new(destination, port(3))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: u32 = 7;

    /// A connection from 10.0.0.1:`port` to 10.96.0.1:53, answered by 10.0.0.2:5353.
    fn entry(port: u16, flags: u16) -> Vec<u8> {
        let mut message = Vec::new();
        push_header(&mut message, SUBSYSTEM << 8, flags, OURS, 2, 0);
        let mut writer = Writer::new(&mut message);
        let mut tuple = |kind, source: [u8; 4], destination: [u8; 4], ports: [u16; 2]| {
            writer.nest(kind, |tuple| {
                tuple.nest(1, |ip| {
                    ip.bytes(1, &source);
                    ip.bytes(2, &destination);
                });
                tuple.nest(2, |transport| {
                    transport.bytes(1, &[17]);
                    transport.bytes(2, &ports[0].to_be_bytes());
                    transport.bytes(3, &ports[1].to_be_bytes());
                });
            });
        };
        tuple(TUPLE_ORIGINAL, [10, 0, 0, 1], [10, 96, 0, 1], [port, 53]);
        tuple(TUPLE_REPLY, [10, 0, 0, 2], [10, 0, 0, 1], [5353, port]);
        finish_header(&mut message, 0);
        message
    }

    fn end(kind: u16, errno: i32) -> Vec<u8> {
        let mut message = Vec::new();
        push_header(&mut message, kind, 0, OURS, 0, 0);
        message.truncate(16);
        message.extend_from_slice(&(-errno).to_ne_bytes());
        finish_header(&mut message, 0);
        message
    }

    fn walk(datagrams: &[Vec<u8>]) -> (Selected, bool) {
        let mut selected = Selected { flows: Vec::new(), whole: true };
        let ended = datagrams
            .iter()
            .any(|datagram| selected.take_in(datagram, OURS, &mut |_| true).unwrap());
        (selected, ended)
    }

    #[test]
    fn a_walk_that_is_cut_short_gives_what_it_found() {
        // Case 48 of the service proxy: a partial result is used, and known to be one.
        let (selected, ended) = walk(&[entry(1, 0), entry(2, 0), end(MESSAGE_DONE, 0)]);
        assert!(ended && selected.whole);
        assert_eq!(selected.flows.len(), 2);
        assert_eq!(selected.flows[0].answerer, "10.0.0.2:5353".parse().unwrap());
        let cut = [
            vec![entry(1, 0), end(MESSAGE_DONE, libc::EINTR)],
            vec![entry(1, DUMP_INTERRUPTED), end(MESSAGE_DONE, 0)],
            vec![entry(1, 0), end(MESSAGE_ERROR, libc::EINTR)],
        ];
        for datagrams in cut {
            let (selected, ended) = walk(&datagrams);
            assert!(ended && !selected.whole);
            assert_eq!(selected.flows.len(), 1);
        }
    }

    #[test]
    fn a_refusal_is_an_error_and_others_answers_do_not_count() {
        let mut selected = Selected { flows: Vec::new(), whole: true };
        let refused = end(MESSAGE_ERROR, libc::EPERM);
        assert!(selected.take_in(&refused, OURS, &mut |_| true).is_err());
        assert!(!selected.take_in(&refused, OURS + 1, &mut |_| true).unwrap());
        assert!(!selected.take_in(&entry(1, 0), OURS + 1, &mut |_| true).unwrap());
        assert_eq!(selected, Selected { flows: Vec::new(), whole: true });
    }
}
