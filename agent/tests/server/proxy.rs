//! The part of an API server that kubectl needs for one pod: discovery, the pod, and requests to
//! its node passed on byte by byte, upgrades included.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;

pub async fn serve(listener: TcpListener, kubelet: SocketAddr) {
    while let Ok((socket, _)) = listener.accept().await {
        tokio::spawn(async move {
            if let Err(error) = answer(socket, kubelet).await {
                eprintln!("stand-in API server: {error}");
            }
        });
    }
}

async fn answer(mut socket: TcpStream, kubelet: SocketAddr) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await?);
    }
    let head = String::from_utf8(head).unwrap();
    let (line, headers) = head.split_once("\r\n").unwrap();
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if let Some(path) = kubelet_path(path, query) {
        let mut upstream = connect(kubelet).await?;
        upstream.write_all(format!("{method} {path} HTTP/1.1\r\n{headers}").as_bytes()).await?;
        upstream.flush().await?;
        if path.starts_with("/containerLogs/") {
            return pass_log(socket, upstream).await;
        }
        // Either side may be gone first.
        drop(copy_bidirectional(&mut socket, &mut upstream).await);
        return Ok(());
    }
    let (status, body) = match object(path) {
        Some(body) => ("200 OK", body),
        None => ("404 Not Found", json!({"kind": "Status", "status": "Failure", "code": 404})),
    };
    send_object(socket, status, &body).await
}

/// An API server turns a node's refusal into a Status object, and passes a log on as it is.
async fn pass_log(
    mut socket: TcpStream,
    mut upstream: impl AsyncRead + AsyncWrite + Unpin,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(upstream.read_u8().await?);
    }
    let text = String::from_utf8(head.clone()).unwrap();
    if text.starts_with("HTTP/1.1 200") {
        socket.write_all(&head).await?;
        drop(copy_bidirectional(&mut socket, &mut upstream).await);
        return Ok(());
    }
    let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    upstream.read_exact(&mut body).await?;
    let message = String::from_utf8(body).unwrap();
    let code: u16 = text[9..12].parse().unwrap();
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "message": message, "code": code});
    send_object(socket, &text[9..12], &status).await
}

async fn send_object(mut socket: TcpStream, status: &str, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(answer.as_bytes()).await?;
    socket.shutdown().await
}

/// The node's path for a subresource of the pod, with the query in the node's words.
fn kubelet_path(path: &str, query: &str) -> Option<String> {
    let subresource = path.strip_prefix("/api/v1/namespaces/default/pods/web/")?;
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let container =
        pairs.clone().find_map(|pair| pair.strip_prefix("container=")).unwrap_or("main");
    let query: Vec<String> = pairs
        .filter(|pair| !pair.starts_with("container="))
        .map(|pair| match pair.split_once('=') {
            Some(("stdin", _)) => "input=1".to_owned(),
            Some(("stdout", _)) => "output=1".to_owned(),
            Some(("stderr", _)) => "error=1".to_owned(),
            Some(("tty", _)) => "tty=1".to_owned(),
            _ => pair.to_owned(),
        })
        .collect();
    let query = query.join("&");
    Some(match subresource {
        "log" => format!("/containerLogs/default/web/{container}?{query}"),
        "exec" => format!("/exec/default/web/{container}?{query}"),
        "attach" => format!("/attach/default/web/{container}?{query}"),
        "portforward" => format!("/portForward/default/web?{query}"),
        _ => return None,
    })
}

fn object(path: &str) -> Option<Value> {
    Some(match path {
        "/api" => json!({"kind": "APIVersions", "versions": ["v1"]}),
        "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []}),
        "/api/v1" => json!({
            "kind": "APIResourceList",
            "groupVersion": "v1",
            "resources": [{"name": "pods", "singularName": "pod", "namespaced": true, "kind": "Pod",
                "verbs": ["get", "list"], "shortNames": ["po"]}],
        }),
        "/api/v1/namespaces/default/pods/web" => {
            serde_json::to_value(super::fixture::pod()).unwrap()
        }
        _ => return None,
    })
}

/// A TLS connection that trusts whatever certificate the node made for itself, as API servers do.
pub async fn connect(kubelet: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
    connect_as(kubelet, None).await
}

/// The same with a client's certificate and its key.
pub async fn connect_as(
    kubelet: SocketAddr,
    client: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate));
    let config = match client {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => config.with_client_auth_cert(vec![certificate], key).unwrap(),
    };
    let name = rustls_pki_types::ServerName::try_from("n1").unwrap();
    let socket = TcpStream::connect(kubelet).await?;
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await
}

#[derive(Debug)]
struct AnyCertificate;

mod verify {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};
    use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

    impl ServerCertVerifier for super::AnyCertificate {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            rustls::crypto::ring::default_provider()
                .signature_verification_algorithms
                .supported_schemes()
        }
    }
}
