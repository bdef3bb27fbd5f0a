//! A session on a socket: two tasks, one reading and one writing, and a handle per stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::frame::StreamId;
use super::session::{Event, Role, Session};

/// Pieces of data that a stream holds before its connection waits for the stream's reader.
const STREAM_QUEUE: usize = 16;
/// Pieces of output that wait for the socket.
const OUTPUT_QUEUE: usize = 16;
/// How long the other side may take to hang up after everything has been sent.
const LINGER: Duration = Duration::from_secs(5);

/// A connection whose streams are handed out as the other side opens them.
pub struct Connection {
    shared: Shared,
    opened: mpsc::Receiver<Stream>,
    /// Ends when the other side is gone or broke the protocol.
    pub gone: CancellationToken,
    writer: tokio::task::JoinHandle<()>,
}

/// One stream: what it was opened with, what comes in, and where to put what goes out.
pub struct Stream {
    pub headers: Vec<(String, String)>,
    pub input: mpsc::Receiver<Bytes>,
    pub output: StreamOutput,
}

impl Stream {
    /// A header of the opening frame.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Where a stream's output goes. Cheap to clone; dropping it does not end the stream.
#[derive(Clone)]
pub struct StreamOutput {
    stream: StreamId,
    shared: Shared,
}

#[derive(Clone)]
struct Shared {
    session: Arc<Mutex<Session>>,
    output: mpsc::Sender<Output>,
    /// Where each stream's input goes, until it ends.
    inputs: Arc<Mutex<HashMap<StreamId, mpsc::Sender<Bytes>>>>,
    last_traffic: Arc<Mutex<Instant>>,
}

enum Output {
    Bytes(BytesMut),
    Close,
}

impl Connection {
    /// Speaks SPDY on `io` until either side hangs up or nothing was sent for `idle`.
    pub fn new<I>(io: I, role: Role, idle: Duration) -> Self
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (reading, writing) = tokio::io::split(io);
        let (output, to_write) = mpsc::channel(OUTPUT_QUEUE);
        let (opened_send, opened) = mpsc::channel(STREAM_QUEUE);
        let gone = CancellationToken::new();
        let shared = Shared {
            session: Arc::new(Mutex::new(Session::new(role))),
            output,
            inputs: Arc::new(Mutex::new(HashMap::new())),
            last_traffic: Arc::new(Mutex::new(Instant::now())),
        };
        let writer = tokio::spawn(write(writing, to_write, gone.clone()));
        let reader =
            Reader { shared: shared.clone(), opened: Some(opened_send), gone: gone.clone() };
        tokio::spawn(reader.run(reading, idle));
        Self { shared, opened, gone, writer }
    }

    /// The next stream that the other side opens; `None` when there will be no more.
    pub async fn next_stream(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// Opens a stream from this side.
    pub async fn open(&self, headers: Vec<(String, String)>) -> Stream {
        let mut bytes = BytesMut::new();
        let stream = self.shared.session().open(headers.clone(), &mut bytes);
        let input = self.shared.add_input(stream);
        self.shared.write(bytes).await;
        Stream { headers, input, output: StreamOutput { stream, shared: self.shared.clone() } }
    }

    /// Sends what is still to be sent, says goodbye and hangs up.
    pub async fn close(self) {
        let mut bytes = BytesMut::new();
        self.shared.session().go_away(&mut bytes);
        self.shared.write(bytes).await;
        drop(self.shared.output.send(Output::Close).await);
        // The last bytes must be on their way before the caller goes on to drop the socket.
        drop(self.writer.await);
        // A socket closed with unread input sends a reset, which can overtake the last output: the
        // reader goes on until the other side hangs up.
        drop(tokio::time::timeout(LINGER, self.gone.cancelled()).await);
        self.gone.cancel();
    }
}

impl Shared {
    /// The session's methods do not panic, and a poisoned one is as good as any.
    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inputs(&self) -> MutexGuard<'_, HashMap<StreamId, mpsc::Sender<Bytes>>> {
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_input(&self, stream: StreamId) -> mpsc::Receiver<Bytes> {
        let (sender, input) = mpsc::channel(STREAM_QUEUE);
        self.inputs().insert(stream, sender);
        input
    }

    fn touch(&self) {
        *self.last_traffic.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last_traffic(&self) -> Instant {
        *self.last_traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn write(&self, bytes: BytesMut) -> bool {
        self.touch();
        bytes.is_empty() || self.output.send(Output::Bytes(bytes)).await.is_ok()
    }
}

impl StreamOutput {
    /// Sends data; `false` when nobody can receive it any more.
    pub async fn send(&self, data: &Bytes) -> bool {
        let mut bytes = BytesMut::with_capacity(data.len() + 8);
        let open = self.shared.session().send(self.stream, data, &mut bytes);
        open && self.shared.write(bytes).await
    }

    /// Says that nothing more will be sent.
    pub async fn finish(&self) {
        let mut bytes = BytesMut::new();
        self.shared.session().finish(self.stream, &mut bytes);
        self.shared.write(bytes).await;
    }

    /// Ends the stream in both directions.
    pub async fn reset(&self) {
        let mut bytes = BytesMut::new();
        self.shared.session().reset(self.stream, &mut bytes);
        self.shared.write(bytes).await;
    }
}

async fn write<W>(mut io: WriteHalf<W>, mut output: mpsc::Receiver<Output>, gone: CancellationToken)
where
    W: AsyncRead + AsyncWrite + Send + 'static,
{
    let work = async {
        while let Some(Output::Bytes(bytes)) = output.recv().await {
            io.write_all(&bytes).await?;
            // TLS holds bytes back until a flush; nothing is gained by it when more is waiting.
            if output.is_empty() {
                io.flush().await?;
            }
        }
        io.flush().await?;
        io.shutdown().await
    };
    if let Some(Err(error)) = gone.run_until_cancelled(work).await {
        debug!(%error, "SPDY connection broke while sending");
        gone.cancel();
    }
}

struct Reader {
    shared: Shared,
    opened: Option<mpsc::Sender<Stream>>,
    gone: CancellationToken,
}

impl Reader {
    async fn run<R>(mut self, mut io: ReadHalf<R>, idle: Duration)
    where
        R: AsyncRead + AsyncWrite + Send + 'static,
    {
        let gone = self.gone.clone();
        let _ends_with_us = gone.clone().drop_guard();
        gone.run_until_cancelled(async {
            let mut buffer = BytesMut::with_capacity(16 * 1024);
            loop {
                buffer.clear();
                buffer.reserve(16 * 1024);
                let deadline = self.shared.last_traffic() + idle;
                match tokio::time::timeout_at(deadline.into(), io.read_buf(&mut buffer)).await {
                    Err(_) if self.shared.last_traffic() + idle > Instant::now() => {}
                    Err(_) => return debug!("SPDY connection was idle for too long"),
                    Ok(Ok(0)) => return,
                    Ok(Ok(_)) if self.received(&buffer).await => {}
                    Ok(Ok(_)) => return,
                    Ok(Err(error)) => return debug!(%error, "SPDY connection broke"),
                }
            }
        })
        .await;
        // Whoever reads a stream sees its end.
        self.shared.inputs().clear();
    }

    /// Passes on what came in; `false` when the connection is of no use any more.
    async fn received(&mut self, bytes: &[u8]) -> bool {
        let mut answer = BytesMut::new();
        let events = self.shared.session().receive(bytes, &mut answer);
        let events = match events {
            Ok(events) => events,
            Err(error) => {
                debug!(%error, "SPDY protocol broken by the other side");
                return false;
            }
        };
        if !self.shared.write(answer).await {
            // Our side has said goodbye: what still comes is read and thrown away.
            self.shared.inputs().clear();
            return true;
        }
        self.shared.touch();
        for event in events {
            self.dispatch(event).await;
        }
        true
    }

    async fn dispatch(&mut self, event: Event) {
        match event {
            Event::Opened { stream, headers } => {
                let output = StreamOutput { stream, shared: self.shared.clone() };
                let Some(opened) = &self.opened else { return output.reset().await };
                let input = self.shared.add_input(stream);
                drop(opened.send(Stream { headers, input, output }).await);
            }
            Event::Data { stream, data } => {
                // A reader that went away is no reason to stop reading for the others.
                let input = self.shared.inputs().get(&stream).cloned();
                if let Some(input) = input
                    && input.send(data).await.is_err()
                {
                    self.shared.inputs().remove(&stream);
                }
            }
            Event::Finished { stream } | Event::Reset { stream } => {
                self.shared.inputs().remove(&stream);
            }
            Event::GoAway => self.opened = None,
        }
    }
}
