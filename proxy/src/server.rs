//! The two small HTTP servers: health and metrics.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use crate::backend::{Counting, Mode, Names};
use crate::clock::Now;
use crate::engine::Progress;
use crate::metrics::{Metrics, traffic};
use crate::switch::with_sources;

/// How long a bind that failed waits for the next attempt.
const RETRY: Duration = Duration::from_secs(5);

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
            "/livez" => alive || !state.synced,
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
            "/metrics" => (StatusCode::OK, OPEN_METRICS, self.metrics.text(&self.traffic())),
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

/// What numbers and addresses in the kernel stand for.
fn names(names: &Names) -> serde_json::Value {
    let ports = names.ports.iter().map(|(number, name)| (number.to_string(), name));
    let addresses = names.addresses.iter().map(|(address, name)| (address.to_string(), name));
    serde_json::json!({
        "ports": ports.collect::<HashMap<_, _>>(),
        "addresses": addresses.collect::<HashMap<_, _>>(),
    })
}

/// Asks the server of a running proxy; nothing when none answers. Blocks.
pub(crate) fn ask(address: SocketAddr, path: &str) -> Option<String> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.starts_with("HTTP/1.1 200").then(|| body.to_owned())
}

/// Serves for ever; keeps trying when the address is taken.
pub(crate) async fn serve(
    name: &'static str,
    address: Option<SocketAddr>,
    answer: impl Fn(&str) -> Answer + Clone + Send + 'static,
) {
    let Some(address) = address else { return std::future::pending().await };
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                tracing::warn!(server = name, %address, %error, "Cannot listen, retrying");
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(server = name, %error, "Cannot accept a connection");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let answer = answer.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let (status, kind, text) = answer(request.uri().path());
            let mut response = Response::new(Full::new(Bytes::from(text)));
            *response.status_mut() = status;
            let kind = http::HeaderValue::from_static(kind);
            response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
            async move { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs(10))
            .serve_connection(TokioIo::new(stream), service);
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(server = name, %error, "A connection ended early");
            }
        });
    }
}
