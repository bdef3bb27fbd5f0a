//! Ten thousand clients that say nothing. A binary of its own: it measures memory.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    dead_code,
    reason = "a failure in a test may panic, and its modules are its own"
)]

#[path = "server/client.rs"]
mod client;
#[path = "server/crowd.rs"]
mod crowd;
#[path = "server/fixture.rs"]
mod fixture;
#[path = "server/proxy.rs"]
mod proxy;

use bytes::Bytes;

use client::{open, read_until, spdy};
use fixture::Node;

async fn exec(node: &Node) {
    let path = "/exec/default/web/main?output=1&command=echo&command=hello";
    let connection = spdy(node, path, "v4.channel.k8s.io").await;
    let (mut error, mut stdout) =
        (open(&connection, "error").await, open(&connection, "stdout").await);
    read_until(&mut stdout, "hello").await;
    read_until(&mut error, "Success").await;
}

#[tokio::test]
async fn ten_thousand_silent_connections_cost_little_and_keep_no_other_client_out() {
    crowd::allow_descriptors(12_000);
    let node = Node::start(|_| ()).await;
    let path = "/exec/default/web/main?input=1&output=1&command=cat";
    let session = spdy(&node, path, "v4.channel.k8s.io").await;
    let (_error, stdin, mut stdout) = (
        open(&session, "error").await,
        open(&session, "stdin").await,
        open(&session, "stdout").await,
    );
    exec(&node).await;
    let before = crowd::resident();
    let meanwhile = async {
        for _ in 0..50 {
            exec(&node).await;
        }
    };
    let (crowd, ()) = tokio::join!(crowd::connect(node.address, 10_000), meanwhile);
    let cost = crowd::resident().saturating_sub(before);
    assert!(cost <= 30 << 20, "{} connections cost {} MiB", crowd.len(), cost >> 20);
    exec(&node).await;
    stdin.output.send(&Bytes::from_static(b"still here\n")).await;
    read_until(&mut stdout, "still here").await;
}
