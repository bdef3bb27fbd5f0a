//! UDP sockets of a network namespace: list those that are connected, end single ones.

use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;

use crate::message::{Message, Reply, u32_at};
use crate::netns::Netns;
use crate::route::OpenError;
use crate::socket::{NetlinkError, Protocol, Socket};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const UDP: u8 = 17;
/// A bit for each state; a connected UDP socket is called established.
const ESTABLISHED: u32 = 1 << 1;

/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const ID_LEN: usize = 48;

/// A connected UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpSocket {
    /// Its own address.
    pub local: SocketAddr,
    /// Whom it is connected to. Of an IPv6 socket that speaks IPv4 both are IPv4-mapped.
    pub remote: SocketAddr,
    /// What `SO_COOKIE` and BPF programs know it by. No other socket ever has it.
    pub cookie: u64,
    family: u8,
    id: [u8; ID_LEN],
}

/// Sees the sockets of the network namespace in which it was opened.
#[derive(Debug)]
pub struct SockDiag {
    socket: Socket,
}

impl SockDiag {
    /// In the calling thread's namespace.
    ///
    /// # Errors
    /// When the kernel has no such sockets.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self { socket: Socket::open(Protocol::SockDiag)? })
    }

    /// In `netns`; the calling thread stays where it is.
    ///
    /// # Errors
    /// When the namespace cannot be entered or no socket can be made.
    pub fn open_in(netns: &Netns) -> Result<Self, OpenError> {
        Ok(netns.run(Self::open)??)
    }

    /// All connected UDP sockets.
    ///
    /// # Errors
    /// The kernel's refusal, or a failing socket.
    pub fn connected_udp(&mut self) -> Result<Vec<UdpSocket>, NetlinkError> {
        let mut sockets = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let replies = self.socket.dump(&request(SOCK_DIAG_BY_FAMILY, family, &[0; ID_LEN]))?;
            sockets.extend(replies.iter().filter_map(UdpSocket::parse));
        }
        Ok(sockets)
    }

    /// Ends a socket, for which CAP_NET_ADMIN is needed: whoever waits on it gets ECONNABORTED. False when it was gone already.
    ///
    /// # Errors
    /// `EOPNOTSUPP` from a kernel without `CONFIG_INET_DIAG_DESTROY`, any other refusal, or a failing socket.
    pub fn end(&mut self, socket: &UdpSocket) -> Result<bool, NetlinkError> {
        match self.socket.request(request(SOCK_DESTROY, socket.family, &socket.id)) {
            Ok(()) => Ok(true),
            // ESTALE: the ports are another socket's by now.
            Err(error) if matches!(error.errno(), Some(Errno::ENOENT | Errno::ESTALE)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// `struct inet_diag_req_v2`.
fn request(kind: u16, family: u8, id: &[u8; ID_LEN]) -> Message {
    let mut header = vec![family, UDP, 0, 0];
    header.extend_from_slice(&ESTABLISHED.to_ne_bytes());
    header.extend_from_slice(id);
    Message::new(kind, 0, &header)
}

impl UdpSocket {
    /// From `struct inet_diag_msg`.
    pub(crate) fn parse(reply: &Reply<'_>) -> Option<Self> {
        let family = *reply.payload.first()?;
        let id = <[u8; ID_LEN]>::try_from(reply.payload.get(4..4 + ID_LEN)?).ok()?;
        let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
        let cookie = |at: usize| Some(u64::from(u32_at(&id, at)?));
        Some(Self {
            local: SocketAddr::new(address(family, &id[4..20])?, port(0)),
            remote: SocketAddr::new(address(family, &id[20..36])?, port(2)),
            cookie: cookie(44)? << 32 | cookie(40)?,
            family,
            id,
        })
    }
}

fn address(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        AF_INET => Some(<[u8; 4]>::try_from(bytes.get(..4)?).ok()?.into()),
        AF_INET6 => Some(<[u8; 16]>::try_from(bytes).ok()?.into()),
        _ => None,
    }
}
