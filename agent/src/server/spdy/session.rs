//! The rules of streams on one connection, without any socket: bytes in, events and bytes out.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};

use super::frame::{Decoder, Encoder, Frame, FrameError, StreamId};

/// The headers that streams are known by; no others are kept.
const KEPT_HEADERS: [&str; 3] = ["streamtype", "port", "requestid"];
const MAX_KEPT_HEADER: usize = 256;
/// Longer data is cut into frames of this size, so that streams share the connection.
const MAX_DATA: usize = 32 * 1024;

const STATUS_INVALID_STREAM: u32 = 2;
const STATUS_REFUSED: u32 = 3;
const STATUS_CANCEL: u32 = 5;

/// What the other side did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A stream was opened; it has been accepted.
    Opened {
        stream: StreamId,
        headers: Vec<(String, String)>,
    },
    Data {
        stream: StreamId,
        data: Bytes,
    },
    /// No more data will come on this stream.
    Finished {
        stream: StreamId,
    },
    /// The stream is gone in both directions.
    Reset {
        stream: StreamId,
    },
    /// No more streams will come.
    GoAway,
}

/// Which numbers this side's streams have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Server,
    Client,
}

/// Which directions of a stream are still open.
#[derive(Debug, Clone, Copy)]
struct Open {
    local: bool,
    remote: bool,
}

/// One side of a connection.
pub struct Session {
    decoder: Decoder,
    encoder: Encoder,
    role: Role,
    /// How many streams may be open at a time.
    max_streams: usize,
    streams: HashMap<StreamId, Open>,
    newest_remote: StreamId,
    next_local: StreamId,
}

impl Session {
    /// A session in which the other side may have `max_streams` streams open at a time; more are refused.
    pub fn new(role: Role, max_streams: usize) -> Self {
        Self {
            decoder: Decoder::default(),
            encoder: Encoder::default(),
            role,
            max_streams,
            streams: HashMap::new(),
            newest_remote: 0,
            next_local: if role == Role::Client { 1 } else { 2 },
        }
    }

    /// Bytes that wait for the rest of their frame, and streams that are open.
    pub(crate) fn held(&self) -> (usize, usize) {
        (self.decoder.held(), self.streams.len())
    }

    /// Takes what was received; appends the answers that the protocol demands to `answer`.
    ///
    /// # Errors
    /// When the other side does not keep the protocol: the connection must be closed.
    pub fn receive(
        &mut self,
        bytes: &[u8],
        answer: &mut BytesMut,
    ) -> Result<Vec<Event>, FrameError> {
        self.decoder.feed(bytes);
        let mut events = Vec::new();
        while let Some(frame) = self.decoder.next_frame()? {
            self.on_frame(frame, &mut events, answer)?;
        }
        Ok(events)
    }

    fn on_frame(
        &mut self,
        frame: Frame,
        events: &mut Vec<Event>,
        answer: &mut BytesMut,
    ) -> Result<(), FrameError> {
        match frame {
            Frame::SynStream { stream, fin, one_way, headers } => {
                let headers = kept(headers)?;
                if self.accept(stream, fin, one_way, answer)? {
                    events.push(Event::Opened { stream, headers });
                    if fin {
                        events.push(Event::Finished { stream });
                    }
                }
            }
            Frame::SynReply { stream, fin, .. } | Frame::Headers { stream, fin, .. } => {
                if fin && self.close_remote(stream) {
                    events.push(Event::Finished { stream });
                }
            }
            Frame::Data { stream, fin, data } => self.on_data(stream, fin, data, events, answer),
            Frame::Reset { stream, .. } => {
                if self.streams.remove(&stream).is_some() {
                    events.push(Event::Reset { stream });
                }
            }
            Frame::Ping { id } => {
                // The client's pings are odd; an even one is the answer to ours.
                if (id % 2 == 1) == (self.role == Role::Server) {
                    self.encoder.put(&Frame::Ping { id }, answer);
                }
            }
            Frame::GoAway { .. } => events.push(Event::GoAway),
            Frame::Ignored => {}
        }
        Ok(())
    }

    /// Whether the stream was accepted.
    fn accept(
        &mut self,
        stream: StreamId,
        fin: bool,
        one_way: bool,
        answer: &mut BytesMut,
    ) -> Result<bool, FrameError> {
        let remote_parity = if self.role == Role::Server { 1 } else { 0 };
        if stream % 2 != remote_parity || stream <= self.newest_remote {
            return Err(FrameError::StreamTwice(stream));
        }
        self.newest_remote = stream;
        if self.streams.len() >= self.max_streams {
            self.encoder.put(&Frame::Reset { stream, status: STATUS_REFUSED }, answer);
            return Ok(false);
        }
        self.streams.insert(stream, Open { local: !one_way, remote: !fin });
        let reply = Frame::SynReply { stream, fin: false, headers: Vec::new() };
        self.encoder.put(&reply, answer);
        self.forget_if_closed(stream);
        Ok(true)
    }

    fn on_data(
        &mut self,
        stream: StreamId,
        fin: bool,
        data: Bytes,
        events: &mut Vec<Event>,
        answer: &mut BytesMut,
    ) {
        if !self.streams.get(&stream).is_some_and(|open| open.remote) {
            // Data that was under way when the stream was closed here is no offence; on a stream
            // that never was, it is.
            if stream > self.newest_remote.max(self.next_local) {
                let reset = Frame::Reset { stream, status: STATUS_INVALID_STREAM };
                self.encoder.put(&reset, answer);
            }
            return;
        }
        if !data.is_empty() {
            events.push(Event::Data { stream, data });
        }
        if fin && self.close_remote(stream) {
            events.push(Event::Finished { stream });
        }
    }

    /// Opens a stream of this side.
    pub fn open(&mut self, headers: Vec<(String, String)>, out: &mut BytesMut) -> StreamId {
        let stream = self.next_local;
        self.next_local = self.next_local.saturating_add(2);
        self.streams.insert(stream, Open { local: true, remote: true });
        self.encoder.put(&Frame::SynStream { stream, fin: false, one_way: false, headers }, out);
        stream
    }

    /// Sends data; `false` when the stream cannot take any, because one side has closed it.
    pub fn send(&mut self, stream: StreamId, data: &Bytes, out: &mut BytesMut) -> bool {
        if !self.streams.get(&stream).is_some_and(|open| open.local) {
            return false;
        }
        let mut rest = data.clone();
        while !rest.is_empty() {
            let data = rest.split_to(rest.len().min(MAX_DATA));
            self.encoder.put(&Frame::Data { stream, fin: false, data }, out);
        }
        true
    }

    /// Says that no more data will be sent on a stream.
    pub fn finish(&mut self, stream: StreamId, out: &mut BytesMut) {
        if let Some(open) = self.streams.get_mut(&stream)
            && std::mem::take(&mut open.local)
        {
            self.encoder.put(&Frame::Data { stream, fin: true, data: Bytes::new() }, out);
            self.forget_if_closed(stream);
        }
    }

    /// Ends a stream in both directions at once.
    pub fn reset(&mut self, stream: StreamId, out: &mut BytesMut) {
        if self.streams.remove(&stream).is_some() {
            self.encoder.put(&Frame::Reset { stream, status: STATUS_CANCEL }, out);
        }
    }

    /// Says that this side will take no more streams.
    pub fn go_away(&mut self, out: &mut BytesMut) {
        self.encoder.put(&Frame::GoAway { last_stream: self.newest_remote, status: 0 }, out);
    }

    /// Whether the other side's direction was open until now.
    fn close_remote(&mut self, stream: StreamId) -> bool {
        let Some(open) = self.streams.get_mut(&stream) else { return false };
        let was_open = std::mem::take(&mut open.remote);
        self.forget_if_closed(stream);
        was_open
    }

    fn forget_if_closed(&mut self, stream: StreamId) {
        if self.streams.get(&stream).is_some_and(|open| !open.local && !open.remote) {
            self.streams.remove(&stream);
        }
    }
}

/// The headers that are needed, each once.
fn kept(headers: Vec<(String, String)>) -> Result<Vec<(String, String)>, FrameError> {
    let mut kept: Vec<(String, String)> = Vec::new();
    for (name, mut value) in headers {
        if !KEPT_HEADERS.contains(&name.as_str()) || kept.iter().any(|(known, _)| *known == name) {
            continue;
        }
        if value.len() > MAX_KEPT_HEADER {
            return Err(FrameError::Headers("a value longer than allowed"));
        }
        value.shrink_to_fit();
        kept.push((name, value));
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn new_client() -> Session {
        Session::new(Role::Client, 8)
    }

    fn new_server() -> Session {
        Session::new(Role::Server, 8)
    }

    fn pair() -> (Session, Session) {
        (new_client(), new_server())
    }

    fn headers(kind: &str) -> Vec<(String, String)> {
        vec![("streamtype".to_owned(), kind.to_owned())]
    }

    fn pass(to: &mut Session, bytes: &mut BytesMut) -> (Vec<Event>, BytesMut) {
        let mut answer = BytesMut::new();
        let events = to.receive(&bytes.split(), &mut answer).unwrap();
        (events, answer)
    }

    #[test]
    fn an_exchange_from_open_to_end() {
        let (mut client, mut server) = pair();
        let mut wire = BytesMut::new();
        let stream = client.open(headers("stdin"), &mut wire);
        assert!(client.send(stream, &Bytes::from_static(b"in"), &mut wire));
        client.finish(stream, &mut wire);
        let (events, mut answer) = pass(&mut server, &mut wire);
        assert_eq!(
            events,
            [
                Event::Opened { stream, headers: headers("stdin") },
                Event::Data { stream, data: Bytes::from_static(b"in") },
                Event::Finished { stream },
            ]
        );
        assert!(server.send(stream, &Bytes::from_static(b"out"), &mut answer));
        server.finish(stream, &mut answer);
        let (events, _) = pass(&mut client, &mut answer);
        let data = Event::Data { stream, data: Bytes::from_static(b"out") };
        assert_eq!(events, [data, Event::Finished { stream }]);
        assert!(!server.send(stream, &Bytes::from_static(b"late"), &mut wire));
        assert!(client.streams.is_empty() && server.streams.is_empty());
    }

    #[test]
    fn a_stream_cannot_be_opened_twice() {
        let (mut client, mut server) = pair();
        let mut wire = BytesMut::new();
        client.open(headers("a"), &mut wire);
        pass(&mut server, &mut wire);
        let mut again = new_client();
        // A second session's compressor starts anew, so only its numbers clash.
        let stream = again.open(Vec::new(), &mut wire);
        let mut answer = BytesMut::new();
        assert!(server.receive(&wire, &mut answer).is_err(), "stream {stream}");
    }

    #[test]
    fn streams_above_the_limit_are_refused_and_leave_nothing_behind() {
        let (mut client, mut server) = (Session::new(Role::Client, 0), new_server());
        let (mut wire, mut opened, mut answers) = (BytesMut::new(), 0, BytesMut::new());
        for _ in 0..1000 {
            client.open(headers("data"), &mut wire);
            let (events, answer) = pass(&mut server, &mut wire);
            opened += events.len();
            answers.extend_from_slice(&answer);
        }
        assert_eq!((opened, server.streams.len()), (8, 8));
        let resets = client.receive(&answers, &mut BytesMut::new()).unwrap();
        assert_eq!(resets.len(), 992, "each of the others was told");
        // A place is free again when a stream has ended.
        server.reset(1, &mut BytesMut::new());
        client.open(headers("data"), &mut wire);
        assert_eq!(pass(&mut server, &mut wire).0.len(), 1);
    }

    #[test]
    fn only_the_headers_that_are_needed_are_kept() {
        let (mut client, mut server) = pair();
        let mut wire = BytesMut::new();
        let mut many: Vec<_> = (0..50).map(|i| (format!("x-{i}"), "y".repeat(200))).collect();
        many.extend(headers("data"));
        many.extend(headers("error"));
        client.open(many, &mut wire);
        let (events, _) = pass(&mut server, &mut wire);
        assert_eq!(events, [Event::Opened { stream: 1, headers: headers("data") }]);
        client.open(headers(&"z".repeat(300)), &mut wire);
        assert!(server.receive(&wire, &mut BytesMut::new()).is_err());
    }

    #[test]
    fn pings_of_the_other_side_are_answered_and_own_ones_are_not() {
        let mut server = new_server();
        let mut wire = BytesMut::new();
        for id in [1, 2] {
            Encoder::default().put(&Frame::Ping { id }, &mut wire);
        }
        let (_, answer) = pass(&mut server, &mut wire);
        let mut want = BytesMut::new();
        Encoder::default().put(&Frame::Ping { id: 1 }, &mut want);
        assert_eq!(answer, want);
    }

    proptest! {
        #[test]
        fn whatever_is_sent_arrives_in_order_per_stream(
            chunks in prop::collection::vec(
                (0_usize..3, prop::collection::vec(any::<u8>(), 0..80)), 0..40),
            piece in 1_usize..100,
        ) {
            let (mut client, mut server) = pair();
            let mut wire = BytesMut::new();
            let streams: Vec<_> =
                (0..3).map(|i| client.open(headers(&i.to_string()), &mut wire)).collect();
            let mut sent = vec![Vec::new(); 3];
            for (i, chunk) in &chunks {
                client.send(streams[*i], &Bytes::from(chunk.clone()), &mut wire);
                sent[*i].extend_from_slice(chunk);
            }
            let mut got = vec![Vec::new(); 3];
            let mut answer = BytesMut::new();
            for part in wire.chunks(piece) {
                for event in server.receive(part, &mut answer).unwrap() {
                    if let Event::Data { stream, data } = event {
                        let i = streams.iter().position(|s| *s == stream).unwrap();
                        got[i].extend_from_slice(&data);
                    }
                }
            }
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn garbage_never_panics(parts in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 0..64), 0..8)) {
            let mut server = new_server();
            let mut answer = BytesMut::new();
            for part in parts {
                if server.receive(&part, &mut answer).is_err() { break }
            }
        }
    }
}
