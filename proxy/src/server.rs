//! The two small HTTP servers: health and metrics.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use crate::backend::Mode;
use crate::clock::Now;
use crate::engine::Progress;
use crate::metrics::Metrics;

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
            "/metrics" => (StatusCode::OK, OPEN_METRICS, self.metrics.text()),
            "/proxyMode" => (StatusCode::OK, TEXT, self.mode.kube_name().to_owned()),
            "/configz" => (StatusCode::OK, JSON, self.config_text.clone()),
            "/healthz" => (StatusCode::OK, TEXT, "ok".to_owned()),
            _ => NOT_FOUND,
        }
    }
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
