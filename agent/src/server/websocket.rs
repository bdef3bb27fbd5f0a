//! WebSockets as Kubernetes uses them: every message begins with the number of a channel.
//!
//! [`channels`] is the pure part; this module connects it to a socket. Port forwarding uses a
//! WebSocket as a mere tunnel for SPDY, see [`tunnel`].

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_util::sync::CancellationToken;
use tracing::debug;

pub mod channels;

use channels::{Encoding, Incoming};

const QUEUE: usize = 16;
const MAX_MESSAGE: usize = 4 << 20;
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

impl Connection {
    /// Serves a WebSocket; what comes in on a channel goes to its place in `inputs`, and is thrown
    /// away where there is none.
    pub fn new<I>(
        socket: WebSocketStream<I>,
        encoding: Encoding,
        inputs: HashMap<u8, mpsc::Sender<Bytes>>,
    ) -> Self
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (mut sink, mut stream) = socket.split();
        let (output, mut to_write) = mpsc::channel::<Message>(QUEUE);
        let gone = CancellationToken::new();
        let (writer_gone, reader_gone) = (gone.clone(), gone.clone());
        let writer = tokio::spawn(async move {
            let work = async {
                while let Some(message) = to_write.recv().await {
                    let last = message.is_close();
                    if let Err(error) = sink.send(message).await {
                        debug!(%error, "WebSocket broke while sending");
                        return writer_gone.cancel();
                    }
                    if last {
                        return;
                    }
                }
            };
            writer_gone.run_until_cancelled(work).await;
        });
        tokio::spawn(async move {
            let _ends_with_us = reader_gone.clone().drop_guard();
            let mut inputs = inputs;
            let work = async {
                while let Some(Ok(message)) = stream.next().await {
                    if let Err(error) = dispatch(&mut inputs, encoding, message).await {
                        return debug!(error, "WebSocket message cannot be understood");
                    }
                }
            };
            reader_gone.run_until_cancelled(work).await;
        });
        Self { encoding, output, gone, writer }
    }

    /// A channel to send on.
    pub fn channel(&self, channel: u8) -> ChannelOutput {
        ChannelOutput { channel, encoding: self.encoding, output: self.output.clone() }
    }

    /// Sends what is still to be sent, says goodbye and hangs up.
    pub async fn close(self) {
        // Clients take a goodbye without a code for an error.
        let goodbye = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        drop(self.output.send(Message::Close(Some(goodbye))).await);
        drop(self.writer.await);
        drop(tokio::time::timeout(LINGER, self.gone.cancelled()).await);
        self.gone.cancel();
    }
}

async fn dispatch(
    inputs: &mut HashMap<u8, mpsc::Sender<Bytes>>,
    encoding: Encoding,
    message: Message,
) -> Result<(), &'static str> {
    let bytes = match message {
        Message::Binary(bytes) => bytes,
        Message::Text(text) => Bytes::from(text),
        // Answered by the library.
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_) => {
            return Ok(());
        }
    };
    match encoding.decode(bytes)? {
        Incoming::Data { channel, data } => {
            // Several clients send empty messages to keep the connection alive.
            if let Some(input) = inputs.get(&channel)
                && !data.is_empty()
                && input.send(data).await.is_err()
            {
                inputs.remove(&channel);
            }
        }
        Incoming::Close { channel } => drop(inputs.remove(&channel)),
    }
    Ok(())
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
    let over = Arc::new(CancellationToken::new());
    let read_over = over.clone();
    tokio::spawn(async move {
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
        read_over.cancel();
    });
    tokio::spawn(async move {
        let work = async {
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
                    _ => return drop(sink.close().await),
                }
            }
        };
        over.run_until_cancelled(work).await;
    });
    near
}
