//! WebSockets as Kubernetes uses them: every message begins with the number of a channel.
//!
//! [`channels`] is the pure part; this module connects it to a socket. Port forwarding uses a
//! WebSocket as a mere tunnel for SPDY, see [`tunnel`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_util::sync::CancellationToken;
use tracing::debug;

pub mod channels;

use channels::{Encoding, Incoming};

use super::inbox::Feed;
use super::peer::Peer;

/// Messages of output that wait for the socket.
const QUEUE: usize = 16;
/// Some clients send all their input as one message.
const MAX_MESSAGE: usize = 4 << 20;
const PING_EVERY: Duration = Duration::from_secs(30);
/// A client that takes the output and yet answers no ping for so long is gone.
const SILENCE: Duration = Duration::from_secs(300);
/// How long the other side may take to answer our goodbye.
const LINGER: Duration = Duration::from_secs(5);

/// The channels of one WebSocket.
pub struct Connection {
    encoding: Encoding,
    output: mpsc::Sender<Message>,
    /// Ends when the other side is gone or sent what cannot be understood.
    pub gone: CancellationToken,
    writer: tokio::task::JoinHandle<()>,
}

/// Where a channel's output goes.
#[derive(Clone)]
pub struct ChannelOutput {
    channel: u8,
    encoding: Encoding,
    output: mpsc::Sender<Message>,
}

/// Speaks the server's side of WebSocket on `io`, after the HTTP upgrade.
pub async fn accept<I>(io: I) -> WebSocketStream<I>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    WebSocketStream::from_raw_socket(io, Role::Server, Some(limits())).await
}

fn limits() -> WebSocketConfig {
    WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE))
}

/// What the tasks of a connection know of each other.
struct Signs {
    /// When anything came in, pings included.
    heard: Mutex<Instant>,
    /// When data was sent or received.
    traffic: Mutex<Instant>,
    /// The reader waits for a process to take its input, so that nothing can be heard.
    waiting: AtomicBool,
}

impl Signs {
    fn new() -> Arc<Self> {
        let now = Instant::now();
        let waiting = AtomicBool::new(false);
        Arc::new(Self { heard: Mutex::new(now), traffic: Mutex::new(now), waiting })
    }

    /// Whether the client has shown no sign of life for too long.
    fn is_silent(&self) -> bool {
        !self.waiting.load(Ordering::Relaxed) && since(&self.heard) >= SILENCE
    }

    /// Resolves when there was no traffic for `limit`.
    async fn idle(&self, limit: Duration) {
        loop {
            let left = limit.saturating_sub(since(&self.traffic));
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }
}

fn touch(time: &Mutex<Instant>) {
    *time.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
}

fn since(time: &Mutex<Instant>) -> Duration {
    time.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
}

impl Connection {
    /// Serves a WebSocket; what comes in on a channel goes to its place in `inputs`, and is thrown
    /// away where there is none. Without data for `idle` it is ended.
    pub fn new<I>(
        socket: WebSocketStream<I>,
        encoding: Encoding,
        inputs: HashMap<u8, Feed>,
        idle: Duration,
        peer: Peer,
    ) -> Self
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (sink, stream) = socket.split();
        let (output, to_write) = mpsc::channel::<Message>(QUEUE);
        let gone = CancellationToken::new();
        let signs = Signs::new();
        let (writer_gone, writer_signs) = (gone.clone(), signs.clone());
        let writer = tokio::spawn(async move {
            let work = write(sink, to_write, &writer_signs);
            if let Some(Err(error)) = writer_gone.run_until_cancelled(work).await {
                debug!(error, "WebSocket broke while sending");
                writer_gone.cancel();
            }
        });
        let reader = Reader { inputs, encoding, peer, signs };
        let reader_gone = gone.clone();
        tokio::spawn(async move {
            let _ends_with_us = reader_gone.clone().drop_guard();
            reader_gone.run_until_cancelled(reader.run(stream, idle)).await;
        });
        Self { encoding, output, gone, writer }
    }

    /// A channel to send on.
    pub fn channel(&self, channel: u8) -> ChannelOutput {
        ChannelOutput { channel, encoding: self.encoding, output: self.output.clone() }
    }

    /// Sends what is still to be sent, says goodbye and hangs up.
    pub async fn close(mut self) {
        // Clients take a goodbye without a code for an error.
        let goodbye = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        drop(self.output.send(Message::Close(Some(goodbye))).await);
        drop((&mut self.writer).await);
        drop(tokio::time::timeout(LINGER, self.gone.cancelled()).await);
    }
}

impl Drop for Connection {
    /// However a session ends, its tasks and its socket end with it.
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

/// Sends messages, and pings while there are none; the last one is a goodbye.
async fn write<I>(
    mut sink: SplitSink<WebSocketStream<I>, Message>,
    mut messages: mpsc::Receiver<Message>,
    signs: &Signs,
) -> Result<(), String>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut pings = tokio::time::interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            message = messages.recv() => message,
            _ = pings.tick() => {
                if signs.is_silent() {
                    return Err("no answer to pings".to_owned());
                }
                Some(Message::Ping(Bytes::new()))
            }
        };
        let Some(message) = message else { return Ok(()) };
        let last = message.is_close();
        if matches!(message, Message::Binary(_) | Message::Text(_)) {
            touch(&signs.traffic);
        }
        sink.send(message).await.map_err(|error| error.to_string())?;
        if last {
            return Ok(());
        }
    }
}

struct Reader {
    inputs: HashMap<u8, Feed>,
    encoding: Encoding,
    peer: Peer,
    signs: Arc<Signs>,
}

impl Reader {
    async fn run<I>(mut self, mut stream: SplitStream<WebSocketStream<I>>, idle: Duration)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let signs = self.signs.clone();
        let work = async {
            while let Some(Ok(message)) = stream.next().await {
                touch(&signs.heard);
                if let Err(error) = self.dispatch(message).await {
                    return debug!(error, "WebSocket is of no use any more");
                }
            }
        };
        tokio::select! {
            () = work => {}
            () = signs.idle(idle) => debug!("WebSocket was idle for too long"),
        }
    }

    async fn dispatch(&mut self, message: Message) -> Result<(), &'static str> {
        let bytes = match message {
            Message::Binary(bytes) => bytes,
            Message::Text(text) => Bytes::from(text),
            // Answered by the library.
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_) => {
                return Ok(());
            }
        };
        match self.encoding.decode(bytes)? {
            Incoming::Data { channel, data } => {
                touch(&self.signs.traffic);
                if let Some(input) = self.inputs.get(&channel)
                    && !self.pass_on(input, data).await?
                {
                    self.inputs.remove(&channel);
                }
            }
            Incoming::Close { channel } => drop(self.inputs.remove(&channel)),
        }
        Ok(())
    }

    /// Whether more of this input is wanted.
    async fn pass_on(&self, input: &Feed, data: Bytes) -> Result<bool, &'static str> {
        self.signs.waiting.store(true, Ordering::Relaxed);
        let wanted = tokio::select! {
            wanted = input.push(data) => Ok(wanted),
            () = self.peer.gave_up() => Err("the client left behind what its process does not take"),
        };
        touch(&self.signs.heard);
        self.signs.waiting.store(false, Ordering::Relaxed);
        wanted
    }
}

impl ChannelOutput {
    /// Sends one message; `false` when nobody can receive it any more.
    pub async fn send(&self, data: &Bytes) -> bool {
        let message = match self.encoding.encode(self.channel, data) {
            channels::Outgoing::Binary(bytes) => Message::Binary(bytes),
            channels::Outgoing::Text(text) => Message::Text(text.into()),
        };
        self.output.send(message).await.is_ok()
    }
}

/// A WebSocket as a stream of bytes: what its binary messages carry, end to end.
pub fn tunnel<I>(socket: WebSocketStream<I>) -> DuplexStream
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (mut sink, mut stream) = socket.split();
    let (mut reading, mut writing) = tokio::io::split(far);
    tokio::spawn(async move {
        let inwards = async {
            while let Some(Ok(message)) = stream.next().await {
                let bytes = match message {
                    Message::Binary(bytes) => bytes,
                    Message::Text(text) => Bytes::from(text),
                    _ => continue,
                };
                if writing.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            drop(writing.shutdown().await);
        };
        let outwards = async {
            let mut buffer = bytes::BytesMut::new();
            loop {
                buffer.reserve(32 * 1024);
                match reading.read_buf(&mut buffer).await {
                    Ok(read) if read > 0 => {
                        let message = Message::Binary(buffer.split().freeze());
                        if sink.send(message).await.is_err() {
                            return;
                        }
                    }
                    _ => break,
                }
            }
            drop(tokio::time::timeout(LINGER, sink.close()).await);
            // A client that does not answer our goodbye must not hold the connection.
            tokio::time::sleep(LINGER).await;
        };
        tokio::select! {
            () = inwards => {}
            () = outwards => {}
        }
    });
    near
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::inbox;

    const LONG: Duration = Duration::from_secs(24 * 3600);

    async fn pair(
        idle: Duration,
        inputs: HashMap<u8, Feed>,
    ) -> (Connection, WebSocketStream<DuplexStream>) {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let client = WebSocketStream::from_raw_socket(near, Role::Client, None).await;
        let encoding = Encoding::Binary { close_signals: true };
        let server = accept(far).await;
        (Connection::new(server, encoding, inputs, idle, Peer::none()), client)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_answers_no_ping_is_gone() {
        let (server, _client) = pair(LONG, HashMap::new()).await;
        let began = Instant::now();
        server.gone.cancelled().await;
        assert!(began.elapsed() >= SILENCE && began.elapsed() < SILENCE * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_answers_pings_stays_until_the_idle_limit() {
        let idle = Duration::from_secs(3600);
        let (server, mut client) = pair(idle, HashMap::new()).await;
        let began = Instant::now();
        // Reading is what makes the library answer.
        tokio::spawn(async move { while let Some(Ok(_)) = client.next().await {} });
        server.gone.cancelled().await;
        assert!(began.elapsed() >= idle && began.elapsed() < idle * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_does_not_read_makes_its_client_no_silent_one() {
        let (feed, _inbox) = inbox::inbox(4);
        let (server, mut client) = pair(LONG, HashMap::from([(0, feed)])).await;
        client.send(Message::Binary(Bytes::from_static(b"\0more than four"))).await.unwrap();
        let waiting = tokio::time::timeout(SILENCE * 10, server.gone.cancelled()).await;
        assert!(waiting.is_err());
    }
}
