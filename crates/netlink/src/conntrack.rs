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

const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
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
    /// Family and the attributes that name this very entry.
    handle: (u8, Vec<u8>),
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

    /// Hands the connections of a protocol to `visit`, one by one, and returns those it wants to keep
    /// in hand. The table may change meanwhile: what comes or goes during the walk may be missed.
    pub fn select(
        &mut self,
        protocol: u8,
        mut wanted: impl FnMut(&Flow) -> bool,
    ) -> Result<Vec<Flow>, ConntrackError> {
        self.send(GET, REQUEST | DUMP, 0, &[])?;
        let mut selected = Vec::new();
        loop {
            self.receive()?;
            for (kind, sequence, message) in messages(&self.buffer) {
                match kind {
                    _ if sequence != self.sequence => {}
                    MESSAGE_DONE => return Ok(selected),
                    MESSAGE_ERROR => {
                        refusal(message, "list connections")?;
                        return Ok(selected);
                    }
                    _ => selected.extend(
                        read_flow(message).filter(|flow| flow.protocol == protocol && wanted(flow)),
                    ),
                }
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

fn refusal(message: &[u8], action: &'static str) -> Result<(), ConntrackError> {
    let errno = message.get(16..20).and_then(|bytes| bytes.try_into().ok());
    match errno.map_or(0, i32::from_ne_bytes) {
        0 => Ok(()),
        errno => {
            let source = io::Error::from_raw_os_error(-errno);
            Err(ConntrackError::Refused { action, source })
        }
    }
}

fn read_flow(message: &[u8]) -> Option<Flow> {
    let (family, body) = (*message.get(16)?, message.get(HEADER_LEN..)?);
    let original = Reader::find(body, TUPLE_ORIGINAL)?;
    let (protocol, source, destination) = read_tuple(original)?;
    let (_, answerer, _) = read_tuple(Reader::find(body, TUPLE_REPLY)?)?;
    let mut attributes = Vec::new();
    let mut writer = Writer::new(&mut attributes);
    writer.nest(TUPLE_ORIGINAL, |tuple| tuple.raw(original));
    for kind in [ID, ZONE] {
        if let Some(value) = Reader::find(body, kind) {
            writer.bytes(kind, value);
        }
    }
    Some(Flow { protocol, source, destination, answerer, handle: (family, attributes) })
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
