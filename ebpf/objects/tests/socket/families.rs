//! The three ways to name an address.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Only ends a test that would wait for ever.
const PATIENCE_MS: u16 = 20_000;

/// What the client's sockets are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
    /// An IPv6 socket that speaks IPv4.
    Mapped,
}

pub(crate) const ALL: [Family; 3] = [Family::V4, Family::V6, Family::Mapped];

impl Family {
    /// Of a Service; no route leads there.
    pub(crate) fn vip(self, port: u16) -> SocketAddr {
        self.pick("10.96.0.10", "fd00:96::10", port)
    }

    pub(crate) fn other_vip(self, port: u16) -> SocketAddr {
        self.pick("10.96.0.11", "fd00:96::11", port)
    }

    /// Addresses of the same namespace that stand for pods, counted from 1.
    pub(crate) fn endpoint(self, number: u8, port: u16) -> SocketAddr {
        self.pick(&format!("10.66.0.{number}"), &format!("fd00:66::{number}"), port)
    }

    pub(crate) fn loopback(self, port: u16) -> SocketAddr {
        self.pick("127.0.0.1", "::1", port)
    }

    pub(crate) fn any(self, port: u16) -> SocketAddr {
        self.pick("0.0.0.0", "::", port)
    }

    fn pick(self, v4: &str, v6: &str, port: u16) -> SocketAddr {
        let address: IpAddr = if self == Family::V6 { v6 } else { v4 }.parse().unwrap();
        SocketAddr::new(address, port)
    }

    /// As the client's program writes it.
    pub(crate) fn written(self, at: SocketAddr) -> SocketAddr {
        match (self, at.ip()) {
            (Family::Mapped, IpAddr::V4(v4)) => {
                SocketAddr::new(v4.to_ipv6_mapped().into(), at.port())
            }
            _ => at,
        }
    }

    pub(crate) fn connect(self, to: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect(self.written(to))
    }

    pub(crate) fn udp(self) -> UdpSocket {
        let any = if self == Family::V4 { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(PATIENCE_MS.into()))).unwrap();
        socket
    }
}

/// Servers that say who they are.
pub(crate) struct Servers {
    tcp: Vec<TcpListener>,
    udp: Vec<UdpSocket>,
    addresses: Vec<SocketAddr>,
}

impl Servers {
    /// In the calling thread's namespace.
    pub(crate) fn start(addresses: &[SocketAddr]) -> Self {
        let udp = addresses.iter().map(|at| UdpSocket::bind(at).unwrap()).collect();
        let tcp = addresses.iter().map(|at| TcpListener::bind(at).unwrap()).collect();
        Servers { tcp, udp, addresses: addresses.to_vec() }
    }

    /// Which of them took a connection that was just made.
    pub(crate) fn accepted(&self) -> usize {
        let position = self.ready(&self.tcp);
        self.tcp[position].accept().unwrap();
        position
    }

    /// Answers the one datagram that was just sent, with its own content; who did.
    pub(crate) fn answered(&self) -> usize {
        let (position, from) = self.received();
        self.udp[position].send_to(b"answer", from).unwrap();
        position
    }

    /// Who got the one datagram that was just sent, and from whom.
    pub(crate) fn received(&self) -> (usize, SocketAddr) {
        let position = self.ready(&self.udp);
        (position, self.udp[position].recv_from(&mut [0; 64]).unwrap().1)
    }

    /// The kernel may deliver a little later, even here.
    fn ready(&self, servers: &[impl AsFd]) -> usize {
        let wait = |server| PollFd::new(server, PollFlags::POLLIN);
        let mut waiting: Vec<_> = servers.iter().map(|server| wait(server.as_fd())).collect();
        poll(&mut waiting, PollTimeout::from(PATIENCE_MS)).unwrap();
        let first = waiting.iter().position(|server| server.any() == Some(true));
        first.unwrap_or_else(|| panic!("nothing came to {:?}", self.addresses))
    }

    pub(crate) fn send(&self, position: usize, to: SocketAddr) {
        self.udp[position].send_to(b"answer", to).unwrap();
    }
}

/// The sender of the next datagram, as the program sees it.
pub(crate) fn sender(socket: &UdpSocket) -> SocketAddr {
    socket.recv_from(&mut [0; 64]).unwrap().1
}
