//! Real sockets.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::Ipv4Addr;

use keelson_listener::{Limits, Listener};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A server that answers one byte with the same byte.
async fn echo(limits: Limits) -> std::net::SocketAddr {
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    let listener = Listener::new("echo", socket, limits);
    tokio::spawn(async move {
        loop {
            let mut connection = listener.accept().await;
            tokio::spawn(async move {
                let slot = connection.slot.clone();
                let work = async {
                    let mut byte = [0];
                    while connection.stream.read_exact(&mut byte).await.is_ok() {
                        connection.slot.establish().unwrap();
                        connection.stream.write_all(&byte).await.unwrap();
                    }
                };
                slot.run(work).await;
            });
        }
    });
    address
}

async fn asks(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    stream.write_all(b"x").await.is_ok() && stream.read_exact(&mut byte).await.is_ok()
}

#[tokio::test]
async fn silent_connections_neither_shut_out_a_caller_nor_stay() {
    let address = echo(Limits { pending: 16, pending_of_peer: 8, established: 100 }).await;
    let mut early = TcpStream::connect(address).await.unwrap();
    assert!(asks(&mut early).await);
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let mut caller = TcpStream::connect(address).await.unwrap();
    assert!(asks(&mut caller).await, "a caller that comes last is served");
    assert!(asks(&mut early).await, "a caller that was there before is served");
    let mut ended = 0;
    for stream in &mut silent[..190] {
        ended += usize::from(stream.read(&mut [0]).await.is_ok_and(|read| read == 0));
    }
    assert_eq!(ended, 190, "the old silent ones were closed");
}
