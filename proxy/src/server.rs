//! The two small HTTP servers: health and metrics.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use keelson_listener::{Connection, Limits, Listener};
use keelson_supervise::{catch, caught};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::backend::{Counting, Mode, Names};
use crate::clock::Now;
use crate::engine::Progress;
use crate::metrics::{Metrics, traffic};
use crate::switch::with_sources;

/// How long a bind that failed waits for the next attempt.
const RETRY: Duration = Duration::from_secs(5);

/// Anybody may ask, so no caller is ever known: silent connections give way to newer ones.
pub(crate) const LIMITS: Limits = Limits { pending: 256, pending_of_peer: 32, established: 0 };
/// No request line and headers are longer.
pub(crate) const MAX_REQUEST: usize = 16 << 10;

/// An answer: status, content type, text.
pub(crate) type Answer = (StatusCode, &'static str, String);

/// What the servers show.
pub(crate) struct Pages {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) mode: Mode,
    pub(crate) sync_period: Duration,
    pub(crate) config_text: String,
    pub(crate) counting: Option<Arc<dyn Counting>>,
    /// So many Service ports are shown with their traffic.
    pub(crate) service_metrics: usize,
}

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const NOT_FOUND: Answer = (StatusCode::NOT_FOUND, TEXT, String::new());

impl Pages {
    /// /healthz takes the node's eligibility into account, /livez does not.
    pub(crate) fn health(&self, path: &str, now: Now) -> Answer {
        let state = self.progress.get();
        let alive = state.is_healthy(2 * self.sync_period, now);
        let healthy = match path {
            "/healthz" => alive && !state.node_leaving,
            "/livez" => alive || (!state.synced && !state.is_stalled(now)),
            "/readyz" => alive,
            _ => return NOT_FOUND,
        };
        let stamp = |time: Option<SystemTime>| {
            let time = time.and_then(|time| jiff::Timestamp::try_from(time).ok());
            time.unwrap_or_default().to_string()
        };
        let text = serde_json::json!({
            "lastUpdated": stamp(state.last_update),
            "currentTime": stamp(Some(now.wall)),
            "nodeEligible": !state.node_leaving,
        });
        let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        self.metrics.asked_for_health(path, status.as_u16());
        (status, JSON, text.to_string())
    }

    pub(crate) fn metrics(&self, path: &str) -> Answer {
        const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        match path {
            "/metrics" => {
                (StatusCode::OK, OPEN_METRICS, self.metrics.text(&(panics() + &self.traffic())))
            }
            "/proxyMode" => (StatusCode::OK, TEXT, self.mode.kube_name().to_owned()),
            "/configz" => (StatusCode::OK, JSON, self.config_text.clone()),
            "/services" => match &self.counting {
                Some(counting) => (StatusCode::OK, JSON, names(&counting.names()).to_string()),
                None => NOT_FOUND,
            },
            "/healthz" => (StatusCode::OK, TEXT, "ok".to_owned()),
            _ => NOT_FOUND,
        }
    }

    /// What the kernel has counted until now.
    fn traffic(&self) -> String {
        let Some(counting) = &self.counting else { return String::new() };
        match counting.read() {
            Ok(counted) => traffic::text(counted, self.service_metrics),
            Err(error) => {
                tracing::warn!(error = with_sources(&error), "Cannot read counters of Services");
                String::new()
            }
        }
    }
}

/// What went wrong in this process without ending it.
fn panics() -> String {
    let mut text = "# HELP keelson_panics Panics, each of which ended one task.\n\
                    # TYPE keelson_panics counter\n"
        .to_owned();
    for (task, count) in keelson_supervise::panics() {
        text += &format!("keelson_panics_total{{task=\"{task}\"}} {count}\n");
    }
    text
}

/// What numbers and addresses in the kernel stand for.
fn names(names: &Names) -> serde_json::Value {
    let ports = names.ports.iter().map(|(number, name)| (number.to_string(), name));
    let addresses = names.addresses.iter().map(|(address, name)| (address.to_string(), name));
    serde_json::json!({
        "ports": ports.collect::<HashMap<_, _>>(),
        "addresses": addresses.collect::<HashMap<_, _>>(),
    })
}

/// Asks the server of a running proxy; nothing when none answers. Blocks. Another program may listen there: an answer
/// that is too long, or takes too long, is none.
pub(crate) fn ask(address: SocketAddr, path: &str) -> Option<String> {
    const PATIENCE: Duration = Duration::from_secs(5);
    const LONGEST: u64 = 64 << 20;
    let deadline = Instant::now() + PATIENCE;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    let mut part = vec![0; 64 << 10];
    loop {
        let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        stream.set_read_timeout(Some(left?)).ok()?;
        match stream.read(&mut part).ok()? {
            0 => break,
            length => answer.extend(part.get(..length)?),
        }
        if answer.len() as u64 > LONGEST {
            return None;
        }
    }
    let answer = String::from_utf8(answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.starts_with("HTTP/1.1 200").then(|| body.to_owned())
}

/// Serves for ever; keeps trying when the address is taken. An answer may block: it is made on a thread that may wait,
/// one at a time.
pub(crate) async fn serve(
    name: &'static str,
    address: Option<SocketAddr>,
    answer: impl Fn(&str) -> Answer + Send + Sync + 'static,
) {
    let Some(address) = address else { return std::future::pending().await };
    let socket = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                tracing::warn!(server = name, %address, %error, "Cannot listen, retrying");
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    serve_at(name, socket, answer).await
}

async fn serve_at(
    name: &'static str,
    socket: TcpListener,
    answer: impl Fn(&str) -> Answer + Send + Sync + 'static,
) {
    let listener = Listener::new(name, socket, LIMITS);
    let (answer, turn) = (Arc::new(answer), Arc::new(Semaphore::new(1)));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Connection { stream, slot, .. } = listener.accept().await;
        while connections.try_join_next().is_some() {}
        let (answer, turn) = (Arc::clone(&answer), Arc::clone(&turn));
        let service = service_fn(move |request: Request<Incoming>| {
            let (answer, turn) = (Arc::clone(&answer), Arc::clone(&turn));
            async move {
                let _turn = turn.acquire_owned().await?;
                let path = request.uri().path().to_owned();
                let made = tokio::task::spawn_blocking(move || catch(name, || answer(&path)));
                Ok::<_, anyhow::Error>(response(made.await??))
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs(10))
            .max_buf_size(MAX_REQUEST)
            .serve_connection(TokioIo::new(stream), service);
        connections.spawn(caught(name, async move {
            if let Some(Err(error)) = slot.run(connection).await {
                tracing::debug!(server = name, %error, "A connection ended early");
            }
        }));
    }
}

fn response((status, kind, text): Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let kind = http::HeaderValue::from_static(kind);
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn page(stream: &mut tokio::net::TcpStream) -> String {
        stream
            .write_all(b"GET /page HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn silent_connections_give_way_and_keep_nobody_out() {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let server = tokio::spawn(serve_at("test", socket, |path| {
            assert_eq!(path, "/page");
            (StatusCode::OK, TEXT, "fine".to_owned())
        }));
        let mut silent = Vec::new();
        for _ in 0..=LIMITS.pending_of_peer {
            silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
        }
        // The oldest was closed, the newest gets its answer.
        assert_eq!(silent.first_mut().unwrap().read(&mut [0; 1]).await.unwrap(), 0);
        assert!(page(silent.last_mut().unwrap()).await.ends_with("fine"));
        server.abort();
    }

    #[tokio::test]
    async fn a_panic_in_one_answer_is_that_of_one_request() {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let first = std::sync::atomic::AtomicBool::new(true);
        let server = tokio::spawn(serve_at("test-panic", socket, move |_| {
            assert!(!first.swap(false, std::sync::atomic::Ordering::Relaxed), "the first fails");
            (StatusCode::OK, TEXT, "fine".to_owned())
        }));
        for want in ["", "fine"] {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            assert!(page(&mut stream).await.ends_with(want));
        }
        assert_eq!(keelson_supervise::panics().iter().find(|p| p.0 == "test-panic").unwrap().1, 1);
        server.abort();
    }

    #[test]
    fn an_endless_answer_of_another_program_is_none() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let endless = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let head = b"HTTP/1.1 200 OK\r\n\r\n";
            let mut written = stream.write_all(head);
            while written.is_ok() {
                written = stream.write_all(&[b'x'; 65536]);
            }
        });
        assert_eq!(ask(address, "/services"), None);
        endless.join().unwrap();
    }
}
