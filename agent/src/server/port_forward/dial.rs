//! Connections to the loopback of a pod.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, oneshot};

const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How many threads are in pods' namespaces at a time, in the whole process; each is for some microseconds.
static THREADS: Semaphore = Semaphore::const_new(8);

/// The first family's error says more about what is wrong.
const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// A socket for each of [`LOOPBACKS`]; a kernel may lack one of the families.
type Sockets = [io::Result<OwnedFd>; 2];

/// Connects to a port on the loopback of a network namespace (`None`: the agent's own).
///
/// # Errors
/// Why nothing is reached there, in words for the client.
pub(super) async fn dial(network: Option<PathBuf>, port: u16) -> Result<TcpStream, String> {
    let sockets = match network {
        None => LOOPBACKS.map(unconnected),
        Some(path) => sockets_in(path).await?,
    };
    let mut failure = String::new();
    for (ip, socket) in LOOPBACKS.into_iter().zip(sockets) {
        let error = match connect(socket, SocketAddr::new(ip, port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        if failure.is_empty() {
            failure = format!("failed to connect to {ip}:{port} inside the pod: {error}");
        }
    }
    Err(failure)
}

async fn connect(socket: io::Result<OwnedFd>, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket?));
    tokio::time::timeout(DIAL_TIMEOUT, socket.connect(to))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Sockets of another namespace. A socket stays in the namespace that it was made in, so a short-lived thread goes
/// there and makes them; the runtime's own threads never do, and the connecting is done outside.
async fn sockets_in(network: PathBuf) -> Result<Sockets, String> {
    let _permit = THREADS.acquire().await.map_err(|error| error.to_string())?;
    let (send, receive) = oneshot::channel();
    let thread = std::thread::Builder::new().name("port-forward".to_owned());
    let spawned = thread.spawn(move || drop(send.send(enter_and_make(&network))));
    spawned.map_err(|error| format!("cannot start a thread: {error}"))?;
    receive.await.map_err(|_| "the thread in the pod's namespace ended early".to_owned())?
}

fn enter_and_make(network: &Path) -> Result<Sockets, String> {
    let enter = || -> io::Result<()> {
        let file = std::fs::File::open(network)?;
        Ok(setns(file, CloneFlags::CLONE_NEWNET)?)
    };
    enter().map_err(|error| format!("cannot enter {}: {error}", network.display()))?;
    Ok(LOOPBACKS.map(unconnected))
}

fn unconnected(ip: IpAddr) -> io::Result<OwnedFd> {
    let family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    Ok(socket(family, SockType::Stream, flags, None)?)
}
