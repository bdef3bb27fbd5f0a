//! Port forwarding: per connection a pair of SPDY streams, one for the data and one for an error.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::debug;

use super::spdy::connection::{Connection, Stream};

mod dial;

/// The protocol that both sides must speak, directly or inside a WebSocket.
pub const SPDY_PROTOCOL: &str = "portforward.k8s.io";
pub const WEBSOCKET_PROTOCOL: &str = "SPDY/3.1+portforward.k8s.io";

/// Streams that a client may have open at a time: 128 forwarded connections.
pub const MAX_STREAMS: usize = 256;
/// Connections that are forwarded at a time, for all clients together.
static FORWARDS: Semaphore = Semaphore::const_new(2048);
/// How long a stream waits for the other one of its pair, as with the kubelet.
const PAIR_LIMIT: Duration = Duration::from_secs(30);

/// Serves a client until it hangs up: every pair of streams becomes a connection to a port on the
/// loopback of the namespace `network` (`None`: the agent's own).
pub async fn run(mut connection: Connection, network: Option<PathBuf>, pod: String) {
    let mut waiting = Waiting::default();
    let mut forwards = JoinSet::new();
    loop {
        // Those that ended are reaped here, so that the set does not grow for ever.
        while forwards.try_join_next().is_some() {}
        let next = match waiting.oldest() {
            None => connection.next_stream().await,
            Some(since) => {
                let limit = tokio::time::timeout_at(since + PAIR_LIMIT, connection.next_stream());
                match limit.await {
                    Ok(next) => next,
                    Err(_) => {
                        waiting.give_up(Instant::now()).await;
                        continue;
                    }
                }
            }
        };
        let Some(stream) = next else { break };
        // The session counts open streams; one that its client has closed already waits here all the same, and a
        // forward goes on until its connection has been made.
        if waiting.0.len() + 2 * forwards.len() >= MAX_STREAMS {
            debug!(pod, "Client opened more streams than it may");
            stream.output.reset().await;
            continue;
        }
        if let Some((error, data)) = waiting.pair(stream).await {
            forwards.spawn(forward(error, data, network.clone(), pod.clone()));
        }
    }
    forwards.shutdown().await;
    connection.close().await;
}

/// Streams whose other half has not come yet, by request. A client has no more of them than streams.
#[derive(Default)]
struct Waiting(HashMap<String, (Instant, Stream)>);

impl Waiting {
    fn oldest(&self) -> Option<Instant> {
        self.0.values().map(|(since, _)| *since).min()
    }

    /// The error stream and the data stream of a request, when `stream` is the second of them.
    async fn pair(&mut self, stream: Stream) -> Option<(Stream, Stream)> {
        // Clients older than 1.3 sent no request number; the port is as good.
        let request = stream.header("requestid").or(stream.header("port")).unwrap_or_default();
        let request = request.to_owned();
        match self.0.remove(&request) {
            None => {
                self.0.insert(request, (Instant::now(), stream));
                None
            }
            Some((_, first)) if is_error(&first) && !is_error(&stream) => Some((first, stream)),
            Some((_, first)) if !is_error(&first) && is_error(&stream) => Some((stream, first)),
            Some(first) => {
                debug!(request, "Client opened a stream of a forward twice");
                self.0.insert(request, first);
                stream.output.reset().await;
                None
            }
        }
    }

    async fn give_up(&mut self, now: Instant) {
        let late = self.0.extract_if(|_, (since, _)| *since + PAIR_LIMIT <= now);
        let late: Vec<_> = late.map(|(_, (_, stream))| stream).collect();
        for stream in late {
            debug!("Client opened only one of the two streams of a forward");
            stream.output.reset().await;
        }
    }
}

fn is_error(stream: &Stream) -> bool {
    stream.header("streamtype") == Some("error")
}

async fn forward(error: Stream, data: Stream, network: Option<PathBuf>, pod: String) {
    let place = FORWARDS.try_acquire();
    let port = data.header("port").and_then(|port| port.parse::<u16>().ok()).filter(|p| *p != 0);
    let result = match port {
        _ if place.is_err() => Err("the node forwards as many connections as it may".to_owned()),
        None => Err("the port header is missing or is not a port (1-65535)".to_owned()),
        Some(port) => dial::dial(network, port).await,
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

async fn copy(socket: TcpStream, mut data: Stream) {
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::server::peer::Peer;
    use crate::server::spdy::connection::Terms;
    use crate::server::spdy::frame::{Decoder, Encoder, Frame};
    use crate::server::spdy::session::Role;

    const IDLE: Duration = Duration::from_secs(3600);

    fn serve() -> Connection {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let terms = |max_streams| Terms { idle: IDLE, max_streams, peer: Peer::none() };
        let server = Connection::new(far, Role::Server, terms(MAX_STREAMS));
        tokio::spawn(run(server, None, "web".to_owned()));
        Connection::new(near, Role::Client, terms(0))
    }

    async fn open(client: &Connection, kind: &str, port: u16, request: usize) -> Stream {
        let header = |name: &str, value: String| (name.to_owned(), value);
        client
            .open(vec![
                header("streamtype", kind.to_owned()),
                header("port", port.to_string()),
                header("requestid", request.to_string()),
                header("x-padding", "y".repeat(10_000)),
            ])
            .await
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_unpaired_streams_is_refused_and_makes_place_again_after_a_while() {
        let client = serve();
        let mut streams = Vec::new();
        for request in 0..2000 {
            streams.push(open(&client, "data", 1, request).await);
        }
        // Above the limit they end at once, below it when their pair did not come.
        let began = Instant::now();
        let late = streams.split_off(MAX_STREAMS);
        for mut stream in late {
            assert_eq!(stream.input.recv().await, None);
        }
        assert!(began.elapsed() < PAIR_LIMIT);
        for mut stream in streams {
            assert_eq!(stream.input.recv().await, None);
        }
        assert!(began.elapsed() >= PAIR_LIMIT);
        let mut error = open(&client, "error", 0, 1).await;
        let _data = open(&client, "data", 0, 1).await;
        let text = error.input.recv().await.unwrap();
        assert!(text.starts_with(b"error forwarding port 0 to pod web"), "{text:?}");
    }

    /// Such a stream is over as soon as it is opened, so that the session does not count it.
    #[tokio::test(start_paused = true)]
    async fn streams_that_are_closed_as_they_are_opened_count_until_they_are_given_up() {
        let (mut near, far) = tokio::io::duplex(64 * 1024);
        let terms = Terms { idle: IDLE, max_streams: MAX_STREAMS, peer: Peer::none() };
        let server = Connection::new(far, Role::Server, terms);
        tokio::spawn(run(server, None, "web".to_owned()));
        let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
        let mut wire = BytesMut::new();
        let mut syn = |stream: u32, kind: &str, request: u32, closed: bool| {
            let header = |name: &str, value: String| (name.to_owned(), value);
            let headers = vec![
                header("streamtype", kind.to_owned()),
                header("port", "0".to_owned()),
                header("requestid", request.to_string()),
            ];
            let frame = Frame::SynStream { stream, fin: closed, one_way: closed, headers };
            encoder.put(&frame, &mut wire);
            wire.split()
        };
        let mut flood = Vec::new();
        for n in 0..1000 {
            flood.extend_from_slice(&syn(2 * n + 1, "data", n, true));
        }
        flood.extend_from_slice(&syn(2001, "error", 5000, false));
        let late = [syn(2003, "error", 5001, false), syn(2005, "data", 5001, false)].concat();
        let mut reset_or_data = async |near: &mut tokio::io::DuplexStream, wanted: u32| {
            let mut buffer = BytesMut::new();
            loop {
                while let Some(frame) = decoder.next_frame().unwrap() {
                    match frame {
                        Frame::Reset { stream, .. } if stream == wanted => return true,
                        Frame::Data { stream, .. } if stream == wanted => return false,
                        _ => {}
                    }
                }
                assert!(near.read_buf(&mut buffer).await.unwrap() > 0);
                decoder.feed(&buffer.split());
            }
        };
        let began = Instant::now();
        near.write_all(&flood).await.unwrap();
        assert!(reset_or_data(&mut near, 2001).await, "above the limit");
        assert!(began.elapsed() < PAIR_LIMIT, "at once, not since its pair did not come");
        tokio::time::sleep(PAIR_LIMIT * 2).await;
        near.write_all(&late).await.unwrap();
        assert!(!reset_or_data(&mut near, 2003).await, "there is place again");
    }

    #[tokio::test]
    async fn a_stream_of_the_same_kind_is_no_pair() {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = serve();
        let mut data = open(&client, "data", port, 7).await;
        let mut again = open(&client, "data", port, 7).await;
        assert_eq!(again.input.recv().await, None);
        let _error = open(&client, "error", port, 7).await;
        let (mut socket, _) = listener.accept().await.unwrap();
        socket.write_all(b"hello").await.unwrap();
        assert_eq!(data.input.recv().await.as_deref(), Some(&b"hello"[..]));
    }
}
