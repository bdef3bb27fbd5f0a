//! Clients of a node's HTTPS API that are not kubectl.
#![allow(dead_code, reason = "each test binary uses its own part of the clients")]

use std::time::Duration;

use keelson_agent::server::peer::Peer;
use keelson_agent::server::spdy::connection::{Connection, Stream, Terms};
use keelson_agent::server::spdy::session::Role;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::fixture::Node;
use super::proxy;

pub type Socket = tokio_rustls::client::TlsStream<tokio::net::TcpStream>;

pub const DEADLINE: Duration = Duration::from_secs(30);

/// Sends a request and returns status, headers and, unless it is an upgrade, the body.
pub async fn ask(socket: &mut Socket, request: &str) -> (u16, String, String) {
    socket.write_all(request.as_bytes()).await.unwrap();
    socket.flush().await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    socket.read_exact(&mut body).await.unwrap();
    (head[9..12].parse().unwrap(), head, String::from_utf8(body).unwrap())
}

pub async fn get(node: &Node, path: &str) -> (u16, String) {
    let mut socket = proxy::connect(node.address).await.unwrap();
    let (status, _, body) =
        ask(&mut socket, &format!("GET {path} HTTP/1.1\r\nHost: n1\r\n\r\n")).await;
    (status, body)
}

pub async fn upgrade(node: &Node, path: &str, headers: &str) -> (Socket, String) {
    let mut socket = proxy::connect(node.address).await.unwrap();
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: n1\r\nConnection: Upgrade\r\n{headers}\r\n");
    let (status, head, body) = ask(&mut socket, &request).await;
    assert_eq!(status, 101, "{head}{body}");
    (socket, head)
}

pub async fn spdy(node: &Node, path: &str, protocol: &str) -> Connection {
    let headers = format!("Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n");
    let (socket, _) = upgrade(node, path, &headers).await;
    let terms = Terms { idle: DEADLINE, max_streams: 0, peer: Peer::none() };
    Connection::new(socket, Role::Client, terms)
}

pub async fn open(connection: &Connection, kind: &str) -> Stream {
    connection.open(vec![("streamtype".to_owned(), kind.to_owned())]).await
}

pub async fn read_until(stream: &mut Stream, want: &str) -> String {
    let mut text = String::new();
    while !text.contains(want) {
        let piece = tokio::time::timeout(DEADLINE, stream.input.recv()).await;
        let piece = piece.unwrap_or_else(|_| panic!("{want:?} never came after {text:?}"));
        let Some(piece) = piece else { panic!("ended before {want:?}: {text:?}") };
        text += &String::from_utf8_lossy(&piece);
    }
    text
}

/// Waits until `true`; what it waits for says what is missing when it does not come.
pub async fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let waiting = async {
        while !is_true() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}
