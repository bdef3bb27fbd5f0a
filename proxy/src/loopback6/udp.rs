//! Datagrams to ::1: each client gets a socket of its own towards the node's address, so that answers find
//! their way back.

use std::collections::HashMap;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::task::JoinSet;

/// How long a client that is silent, and gets no answers, is remembered: as long as connection tracking does
/// with one that was answered.
const IDLE: Duration = Duration::from_secs(120);
/// Clients at a time and port.
const CLIENTS: usize = 256;
/// Datagrams that wait on their way to a Service; more of them are lost.
const WAITING: usize = 64;
/// More than any datagram holds.
const LARGEST: usize = 65_536;

/// Passes on what comes for `port`, for ever.
pub(super) async fn relay(port: u16, to: Ipv6Addr) {
    let bind = || {
        let socket = std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, port))?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    };
    let Some(socket) = super::listen(port, bind).await else { return };
    let socket = Arc::new(socket);
    let mut clients: HashMap<SocketAddr, Sender<Vec<u8>>> = HashMap::new();
    let mut sessions = JoinSet::new();
    let mut buffer = vec![0; LARGEST];
    loop {
        let (length, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // Such as a client that does not listen any more.
                tracing::debug!(port, %error, "Cannot receive a datagram to ::1");
                tokio::task::yield_now().await;
                continue;
            }
        };
        while let Some(ended) = sessions.try_join_next() {
            clients.retain(|client, _| ended.as_ref().ok() != Some(client));
        }
        if !clients.contains_key(&client) && clients.len() < CLIENTS {
            let (sender, datagrams) = mpsc::channel(WAITING);
            clients.insert(client, sender);
            let (socket, to) = (Arc::clone(&socket), SocketAddr::new(to.into(), port));
            sessions.spawn(async move {
                if let Err(error) = converse(&socket, client, to, datagrams).await {
                    tracing::debug!(%to, %error, "Cannot pass on datagrams to ::1");
                }
                client
            });
        }
        let datagram = buffer[..length].to_vec();
        if clients.get(&client).is_none_or(|sender| sender.try_send(datagram).is_err()) {
            tracing::trace!(port, "A datagram to ::1 is lost");
        }
    }
}

/// Goes on until both sides have been silent for a while, or nobody is there.
async fn converse(
    listener: &UdpSocket,
    client: SocketAddr,
    to: SocketAddr,
    mut datagrams: Receiver<Vec<u8>>,
) -> std::io::Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).await?;
    socket.connect(to).await?;
    let mut buffer = vec![0; LARGEST];
    loop {
        tokio::select! {
            datagram = datagrams.recv() => match datagram {
                Some(datagram) => drop(socket.send(&datagram).await?),
                None => return Ok(()),
            },
            length = socket.recv(&mut buffer) => {
                listener.send_to(&buffer[..length?], client).await?;
            }
            () = tokio::time::sleep(IDLE) => return Ok(()),
        }
    }
}
