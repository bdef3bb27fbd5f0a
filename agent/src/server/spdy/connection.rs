//! A session on a socket: two tasks, one reading and one writing, and a handle per stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::frame::StreamId;
use super::session::{Event, Role, Session};
use crate::server::inbox::{self, Feed, Inbox};
use crate::server::peer::Peer;

/// Streams that were opened and wait to be handed out.
const STREAM_QUEUE: usize = 16;
/// Pieces of output that wait for the socket.
const OUTPUT_QUEUE: usize = 16;
const READ_SIZE: usize = 16 * 1024;
/// How long the other side may take to hang up after everything has been sent.
const LINGER: Duration = Duration::from_secs(5);

/// What a connection is held to.
#[derive(Debug, Clone)]
pub struct Terms {
    /// A connection without traffic for so long is ended.
    pub idle: Duration,
    /// How many streams the other side may have open at a time.
    pub max_streams: usize,
    pub peer: Peer,
}

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
    pub input: Inbox,
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
    inputs: Arc<Mutex<HashMap<StreamId, Arc<Feed>>>>,
    last_traffic: Arc<Mutex<Instant>>,
}

enum Output {
    Bytes(BytesMut),
    Close,
}

impl Connection {
    /// Speaks SPDY on `io` until either side hangs up or breaks the `terms`.
    pub fn new<I>(io: I, role: Role, terms: Terms) -> Self
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (reading, writing) = tokio::io::split(io);
        let (output, to_write) = mpsc::channel(OUTPUT_QUEUE);
        let (opened_send, opened) = mpsc::channel(STREAM_QUEUE);
        let gone = CancellationToken::new();
        let shared = Shared {
            session: Arc::new(Mutex::new(Session::new(role, terms.max_streams))),
            output,
            inputs: Arc::new(Mutex::new(HashMap::new())),
            last_traffic: Arc::new(Mutex::new(Instant::now())),
        };
        let writer = tokio::spawn(write(writing, to_write, gone.clone()));
        let reader =
            Reader { shared: shared.clone(), opened: Some(opened_send), gone: gone.clone() };
        tokio::spawn(reader.run(reading, terms));
        Self { shared, opened, gone, writer }
    }

    /// The next stream that the other side opens; `None` when there will be no more.
    pub async fn next_stream(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// Refuses all streams from now on: there are as many as were agreed on.
    pub fn refuse_more(&mut self) {
        self.opened.close();
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
    pub async fn close(mut self) {
        let mut bytes = BytesMut::new();
        self.shared.session().go_away(&mut bytes);
        self.shared.write(bytes).await;
        drop(self.shared.output.send(Output::Close).await);
        // The last bytes must be on their way before the caller goes on to drop the socket.
        drop((&mut self.writer).await);
        // A socket closed with unread input sends a reset, which can overtake the last output: the
        // reader goes on until the other side hangs up.
        drop(tokio::time::timeout(LINGER, self.gone.cancelled()).await);
    }
}

impl Drop for Connection {
    /// However a session ends, its tasks and its socket end with it.
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

impl Shared {
    /// The session's methods do not panic, and a poisoned one is as good as any.
    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inputs(&self) -> MutexGuard<'_, HashMap<StreamId, Arc<Feed>>> {
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_input(&self, stream: StreamId) -> Inbox {
        let (feed, input) = inbox::inbox(inbox::LIMIT);
        self.inputs().insert(stream, Arc::new(feed));
        input
    }

    fn touch(&self) {
        *self.last_traffic.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last_traffic(&self) -> Instant {
        *self.last_traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when nothing was sent or received for `limit`.
    async fn idle(&self, limit: Duration) {
        loop {
            let left = limit.saturating_sub(self.last_traffic().elapsed());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
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
        // The other side may never speak of this stream again.
        self.shared.inputs().remove(&self.stream);
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
    async fn run<R>(mut self, io: ReadHalf<R>, terms: Terms)
    where
        R: AsyncRead + AsyncWrite + Send + 'static,
    {
        let gone = self.gone.clone();
        let _ends_with_us = gone.clone().drop_guard();
        let shared = self.shared.clone();
        let work = async {
            // Beside the reader, so that it is seen while the reader waits for a stream's reader or for the socket.
            tokio::select! {
                () = self.read(io, &terms.peer) => {}
                () = shared.idle(terms.idle) => debug!("SPDY connection was idle for too long"),
            }
        };
        gone.run_until_cancelled(work).await;
        // Whoever reads a stream sees its end.
        shared.inputs().clear();
    }

    async fn read<R>(&mut self, mut io: ReadHalf<R>, peer: &Peer)
    where
        R: AsyncRead + AsyncWrite + Send + 'static,
    {
        let mut buffer = BytesMut::with_capacity(READ_SIZE);
        loop {
            buffer.clear();
            buffer.reserve(READ_SIZE);
            match io.read_buf(&mut buffer).await {
                Ok(0) => return,
                Ok(_) if self.received(&buffer, peer).await => {}
                Ok(_) => return,
                Err(error) => return debug!(%error, "SPDY connection broke"),
            }
        }
    }

    /// Passes on what came in; `false` when the connection is of no use any more.
    async fn received(&mut self, bytes: &[u8], peer: &Peer) -> bool {
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
            if !self.dispatch(event, peer).await {
                return false;
            }
        }
        true
    }

    async fn dispatch(&mut self, event: Event, peer: &Peer) -> bool {
        match event {
            Event::Opened { stream, headers } => {
                let output = StreamOutput { stream, shared: self.shared.clone() };
                let input = self.shared.add_input(stream);
                let opened = Stream { headers, input, output: output.clone() };
                let taken = match &self.opened {
                    Some(to) => to.send(opened).await.is_ok(),
                    None => false,
                };
                if !taken {
                    output.reset().await;
                }
            }
            Event::Data { stream, data } => {
                let input = self.shared.inputs().get(&stream).cloned();
                let Some(input) = input else { return true };
                tokio::select! {
                    // A stream's reader that went away is no reason to stop reading for the others.
                    wanted = input.push(data) => if !wanted {
                        self.shared.inputs().remove(&stream);
                    },
                    () = peer.gave_up() => {
                        debug!("SPDY client left behind what its stream's reader does not take");
                        return false;
                    }
                }
            }
            Event::Finished { stream } | Event::Reset { stream } => {
                self.shared.inputs().remove(&stream);
            }
            Event::GoAway => self.opened = None,
        }
        true
    }
}
