//! Port forwarding: per connection a pair of SPDY streams, one for the data and one for an error.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::debug;

use super::spdy::connection::{Connection, Stream};

/// The protocol that both sides must speak, directly or inside a WebSocket.
pub const SPDY_PROTOCOL: &str = "portforward.k8s.io";
pub const WEBSOCKET_PROTOCOL: &str = "SPDY/3.1+portforward.k8s.io";

const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves a client until it hangs up: every pair of streams becomes a connection to a port on the
/// loopback of the namespace `network` (`None`: the agent's own).
pub async fn run(mut connection: Connection, network: Option<PathBuf>, pod: String) {
    let mut waiting: HashMap<String, Stream> = HashMap::new();
    let mut forwards = JoinSet::new();
    while let Some(stream) = connection.next_stream().await {
        // Streams that were finished are reaped here, so that the set does not grow for ever.
        while forwards.try_join_next().is_some() {}
        // Clients older than 1.3 sent no request number; the port is as good.
        let request = stream.header("requestid").or(stream.header("port")).unwrap_or_default();
        let Some(other) = waiting.remove(request) else {
            waiting.insert(request.to_owned(), stream);
            continue;
        };
        let is_error = |stream: &Stream| stream.header("streamtype") == Some("error");
        let (error, data) = if is_error(&other) { (other, stream) } else { (stream, other) };
        forwards.spawn(forward(error, data, network.clone(), pod.clone()));
    }
    forwards.shutdown().await;
    connection.close().await;
}

async fn forward(error: Stream, data: Stream, network: Option<PathBuf>, pod: String) {
    let port = data.header("port").and_then(|port| port.parse::<u16>().ok()).filter(|p| *p != 0);
    let result = match port {
        None => Err("the port header is missing or is not a port (1-65535)".to_owned()),
        Some(port) => dial(network, port).await,
    };
    match result {
        Ok(socket) => copy(socket, data).await,
        Err(reason) => {
            let port = port.unwrap_or_default();
            let text = format!("error forwarding port {port} to pod {pod}, uid : {reason}");
            debug!(pod, port, reason, "Cannot forward a port");
            error.output.send(&Bytes::from(text)).await;
            data.output.reset().await;
        }
    }
    error.output.finish().await;
}

async fn copy(socket: tokio::net::TcpStream, mut data: Stream) {
    let (mut reading, mut writing) = socket.into_split();
    let outwards = async {
        while let Some(bytes) = data.input.recv().await {
            if writing.write_all(&bytes).await.is_err() {
                break;
            }
        }
        drop(writing.shutdown().await);
    };
    let inwards = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(16 * 1024);
            match reading.read_buf(&mut buffer).await {
                Ok(read) if read > 0 && data.output.send(&buffer.split().freeze()).await => {}
                _ => break,
            }
        }
        data.output.finish().await;
    };
    tokio::join!(outwards, inwards);
}

/// Connects to a port on the loopback of a network namespace. A socket stays in the namespace that it
/// was made in, so a short-lived thread goes there; the runtime's own threads never do.
async fn dial(network: Option<PathBuf>, port: u16) -> Result<tokio::net::TcpStream, String> {
    let (send, receive) = oneshot::channel();
    let thread = std::thread::Builder::new().name("port-forward".to_owned());
    let spawned = thread.spawn(move || drop(send.send(dial_blocking(network.as_deref(), port))));
    spawned.map_err(|error| format!("cannot start a thread: {error}"))?;
    let socket = receive.await.map_err(|_| "the dialling thread ended early".to_owned())??;
    let made = socket.set_nonblocking(true).and_then(|()| tokio::net::TcpStream::from_std(socket));
    made.map_err(|error| error.to_string())
}

fn dial_blocking(network: Option<&Path>, port: u16) -> Result<TcpStream, String> {
    if let Some(path) = network {
        let enter = || -> std::io::Result<()> {
            let file = std::fs::File::open(path)?;
            Ok(nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?)
        };
        enter().map_err(|error| format!("cannot enter {}: {error}", path.display()))?;
    }
    let loopbacks = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let mut failure = String::new();
    for ip in loopbacks {
        match TcpStream::connect_timeout(&SocketAddr::new(ip, port), DIAL_TIMEOUT) {
            Ok(socket) => return Ok(socket),
            // The first family's error says more about what is wrong.
            Err(error) if failure.is_empty() => {
                failure = format!("failed to connect to {ip}:{port} inside the pod: {error}");
            }
            Err(_) => {}
        }
    }
    Err(failure)
}
