//! The standard gRPC health check, in the few bytes that it takes.

use std::net::IpAddr;

use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

/// `grpc.health.v1.HealthCheckResponse.SERVING`.
const SERVING: u8 = 1;

/// An answer has seven bytes. What comes beyond this is not read: a pod could send without end.
const ANSWER: usize = 4 << 10;
const WINDOW: u32 = 64 << 10;
const HEADERS: u32 = 16 << 10;

/// Asks `grpc.health.v1.Health/Check`.
///
/// # Errors
/// In words, when the answer is anything but SERVING.
pub(super) async fn check(ip: IpAddr, port: u16, service: &str) -> Result<(), String> {
    let stream =
        TcpStream::connect((ip, port)).await.map_err(|e| format!("dial tcp {ip}:{port}: {e}"))?;
    let io = TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_header_list_size(HEADERS)
        .handshake(io)
        .await
        .map_err(|e| e.to_string())?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::trace!(%error, "Probe connection ended");
        }
    });
    let request = Request::post(format!("http://{ip}:{port}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "kube-probe/1.36")
        .body(Full::new(Bytes::from(message(service))))
        .map_err(|e| e.to_string())?;
    let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
    let body = Limited::new(response.into_body(), ANSWER).collect();
    let body = body.await.map_err(|e| format!("the answer is no health check: {e}"))?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    let code = trailers.get("grpc-status").and_then(|c| c.to_str().ok()).unwrap_or("0").to_owned();
    if code != "0" {
        return Err(format!("health rpc probe failed with gRPC status {code}"));
    }
    match status(&body.to_bytes()) {
        SERVING => Ok(()),
        other => Err(format!("service unhealthy (responded with status {other})")),
    }
}

/// Length-prefixed `HealthCheckRequest { service }`.
pub(crate) fn message(service: &str) -> Vec<u8> {
    // Service names are far below 128 bytes; longer ones would need a two-byte length.
    let name = &service.as_bytes()[..service.len().min(127)];
    let mut proto = Vec::new();
    if !name.is_empty() {
        proto.extend([0x0a, u8::try_from(name.len()).unwrap_or(0)]);
        proto.extend(name);
    }
    let length = u32::try_from(proto.len()).unwrap_or(0).to_be_bytes();
    let mut framed = vec![0];
    framed.extend(length);
    framed.extend(proto);
    framed
}

/// The `status` field of a length-prefixed `HealthCheckResponse`; absent means 0, UNKNOWN.
pub(crate) fn status(framed: &[u8]) -> u8 {
    match framed.get(5..) {
        Some([0x08, status, ..]) => *status,
        _ => 0,
    }
}
