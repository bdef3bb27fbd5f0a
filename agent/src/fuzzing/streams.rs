//! What clients of the kubelet's API send: queries, upgrades, SPDY, WebSocket.

use std::collections::HashSet;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use jiff::Timestamp;
use tokio::io::AsyncWriteExt;

use super::{Steps, text};
use crate::pod::grpc;
use crate::server::containers::ExecRequest;
use crate::server::exec::terminal_sizes;
use crate::server::logs::options;
use crate::server::peer::Peer;
use crate::server::remote::{Agreed, Transport, establish};
use crate::server::spdy::frame::{Decoder, Encoder, Frame};
use crate::server::spdy::session::{Event, Role, Session};
use crate::server::websocket::channels::{Encoding, Incoming, Outgoing};
use crate::server::{query, remote};

/// A control frame is at most this long, and no frame is held back but those.
const MAX_HELD: usize = (64 << 10) + 8;
/// Streams that one connection may have.
const MAX_STREAMS: usize = 16;
/// What the header blocks of one frame may cost.
const MAX_HEADERS: usize = 256 << 10;

/// A query, and the options of `kubectl logs` in it.
pub fn queries(input: &[u8]) {
    let text = text(input);
    let pairs = query::pairs(&text);
    let decoded: usize = pairs.iter().map(|(name, value)| name.len() + value.len()).sum();
    // Bytes that are not UTF-8 become a character of three.
    assert!(decoded <= 3 * text.len(), "a query grew while it was decoded");
    drop(options::parse(&pairs, Timestamp::UNIX_EPOCH));
    assert!(query::segments(&text).iter().all(|segment| !segment.is_empty()));
}

/// Header blocks, and what is behind their compression.
pub fn spdy_headers(input: &[u8]) {
    let (mut encoder, mut wire) = (Encoder::default(), BytesMut::new());
    // Several blocks, since they share one decompressor.
    for (stream, plain) in (1..).step_by(2).zip(input.split(|byte| *byte == b'|')) {
        encoder.put_plain_block(stream, plain, &mut wire);
    }
    let mut decoder = Decoder::default();
    decoder.feed(&wire);
    while let Ok(Some(frame)) = decoder.next_frame() {
        if let Frame::SynStream { headers, .. } = frame {
            assert!(size(&headers) <= MAX_HEADERS, "a header block became too large");
        }
    }
}

fn size(headers: &[(String, String)]) -> usize {
    headers.iter().map(|(name, value)| name.len() + value.len()).sum()
}

/// A connection in many steps: frames of a client, garbage in between, and what the server does meanwhile.
pub fn spdy_session(input: &[u8]) {
    let mut client = Encoder::default();
    let mut server = Session::new(Role::Server, MAX_STREAMS);
    let mut known = Streams::default();
    for (step, data) in Steps(input) {
        let (mut wire, mut answer) = (BytesMut::new(), BytesMut::new());
        let stream = u32::from(data.first().copied().unwrap_or_default());
        let fin = step & 0x10 != 0;
        match step & 0x0f {
            0 => {
                let headers = vec![("streamtype".to_owned(), text(data).into_owned())];
                let one_way = step & 0x20 != 0;
                client.put(&Frame::SynStream { stream, fin, one_way, headers }, &mut wire);
            }
            1 => {
                let data = Bytes::copy_from_slice(data);
                client.put(&Frame::Data { stream, fin, data }, &mut wire);
            }
            2 => client.put(&Frame::Reset { stream, status: 5 }, &mut wire),
            3 => client.put(&Frame::Headers { stream, fin, headers: Vec::new() }, &mut wire),
            4 => client.put(&Frame::SynReply { stream, fin, headers: Vec::new() }, &mut wire),
            5 => client.put(&Frame::Ping { id: stream }, &mut wire),
            6 => client.put(&Frame::GoAway { last_stream: stream, status: 0 }, &mut wire),
            7 => client.put_plain_block(stream, data, &mut wire),
            8 => drop(server.send(stream, &Bytes::copy_from_slice(data), &mut answer)),
            9 => server.finish(stream, &mut answer),
            10 => {
                server.reset(stream, &mut answer);
                if known.is_known(stream) {
                    known.ended.insert(stream);
                }
            }
            11 => drop(known.own.insert(server.open(Vec::new(), &mut answer))),
            _ => wire.extend_from_slice(data),
        }
        let Ok(events) = server.receive(&wire, &mut answer) else { return };
        known.check(events);
        let (bytes, open) = server.held();
        assert!(bytes <= MAX_HELD, "{bytes} bytes wait for the rest of their frame");
        assert!(open <= MAX_STREAMS + known.own.len(), "{open} streams are open");
    }
}

/// An exec from its first byte to the client's end, over either transport: all streams end with the client.
pub fn remote_command(input: &[u8]) {
    let (flags, rest) = input.split_first().unwrap_or((&0, &[]));
    let (transport, wire) = match flags & 1 {
        0 => (Transport::Spdy, spdy_client(rest)),
        _ => (Transport::WebSocket, rest.to_vec()),
    };
    let protocols = ["v5.channel.k8s.io", "v4.channel.k8s.io", "base64.channel.k8s.io", ""];
    let protocol = protocols.get(usize::from(flags >> 1 & 3)).copied().unwrap_or_default();
    let agreed = Agreed { transport, protocol: protocol.to_owned(), answer: HeaderMap::new() };
    let tty = flags & 8 != 0;
    let request = ExecRequest { command: Vec::new(), tty, stdin: true, stdout: true, stderr: !tty };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_time().build() else {
        return;
    };
    runtime.block_on(async {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        drop(far.write_all(&wire).await);
        drop(far.shutdown().await);
        let hour = Duration::from_secs(3600);
        let Ok(mut io) = establish(near, &agreed, &request, hour, Peer::none()).await else {
            return;
        };
        let mut received = 0;
        for mut inbox in [io.stdin.take(), io.resize.take()].into_iter().flatten() {
            while let Some(data) = inbox.recv().await {
                received += data.len();
            }
        }
        assert!(received <= wire.len(), "more was received than was sent");
        io.gone.cancelled().await;
    });
}

/// The bytes of a client that speaks SPDY: the streams of an exec, then frames or garbage.
fn spdy_client(script: &[u8]) -> Vec<u8> {
    let (mut client, mut wire) = (Encoder::default(), BytesMut::new());
    for (stream, kind) in (1..).step_by(2).zip(["error", "stdin", "stdout", "stderr"]) {
        let headers = vec![("streamtype".to_owned(), kind.to_owned())];
        client.put(&Frame::SynStream { stream, fin: false, one_way: false, headers }, &mut wire);
    }
    for (step, data) in Steps(script) {
        let stream = u32::from(step >> 4);
        let fin = step & 8 != 0;
        match step & 7 {
            0..=2 => {
                let data = Bytes::copy_from_slice(data);
                client.put(&Frame::Data { stream, fin, data }, &mut wire);
            }
            3 => client.put(&Frame::Reset { stream, status: 5 }, &mut wire),
            4 => client.put(&Frame::GoAway { last_stream: stream, status: 0 }, &mut wire),
            5 => client.put_plain_block(stream, data, &mut wire),
            6 => client.put(&Frame::Ping { id: stream }, &mut wire),
            _ => wire.extend_from_slice(data),
        }
    }
    wire.to_vec()
}

/// Answers of gRPC probes.
pub fn grpc_answer(input: &[u8]) {
    let status = grpc::status(input);
    assert!(status == 0 || input.contains(&status));
    let request = grpc::message(&text(input));
    assert!(request.len() <= 5 + 2 + 127);
}

/// What the server has been told of its streams.
#[derive(Default)]
struct Streams {
    opened: HashSet<u32>,
    own: HashSet<u32>,
    ended: HashSet<u32>,
}

impl Streams {
    fn check(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Opened { stream, headers } => {
                    assert!(self.opened.insert(stream), "stream {stream} was opened twice");
                    assert!(size(&headers) <= MAX_HEADERS, "headers of stream {stream}");
                }
                Event::Data { stream, data } => {
                    assert!(!self.ended.contains(&stream), "data behind the end of {stream}");
                    assert!(self.is_known(stream) && !data.is_empty());
                }
                Event::Finished { stream } | Event::Reset { stream } => {
                    assert!(
                        self.is_known(stream),
                        "the end of stream {stream} without its beginning"
                    );
                    self.ended.insert(stream);
                }
                Event::GoAway => {}
            }
        }
    }

    fn is_known(&self, stream: u32) -> bool {
        self.opened.contains(&stream) || self.own.contains(&stream)
    }
}

/// The headers that ask for an upgrade.
pub fn negotiate(input: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in input.split(|byte| *byte == b'\n') {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = parts.next().and_then(|name| HeaderName::from_bytes(name).ok());
        let value = parts.next().and_then(|value| HeaderValue::from_bytes(value).ok());
        if let (Some(name), Some(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    if let Ok(agreed) = remote::negotiate_command(&headers) {
        assert!(agreed.answer.contains_key("upgrade"), "an agreement without an upgrade");
    }
}

/// Messages of a WebSocket, in each encoding.
pub fn websocket_channels(input: &[u8]) {
    let encodings = [
        Encoding::Binary { close_signals: false },
        Encoding::Binary { close_signals: true },
        Encoding::Base64,
    ];
    for encoding in encodings {
        let Ok(Incoming::Data { channel, data }) = encoding.decode(Bytes::copy_from_slice(input))
        else {
            continue;
        };
        let again = match encoding.encode(channel, &data) {
            Outgoing::Binary(bytes) => bytes,
            Outgoing::Text(text) => Bytes::from(text),
        };
        assert_eq!(encoding.decode(again), Ok(Incoming::Data { channel, data }));
    }
}

/// Sizes of a terminal, as clients send them.
pub fn terminal(input: &[u8]) {
    assert!(terminal_sizes(input).len() <= input.len());
}
