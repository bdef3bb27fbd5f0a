//! Accepting connections, whatever happens.

use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};

use crate::pool::{Limits, Pool, Slot};

/// The wait after an error that will not pass at once, such as no free file descriptor.
const PAUSE: Duration = Duration::from_millis(100);
/// No more than one warning in this time.
const WARNING_EVERY: Duration = Duration::from_secs(60);
/// A peer that vanished is noticed after a minute: the first question comes after 15 s, as in Go's servers.
const KEEPALIVE: Duration = Duration::from_secs(15);
const UNANSWERED: Duration = Duration::from_secs(60);

/// An accepted connection.
#[derive(Debug)]
pub struct Connection {
    pub stream: TcpStream,
    pub peer: SocketAddr,
    pub slot: Slot,
}

/// A listening socket with limits.
#[derive(Debug)]
pub struct Listener {
    name: &'static str,
    socket: TcpListener,
    pool: Pool,
    warned: Mutex<Warned>,
}

#[derive(Debug, Default)]
struct Warned {
    last: Option<Instant>,
    since: u64,
}

impl Listener {
    /// `name` is the server's name in the log.
    #[must_use]
    pub fn new(name: &'static str, socket: TcpListener, limits: Limits) -> Self {
        Self { name, socket, pool: Pool::new(limits), warned: Mutex::default() }
    }

    /// The address that the socket is bound to.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The next connection. An error is logged and the next attempt follows: a server must not end, or stay deaf for
    /// seconds, because descriptors were short for a moment.
    pub async fn accept(&self) -> Connection {
        loop {
            match self.socket.accept().await {
                Ok((stream, peer)) => {
                    if let Err(error) = prepare(&stream) {
                        tracing::debug!(server = self.name, %error, "Cannot set socket options");
                    }
                    let (slot, gone) = self.pool.admit(peer.ip());
                    if gone > 0 {
                        self.warn("Too many connections without a request: the oldest were closed");
                    }
                    return Connection { stream, peer, slot };
                }
                // The caller is gone already: there is nothing to wait for.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    self.warn(&format!("Cannot accept a connection: {error}"));
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// An attacker must not fill the log.
    fn warn(&self, message: &str) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        warned.since = warned.since.saturating_add(1);
        if warned.last.is_some_and(|last| last.elapsed() < WARNING_EVERY) {
            return;
        }
        let times = std::mem::take(&mut warned.since);
        warned.last = Some(Instant::now());
        drop(warned);
        tracing::warn!(server = self.name, times, "{message}");
    }
}

/// From now on a peer that is there but does not read, as `kubectl logs | less`, keeps its connection. For callers that
/// are known: until then, such a peer is ended after a minute.
pub fn allow_slow_reader(stream: &TcpStream) {
    if let Err(error) = SockRef::from(stream).set_tcp_user_timeout(None) {
        tracing::debug!(%error, "Cannot set a socket option");
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    // Small answers must not wait for more.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))?;
    socket.set_tcp_user_timeout(Some(UNANSWERED))
}
