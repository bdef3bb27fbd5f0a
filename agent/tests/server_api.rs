//! The node's HTTPS API as clients see it that are not kubectl: terminals over SPDY, old WebSocket
//! protocols, certificates, refusals, garbage.
#![allow(
    clippy::unwrap_used,
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
use keelson_agent::config::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role as WebSocketRole;

use client::{get, open, read_until, spdy, upgrade};
use fixture::Node;

const DEADLINE: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_terminal_has_the_size_that_the_client_says() {
    let node = Node::start(|_| ()).await;
    let path = "/exec/default/web/u-1/main?input=1&output=1&tty=1&command=sh";
    let connection = spdy(&node, path, "v4.channel.k8s.io").await;
    let mut error = open(&connection, "error").await;
    let stdin = open(&connection, "stdin").await;
    let mut stdout = open(&connection, "stdout").await;
    let resize = open(&connection, "resize").await;
    resize.output.send(&Bytes::from_static(b"{\"Width\":123,\"Height\":45}")).await;
    // The size is applied beside the shell: it is asked for until it is there.
    let ask = "until [ \"$(stty size)\" = '45 123' ]; do :; done; stty size; exit 7\n";
    stdin.output.send(&Bytes::from(ask)).await;
    // Not the echo of what was typed: there a quote follows.
    read_until(&mut stdout, "45 123\r\n").await;
    let status = read_until(&mut error, "ExitCode").await;
    assert!(status.contains("\"message\":\"7\""), "{status}");
}

#[tokio::test]
async fn the_oldest_protocol_tells_failures_in_plain_words() {
    let node = Node::start(|_| ()).await;
    let path = "/exec/default/web/main?output=1&command=sh&command=-c&command=exit+3";
    let connection = spdy(&node, path, "channel.k8s.io").await;
    let (mut error, _stdout) =
        (open(&connection, "error").await, open(&connection, "stdout").await);
    read_until(&mut error, "command terminated with non-zero exit code: 3").await;
}

#[tokio::test]
async fn clients_that_only_send_text_speak_base64() {
    let node = Node::start(|_| ()).await;
    let headers = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                   Sec-WebSocket-Protocol: base64.channel.k8s.io\r\n";
    let path = "/exec/default/web/main?input=1&output=1&command=head&command=-c3";
    let (socket, head) = upgrade(&node, path, headers).await;
    assert!(head.contains("sec-websocket-protocol: base64.channel.k8s.io"), "{head}");
    let mut socket = WebSocketStream::from_raw_socket(socket, WebSocketRole::Client, None).await;
    socket.send(Message::Text("0YWJj".into())).await.unwrap();
    let mut texts = Vec::new();
    while let Some(Ok(message)) = socket.next().await {
        if let Message::Text(text) = message {
            texts.push(text.to_string());
        }
    }
    assert_eq!(texts, ["1", "1YWJj"]);
}

#[tokio::test]
async fn garbage_after_an_upgrade_ends_only_that_connection() {
    let node = Node::start(|_| ()).await;
    let path = "/exec/default/web/main?output=1&command=true";
    let headers = "Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n";
    let (mut socket, _) = upgrade(&node, path, headers).await;
    socket.write_all(&[0xff; 4096]).await.unwrap();
    let mut rest = Vec::new();
    // Closed with or without a TLS goodbye.
    drop(tokio::time::timeout(DEADLINE, socket.read_to_end(&mut rest)).await.unwrap());
    assert_eq!(get(&node, "/healthz").await, (200, "ok".to_owned()));
}

#[tokio::test]
async fn requests_that_cannot_be_served_say_why() {
    let node = Node::start(|_| ()).await;
    for (path, status, text) in [
        ("/nowhere", 404, "404 page not found"),
        ("/exec/default/web/main?output=1&command=true", 400, "missing upgrade headers"),
        ("/exec/default/web/main?command=true", 400, "at least 1 of stdin, stdout, stderr"),
        (
            "/exec/default/web/other-uid/main?output=1&command=true",
            404,
            "pod \"web\" does not exist",
        ),
        ("/containerLogs/default/gone/main", 404, "pod \"gone\" does not exist"),
        ("/containerLogs/default/web/gone", 404, "container \"gone\" not found in pod \"web\""),
        ("/containerLogs/default/web/main?tailLines=x", 400, "tailLines: \"x\""),
        ("/containerLogs/default/web/slow", 400, "is waiting to start: ContainerCreating"),
    ] {
        let (got, body) = get(&node, path).await;
        assert_eq!(got, status, "{path}: {body}");
        assert!(body.contains(text), "{path}: {body}");
    }
}

#[tokio::test]
async fn an_agent_that_has_just_started_finds_its_pods_first() {
    let node = Node::start(|_| ()).await;
    node.known.send_replace(false);
    let ((status, body), ()) = tokio::join!(get(&node, "/containerLogs/default/web/main"), async {
        tokio::task::yield_now().await;
        node.known.send_replace(true);
    });
    assert_eq!(status, 200, "{body}");
}

#[tokio::test]
async fn objects_and_metrics() {
    let node = Node::start(|_| ()).await;
    let (_, pods) = get(&node, "/pods").await;
    let pods: serde_json::Value = serde_json::from_str(&pods).unwrap();
    assert_eq!(pods["kind"], "PodList");
    assert_eq!(pods["items"][0]["metadata"]["name"], "web");
    let (_, metrics) = get(&node, "/metrics").await;
    assert!(metrics.contains("\nkubelet_running_pods 1\n"), "{metrics}");
    assert!(metrics.contains("\nkubelet_running_containers{container_state=\"running\"} 2\n"));
}

#[tokio::test]
async fn nobody_comes_in_without_credentials_except_to_the_health_check() {
    let node = Node::start(|config| *config = ServerConfig::default()).await;
    assert_eq!(get(&node, "/pods").await, (401, "Unauthorized".to_owned()));
    assert_eq!(get(&node, "/exec/default/web/main?output=1&command=true").await.0, 401);
    let mut socket = tokio::net::TcpStream::connect(node.healthz).await.unwrap();
    let request = "GET /healthz HTTP/1.1\r\nHost: n1\r\nConnection: close\r\n\r\n";
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok"), "{answer}");
    let mut socket = tokio::net::TcpStream::connect(node.healthz).await.unwrap();
    socket.write_all(request.replace("/healthz", "/pods").as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
}

/// A CA for clients, in PEM, and a client of it that may do everything.
fn authority() -> (String, CertificateDer<'static>, Vec<u8>) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(params, key);
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, "admin");
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:masters");
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let key = rcgen::KeyPair::generate().unwrap();
    let client = params.signed_by(&key, &issuer).unwrap();
    (ca.pem(), client.der().clone(), key.serialize_der())
}

#[tokio::test]
async fn a_new_ca_of_clients_is_used_without_a_restart() {
    let ((old_ca, old, old_key), (new_ca, new, new_key)) = (authority(), authority());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("clients.crt");
    std::fs::write(&file, old_ca).unwrap();
    let ca = file.clone();
    let node = Node::start(move |config| {
        *config = ServerConfig { client_ca_file: Some(ca), ..ServerConfig::default() };
    })
    .await;
    let status = async |certificate: &CertificateDer<'static>, key: &[u8]| {
        let key = PrivateKeyDer::Pkcs8(key.to_vec().into());
        let client = Some((certificate.clone(), key));
        let mut socket = proxy::connect_as(node.address, client).await.ok()?;
        let request = b"GET /pods HTTP/1.1\r\nHost: n1\r\nConnection: close\r\n\r\n";
        socket.write_all(request).await.ok()?;
        let mut answer = [0; 12];
        socket.read_exact(&mut answer).await.ok()?;
        Some(String::from_utf8_lossy(&answer[9..]).into_owned())
    };
    assert_eq!(status(&old, &old_key).await.as_deref(), Some("200"));
    assert_eq!(status(&new, &new_key).await, None);
    std::fs::write(&file, new_ca).unwrap();
    node.certificates.refresh();
    assert_eq!(status(&old, &old_key).await, None);
    assert_eq!(status(&new, &new_key).await.as_deref(), Some("200"));
}
