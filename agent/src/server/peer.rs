//! The other end of a connection, for those that serve it after its upgrade.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use keelson_listener::{Full, Slot};
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tracing::debug;

/// How long input of a peer that hung up may wait for its reader.
const LINGER: Duration = Duration::from_secs(5);

/// Who is at the other end, and whether still. A clone keeps the connection's place in its server.
#[derive(Debug, Clone)]
pub struct Peer {
    pub address: IpAddr,
    /// Does not keep the socket open.
    socket: Weak<TcpStream>,
    slot: Option<Slot>,
}

impl Peer {
    /// The peer of a connection, and the connection to read and write.
    pub fn new(stream: TcpStream, address: IpAddr, slot: Slot) -> (Self, Socket) {
        let socket = Arc::new(stream);
        let peer = Self { address, socket: Arc::downgrade(&socket), slot: Some(slot) };
        (peer, Socket(socket))
    }

    /// A peer that is no connection, for what is served in memory.
    pub fn none() -> Self {
        Self { address: Ipv4Addr::LOCALHOST.into(), socket: Weak::new(), slot: None }
    }

    /// The caller is known: connections of unknown ones do not end this one any more.
    ///
    /// # Errors
    /// When the server has all the connections that it may have.
    pub fn establish(&self) -> Result<(), Full> {
        self.slot.as_ref().map_or(Ok(()), Slot::establish)
    }

    /// A person may stop reading for as long as they like (`kubectl logs | less`): the kernel is told not to take a
    /// closed window for a dead peer. One that vanished is still noticed, by keepalive and by retransmission.
    pub fn may_pause(&self) {
        if let Some(socket) = self.socket.upgrade()
            && let Err(error) = setsockopt(&socket, sockopt::TcpUserTimeout, &0)
        {
            debug!(%error, "Cannot set a socket option");
        }
    }

    /// Resolves some time after [`Peer::hung_up`]: what is not taken by then never will be.
    pub async fn gave_up(&self) {
        self.hung_up().await;
        tokio::time::sleep(LINGER).await;
    }

    /// Resolves when the peer will send nothing more, also while what it sent before is not read.
    pub async fn hung_up(&self) {
        if let Some(socket) = self.socket.upgrade() {
            // Priority data is not asked for, so this is the end of reading and nothing else.
            drop(socket.ready(Interest::PRIORITY).await);
        } else {
            std::future::pending().await
        }
    }
}

/// A TCP connection whose state its [`Peer`] shows.
#[derive(Debug)]
pub struct Socket(Arc<TcpStream>);

impl Drop for Socket {
    /// Whoever waits for the peer's hang-up must not keep the connection open.
    fn drop(&mut self) {
        // An error says that the other side was first.
        shutdown(self.0.as_raw_fd(), Shutdown::Both).ok();
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(context))?;
            match self.0.try_read(buffer.initialize_unfilled()) {
                Ok(read) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(context))?;
            match self.0.try_write(data) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(context))?;
            match self.0.try_write_vectored(data) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = shutdown(self.0.as_raw_fd(), Shutdown::Write);
        Poll::Ready(ended.map_err(io::Error::from))
    }
}
