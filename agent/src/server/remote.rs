//! The streams of a remote command, whichever protocol the client speaks.
//!
//! A client asks for an upgrade of its HTTP connection, either to SPDY or to WebSocket, and names
//! the versions of the remote command protocol that it knows. [`negotiate`] is the pure part: it
//! says what to answer. [`establish`] turns the upgraded connection into a [`RemoteIo`].

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;

use super::containers::ExecRequest;
use super::inbox::{self, Inbox};
use super::peer::Peer;
use super::spdy::connection::{Connection as Spdy, Stream, StreamOutput, Terms};
use super::spdy::session::Role;
use super::websocket::channels::Encoding;
use super::websocket::{self, ChannelOutput, Connection as WebSocket};

/// How long a client may take to open its streams.
const STREAMS_TIMEOUT: Duration = Duration::from_secs(30);
/// The streams of a command: error, stdin, stdout, stderr, resize.
pub const MAX_STREAMS: usize = 5;
/// Sizes of a terminal are short.
const RESIZE_LIMIT: usize = 4 * 1024;

const SPDY_PROTOCOLS: &[&str] =
    &["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
const WEBSOCKET_PROTOCOLS: &[&str] = &[
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
];

/// The header in which SPDY clients name the versions that they know.
pub const STREAM_PROTOCOL: &str = "x-stream-protocol-version";

/// What a client and this server agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    pub transport: Transport,
    /// The version of the protocol on top; empty for clients that named none.
    pub protocol: String,
    /// The headers of the 101 response.
    pub answer: HeaderMap,
}

/// What the connection carries after the upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Spdy,
    WebSocket,
}

/// Decides how to speak with a client that sent these headers.
///
/// # Errors
/// Why there is no common language, in a sentence.
pub fn negotiate(headers: &HeaderMap, spdy: &[&str], websocket: &[&str]) -> Result<Agreed, String> {
    let upgrade = headers.get(header::UPGRADE).and_then(|value| value.to_str().ok());
    match upgrade.map(str::to_ascii_lowercase).as_deref() {
        Some("spdy/3.1") => {
            let asked = list(headers, STREAM_PROTOCOL);
            let protocol = choose(&asked, spdy, spdy.last().copied())?;
            let mut answer = upgrade_headers("SPDY/3.1");
            add(&mut answer, STREAM_PROTOCOL, &protocol);
            Ok(Agreed { transport: Transport::Spdy, protocol, answer })
        }
        Some("websocket") => {
            let asked = list(headers, header::SEC_WEBSOCKET_PROTOCOL.as_str());
            let protocol = choose(&asked, websocket, Some(""))?;
            let key = headers
                .get(header::SEC_WEBSOCKET_KEY)
                .ok_or("the Sec-WebSocket-Key header is missing")?;
            let mut answer = upgrade_headers("websocket");
            let accept = derive_accept_key(key.as_bytes());
            add(&mut answer, header::SEC_WEBSOCKET_ACCEPT.as_str(), &accept);
            if !protocol.is_empty() {
                add(&mut answer, header::SEC_WEBSOCKET_PROTOCOL.as_str(), &protocol);
            }
            Ok(Agreed { transport: Transport::WebSocket, protocol, answer })
        }
        _ => Err("unable to upgrade: missing upgrade headers in request".to_owned()),
    }
}

/// As [`negotiate`], for exec and attach.
///
/// # Errors
/// See there.
pub fn negotiate_command(headers: &HeaderMap) -> Result<Agreed, String> {
    negotiate(headers, SPDY_PROTOCOLS, WEBSOCKET_PROTOCOLS)
}

fn choose(asked: &[String], known: &[&str], unasked: Option<&str>) -> Result<String, String> {
    if asked.is_empty() {
        return Ok(unasked.unwrap_or_default().to_owned());
    }
    // The client's order is its preference.
    asked.iter().find(|asked| known.contains(&asked.as_str())).cloned().ok_or_else(|| {
        format!(
            "unable to upgrade: unable to negotiate protocol: client supports {asked:?}, \
             server accepts {known:?}"
        )
    })
}

/// The values of a header that may come several times and with commas.
fn list(headers: &HeaderMap, name: &str) -> Vec<String> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    let items = values.flat_map(|value| value.split(','));
    items.map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect()
}

fn upgrade_headers(protocol: &'static str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(protocol));
    headers
}

fn add(headers: &mut HeaderMap, name: &str, value: &str) {
    let name = http::HeaderName::from_bytes(name.as_bytes());
    if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(value)) {
        headers.insert(name, value);
    }
}

/// The client's ends of a process's streams.
pub struct RemoteIo {
    pub stdin: Option<Inbox>,
    pub resize: Option<Inbox>,
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    pub error: Output,
    /// The end of the command is told as a JSON status, not as a plain text.
    pub json_status: bool,
    /// Ends when the client is gone.
    pub gone: CancellationToken,
    connection: Connection,
}

enum Connection {
    Spdy(Spdy),
    WebSocket(WebSocket),
}

/// Where something is sent to the client.
#[derive(Clone)]
pub enum Output {
    Spdy(StreamOutput),
    WebSocket(ChannelOutput),
}

impl Output {
    /// Sends data; `false` when the client cannot get any more.
    pub async fn send(&self, data: &Bytes) -> bool {
        match self {
            Self::Spdy(stream) => stream.send(data).await,
            Self::WebSocket(channel) => channel.send(data).await,
        }
    }

    /// Says that nothing more will be sent; WebSocket channels end with their connection.
    pub async fn finish(&self) {
        if let Self::Spdy(stream) = self {
            stream.finish().await;
        }
    }
}

impl RemoteIo {
    /// Ends the outputs and hangs up when everything has been sent.
    pub async fn close(self) {
        for output in [Some(self.error), self.stdout, self.stderr].into_iter().flatten() {
            output.finish().await;
        }
        match self.connection {
            Connection::Spdy(spdy) => spdy.close().await,
            Connection::WebSocket(socket) => socket.close().await,
        }
    }
}

/// Waits until the client has opened the streams that `request` speaks of.
///
/// # Errors
/// When the client does not open them in time or hangs up.
pub async fn establish<I>(
    io: I,
    agreed: &Agreed,
    request: &ExecRequest,
    idle: Duration,
    peer: Peer,
) -> Result<RemoteIo, &'static str>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    match agreed.transport {
        Transport::Spdy => {
            let terms = Terms { idle, max_streams: MAX_STREAMS, peer };
            let collect = spdy_streams(Spdy::new(io, Role::Server, terms), agreed, request);
            tokio::time::timeout(STREAMS_TIMEOUT, collect)
                .await
                .map_err(|_| "timed out waiting for client to create streams")?
        }
        Transport::WebSocket => {
            Ok(websocket_channels(websocket::accept(io).await, agreed, request, idle, peer).await)
        }
    }
}

async fn spdy_streams(
    mut connection: Spdy,
    agreed: &Agreed,
    request: &ExecRequest,
) -> Result<RemoteIo, &'static str> {
    // The first two versions know no terminal size.
    let resizes =
        request.tty && !matches!(agreed.protocol.as_str(), "channel.k8s.io" | "v2.channel.k8s.io");
    let wanted = [
        ("error", true),
        ("stdin", request.stdin),
        ("stdout", request.stdout),
        ("stderr", request.stderr && !request.tty),
        ("resize", resizes),
    ];
    let expected = wanted.iter().filter(|(_, wanted)| *wanted).count();
    let mut streams: HashMap<String, Stream> = HashMap::new();
    while streams.len() < expected {
        let stream = connection.next_stream().await.ok_or("the client opened too few streams")?;
        let kind = stream.header("streamtype").unwrap_or_default().to_owned();
        if !wanted.iter().any(|(name, wanted)| *wanted && *name == kind) {
            return Err("the client opened a stream that it did not ask for");
        }
        if streams.insert(kind, stream).is_some() {
            return Err("the client opened a stream twice");
        }
    }
    connection.refuse_more();
    let error = streams.remove("error").ok_or("the client opened no error stream")?;
    let mut input = |name: &str| streams.remove(name).map(|stream| stream.input);
    let (stdin, resize) = (input("stdin"), input("resize"));
    let mut output = |name: &str| streams.remove(name).map(|stream| Output::Spdy(stream.output));
    Ok(RemoteIo {
        stdin,
        resize,
        stdout: output("stdout"),
        stderr: output("stderr"),
        error: Output::Spdy(error.output),
        json_status: agreed.protocol == "v4.channel.k8s.io",
        gone: connection.gone.clone(),
        connection: Connection::Spdy(connection),
    })
}

async fn websocket_channels<I>(
    socket: tokio_tungstenite::WebSocketStream<I>,
    agreed: &Agreed,
    request: &ExecRequest,
    idle: Duration,
    peer: Peer,
) -> RemoteIo
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let protocol = agreed.protocol.as_str();
    let encoding = match protocol {
        "base64.channel.k8s.io" | "v4.base64.channel.k8s.io" => Encoding::Base64,
        _ => Encoding::Binary { close_signals: protocol == "v5.channel.k8s.io" },
    };
    let mut inputs = HashMap::new();
    let mut input = |channel: u8, wanted: bool, limit: usize| {
        wanted.then(|| {
            let (feed, inbox) = inbox::inbox(limit);
            inputs.insert(channel, feed);
            inbox
        })
    };
    let stdin = input(0, request.stdin, inbox::LIMIT);
    let resize = input(4, request.tty, RESIZE_LIMIT);
    let connection = WebSocket::new(socket, encoding, inputs, idle, peer);
    let output =
        |channel: u8, wanted: bool| wanted.then(|| Output::WebSocket(connection.channel(channel)));
    let io = RemoteIo {
        stdin,
        resize,
        stdout: output(1, request.stdout),
        stderr: output(2, request.stderr && !request.tty),
        error: Output::WebSocket(connection.channel(3)),
        json_status: protocol.starts_with('v'),
        gone: connection.gone.clone(),
        connection: Connection::WebSocket(connection),
    };
    // Some clients take the first message, even an empty one, as the sign that they are connected.
    let lowest = io.stdout.as_ref().or(io.stderr.as_ref()).unwrap_or(&io.error);
    lowest.send(&Bytes::new()).await;
    io
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn spdy_takes_the_clients_first_choice_that_is_known() {
        let agreed = negotiate_command(&headers(&[
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v9.channel.k8s.io"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
            ("x-stream-protocol-version", "channel.k8s.io"),
        ]))
        .unwrap();
        assert_eq!(
            (agreed.transport, agreed.protocol.as_str()),
            (Transport::Spdy, "v4.channel.k8s.io")
        );
        assert_eq!(agreed.answer["x-stream-protocol-version"], "v4.channel.k8s.io");
        let silent = negotiate_command(&headers(&[("upgrade", "SPDY/3.1")])).unwrap();
        assert_eq!(silent.protocol, "channel.k8s.io");
    }

    #[test]
    fn websocket_answers_the_key_and_one_protocol() {
        let agreed = negotiate_command(&headers(&[
            ("upgrade", "websocket"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", "v5.channel.k8s.io, v4.channel.k8s.io"),
        ]))
        .unwrap();
        assert_eq!(agreed.protocol, "v5.channel.k8s.io");
        assert_eq!(agreed.answer["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(agreed.answer["sec-websocket-protocol"], "v5.channel.k8s.io");
    }

    #[test]
    fn no_common_language_is_an_error_that_names_both_sides() {
        let none = negotiate_command(&headers(&[])).unwrap_err();
        assert_eq!(none, "unable to upgrade: missing upgrade headers in request");
        let other = headers(&[("upgrade", "SPDY/3.1"), ("x-stream-protocol-version", "v9")]);
        let error = negotiate_command(&other).unwrap_err();
        assert!(error.contains("client supports [\"v9\"]"), "{error}");
    }
}
