//! Clients of the node's HTTPS API that hang up, hang, flood and vanish: each ends its own session and nothing else.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    unreachable_pub,
    dead_code,
    reason = "a failure in a test may panic, and its modules are its own"
)]

#[path = "server/client.rs"]
mod client;
#[path = "server/fixture.rs"]
mod fixture;
#[path = "server/proxy.rs"]
mod proxy;

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use keelson_agent::server::spdy::connection::Connection;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role as WebSocketRole;

use client::{DEADLINE, Socket, ask, get, open, read_until, spdy, until, upgrade};
use fixture::Node;

async fn websocket(node: &Node, path: &str) -> WebSocketStream<Socket> {
    let headers = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                   Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n";
    let (socket, _) = upgrade(node, path, headers).await;
    WebSocketStream::from_raw_socket(socket, WebSocketRole::Client, None).await
}

fn on_channel_0(data: &[u8]) -> Message {
    Message::Binary([&[0], data].concat().into())
}

/// The rest of what a connection brings, until it ends.
async fn drained(mut socket: WebSocketStream<Socket>) {
    let rest = async { while let Some(Ok(_)) = socket.next().await {} };
    tokio::time::timeout(DEADLINE, rest).await.expect("the node hangs up");
}

async fn gone(connection: &Connection) {
    tokio::time::timeout(DEADLINE, connection.gone.cancelled()).await.expect("the node hangs up");
}

/// `kubectl cp` into a process that hangs, then Ctrl-C.
#[tokio::test]
async fn a_client_that_leaves_is_noticed_though_the_container_does_not_read_its_input() {
    for size in [100 << 10, 640 << 10] {
        let node = Node::start(|_| ()).await;
        node.attached.send_replace("exec sleep 1000");
        let path = "/attach/default/web/main?input=1&output=1";
        let connection = spdy(&node, path, "v4.channel.k8s.io").await;
        let (_error, stdin, _stdout) = (
            open(&connection, "error").await,
            open(&connection, "stdin").await,
            open(&connection, "stdout").await,
        );
        let mut websocket = websocket(&node, path).await;
        until("two sessions", || node.routes.sessions.len() == 2).await;
        let data = vec![b'x'; size];
        let both = async {
            stdin.output.send(&Bytes::from(data.clone())).await;
            drop(websocket.send(on_channel_0(&data)).await);
        };
        // More than is held for a stream: the node stops reading, and sees the hang-up all the same.
        drop(tokio::time::timeout(Duration::from_secs(2), both).await);
        drop((connection, stdin, _error, _stdout, websocket));
        until("no session is left", || node.routes.sessions.is_empty()).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_log_of_a_silent_container() {
    let node = Node::start(|_| ()).await;
    let mut followers = Vec::new();
    for _ in 0..200 {
        let mut socket = proxy::connect(node.address).await.unwrap();
        let path = "/containerLogs/default/web/main?follow=true";
        let (status, ..) =
            ask(&mut socket, &format!("GET {path} HTTP/1.1\r\nHost: n1\r\n\r\n")).await;
        assert_eq!(status, 200);
        followers.push(socket);
    }
    until("all follow", || node.routes.sessions.len() == 200).await;
    drop(followers);
    until("no session is left", || node.routes.sessions.is_empty()).await;
}

#[tokio::test]
async fn a_terminal_is_resized_though_its_process_does_not_read() {
    let node = Node::start(|_| ()).await;
    let script = "until+[+%22%24(stty+size)%22+=+'45+123'+];+do+:;+done;+echo+sized";
    let path = format!(
        "/exec/default/web/main?input=1&output=1&tty=1&command=sh&command=-c&command={script}"
    );
    let connection = spdy(&node, &path, "v4.channel.k8s.io").await;
    let (_error, stdin, mut stdout, resize) = (
        open(&connection, "error").await,
        open(&connection, "stdin").await,
        open(&connection, "stdout").await,
        open(&connection, "resize").await,
    );
    for _ in 0..200 {
        stdin.output.send(&Bytes::from(vec![b'x'; 1000])).await;
    }
    resize.output.send(&Bytes::from_static(b"{\"Width\":123,\"Height\":45}")).await;
    read_until(&mut stdout, "sized").await;
}

#[tokio::test]
async fn a_session_without_traffic_ends_also_while_its_input_is_stuck() {
    let node = Node::start(|config| config.streaming_idle_timeout = Duration::from_secs(1)).await;
    let path = "/exec/default/web/main?input=1&output=1&command=sleep&command=1000";
    let connection = spdy(&node, path, "v4.channel.k8s.io").await;
    let (_error, stdin, _stdout) = (
        open(&connection, "error").await,
        open(&connection, "stdin").await,
        open(&connection, "stdout").await,
    );
    let flood = Bytes::from(vec![b'x'; 1 << 20]);
    tokio::join!(stdin.output.send(&flood), gone(&connection));
    let mut stuck = websocket(&node, path).await;
    let silent = websocket(&node, path).await;
    drop(tokio::time::timeout(DEADLINE, stuck.send(on_channel_0(&flood))).await);
    tokio::join!(drained(stuck), drained(silent));
}

#[tokio::test]
async fn streams_that_nothing_was_agreed_on_are_refused_and_the_command_goes_on() {
    let node = Node::start(|_| ()).await;
    let path = "/exec/default/web/main?input=1&output=1&command=cat";
    let connection = spdy(&node, path, "v4.channel.k8s.io").await;
    let (_error, stdin, mut stdout) = (
        open(&connection, "error").await,
        open(&connection, "stdin").await,
        open(&connection, "stdout").await,
    );
    stdin.output.send(&Bytes::from_static(b"before\n")).await;
    read_until(&mut stdout, "before").await;
    for _ in 0..1000 {
        let mut extra = open(&connection, "stdout").await;
        let end = tokio::time::timeout(DEADLINE, extra.input.recv()).await;
        assert_eq!(end.expect("refused"), None);
    }
    stdin.output.send(&Bytes::from_static(b"after\n")).await;
    read_until(&mut stdout, "after").await;
}

#[tokio::test]
async fn a_flood_of_half_opened_forwards_leaves_the_next_client_alone() {
    let node = Node::start(|_| ()).await;
    let connection = spdy(&node, "/portForward/default/web", "portforward.k8s.io").await;
    let padding = "y".repeat(8000);
    let mut refused = 0;
    for request in 0..5000 {
        let header = |name: &str, value: String| (name.to_owned(), value);
        let mut stream = connection
            .open(vec![
                header("streamtype", "data".to_owned()),
                header("port", "80".to_owned()),
                header("requestid", request.to_string()),
                header("x-padding", padding.clone()),
            ])
            .await;
        if request >= 256 {
            let end = tokio::time::timeout(DEADLINE, stream.input.recv()).await;
            assert_eq!(end.expect("refused"), None);
            refused += 1;
        }
    }
    assert_eq!(refused, 5000 - 256);
    let other = spdy(&node, "/portForward/default/web", "portforward.k8s.io").await;
    let mut error = open(&other, "error").await;
    let _data = open(&other, "data").await;
    read_until(&mut error, "the port header is missing").await;
}

/// The node's own mistakes are played by the fixture.
#[tokio::test]
async fn a_panic_ends_one_request_or_session_and_is_counted() {
    let node = Node::start(|_| ()).await;
    let path = "/exec/default/web/main?output=1&command=panic";
    let connection = spdy(&node, path, "v4.channel.k8s.io").await;
    let _streams = (open(&connection, "error").await, open(&connection, "stdout").await);
    gone(&connection).await;
    assert_eq!(get(&node, "/containerLogs/default/web/broken").await.0, 500);
    let (_, metrics) = get(&node, "/metrics").await;
    for task in ["HTTPS request", "session"] {
        let line = format!("keelson_panics_total{{task=\"{task}\"}} ");
        assert!(metrics.contains(&line), "{metrics}");
    }
}

#[tokio::test]
async fn a_caller_that_is_not_let_in_has_no_second_request() {
    let node = Node::start(|config| *config = Default::default()).await;
    let mut socket = proxy::connect(node.address).await.unwrap();
    let (status, head, _) = ask(&mut socket, "GET /pods HTTP/1.1\r\nHost: n1\r\n\r\n").await;
    assert_eq!(status, 401);
    assert!(head.contains("connection: close"), "{head}");
    assert_eq!(socket.read(&mut [0; 10]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn the_head_of_a_strangers_request_has_a_limit() {
    let node = Node::start(|_| ()).await;
    let mut socket = proxy::connect(node.address).await.unwrap();
    let request = format!("GET /pods HTTP/1.1\r\nHost: n1\r\nX: {}\r\n\r\n", "x".repeat(300_000));
    // The node may hang up before it has got everything.
    drop(socket.write_all(request.as_bytes()).await);
    drop(socket.flush().await);
    let mut answer = Vec::new();
    drop(tokio::time::timeout(DEADLINE, socket.read_to_end(&mut answer)).await.expect("ended"));
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[tokio::test]
async fn garbage_instead_of_either_protocol_ends_its_session() {
    let node = Node::start(|_| ()).await;
    let path = "/exec/default/web/main?output=1&command=true";
    for protocol in ["SPDY/3.1", "websocket"] {
        for garbage in [vec![0; 4096], vec![0xff; 4096], (0..=255).collect()] {
            let headers = format!("Upgrade: {protocol}\r\nSec-WebSocket-Key: AAAA\r\n");
            let (mut socket, _) = upgrade(&node, path, &headers).await;
            socket.write_all(&garbage).await.unwrap();
            drop(socket);
        }
    }
    until("no session is left", || node.routes.sessions.is_empty()).await;
    assert_eq!(get(&node, "/healthz").await, (200, "ok".to_owned()));
}

#[tokio::test]
async fn a_client_that_dribbles_its_handshake_or_its_request_is_ended() {
    let node = Node::start(|_| ()).await;
    let dribble = async |mut socket: Box<dyn Duplex>, first: &'static [u8], rest: u8| {
        socket.write_all(first).await.unwrap();
        loop {
            tokio::select! {
                read = socket.read_u8() => if read.is_err() { return },
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    if socket.write_all(&[rest]).await.is_err() || socket.flush().await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    let tcp = tokio::net::TcpStream::connect(node.address).await.unwrap();
    let healthz = tokio::net::TcpStream::connect(node.healthz).await.unwrap();
    let tls = proxy::connect(node.address).await.unwrap();
    let all = async {
        tokio::join!(
            dribble(Box::new(tcp), &[0x16, 3, 1, 2, 0], 0),
            dribble(Box::new(healthz), b"GET / HTTP/1.1\r\nX: ", b'x'),
            dribble(Box::new(tls), b"GET / HTTP/1.1\r\nX: ", b'x'),
        )
    };
    tokio::time::timeout(DEADLINE, all).await.expect("the node hangs up");
}

trait Duplex: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Duplex for T {}
