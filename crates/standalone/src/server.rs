//! The network side: TLS, who asks, and a thin shell of HTTP over the registry.

pub(crate) mod body;
mod discovery;
mod events;
mod kubelet;
mod openapi;
mod protobuf;
pub(crate) mod rest;
mod review;
pub(crate) mod route;
pub(crate) mod table;
mod watching;

use std::convert::Infallible;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use keelson_listener::{Connection, Limits, Listener, Slot};
use rustls_pki_types::CertificateDer;
use tokio::sync::{Notify, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::authorise::{self, Attributes};
use crate::auth::token::Tokens;
use crate::auth::{Identity, pki};
use crate::error::ApiError;
use crate::registry::Registry;
use route::Route;

pub(crate) use body::status_response;

/// Connections of unknown callers, and of known ones.
const CONNECTIONS: Limits = Limits { pending: 512, pending_of_peer: 256, established: 4096 };
const HANDSHAKE: Duration = Duration::from_secs(10);
/// The time until a request of a known caller.
const UNKNOWN: Duration = Duration::from_secs(30);
/// Requests at once on one HTTP/2 connection, as kube-apiserver has it.
const STREAMS: u32 = 250;
/// Bytes of headers of one request.
const HEADERS: u32 = 64 << 10;
/// A client that vanished is noticed by its missing answer to a ping.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_ANSWER: Duration = Duration::from_secs(15);
/// Requests that are worked on at once, as kube-apiserver's --max-requests-inflight and
/// --max-mutating-requests-inflight.
const READS: usize = 400;
const WRITES: usize = 200;
const READING: [&http::Method; 3] =
    [&http::Method::GET, &http::Method::HEAD, &http::Method::OPTIONS];

pub(crate) type Body = UnsyncBoxBody<bytes::Bytes, Infallible>;
pub(crate) type Reply = Response<Body>;

/// What every request needs.
pub(crate) struct Server {
    pub(crate) registry: Registry,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) kubelets: kubelet::Kubelets,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
    reading: Semaphore,
    writing: Semaphore,
}

/// Whose connection a request came by.
#[derive(Clone)]
struct Caller {
    /// From a client certificate.
    peer: Option<Identity>,
    slot: Slot,
    known: Arc<Notify>,
}

impl Server {
    pub(crate) fn new(
        registry: Registry,
        tokens: Arc<Tokens>,
        authority: &pki::Authority,
        stop: CancellationToken,
        tasks: TaskTracker,
    ) -> anyhow::Result<Self> {
        let kubelets = kubelet::Kubelets::new(authority)?;
        let (reading, writing) = (Semaphore::new(READS), Semaphore::new(WRITES));
        Ok(Self { registry, tokens, kubelets, stop, tasks, reading, writing })
    }

    /// Serves on one listener until the stop signal.
    pub(crate) async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        tls: Arc<rustls::ServerConfig>,
    ) -> anyhow::Result<()> {
        listener.set_nonblocking(true)?;
        let socket = tokio::net::TcpListener::from_std(listener)?;
        let listener = Listener::new("API", socket, CONNECTIONS);
        let acceptor = TlsAcceptor::from(tls);
        while let Some(accepted) = self.stop.run_until_cancelled(listener.accept()).await {
            let (server, acceptor) = (Arc::clone(&self), acceptor.clone());
            self.tasks.spawn(async move {
                let slot = accepted.slot.clone();
                let work = server.connection(accepted, acceptor);
                // A panic is counted and logged already; an evicted connection just ends.
                drop(slot.run(keelson_supervise::caught("API connection", work)).await);
            });
        }
        Ok(())
    }

    async fn connection(self: Arc<Self>, accepted: Connection, acceptor: TlsAcceptor) {
        let Connection { stream, slot, .. } = accepted;
        let handshake = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream));
        let stream = match handshake.await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
            Err(_) => return,
        };
        let peer = certified(stream.get_ref().1.peer_certificates());
        // Watches and logs are read as slowly as their reader likes; pings and keep-alive notice one that vanished.
        keelson_listener::allow_slow_reader(stream.get_ref().0);
        let stop = self.stop.clone();
        let known = Arc::new(Notify::new());
        let unknown_for_long = unknown_for_long(known.clone());
        let caller = Caller { peer, slot, known };
        let service = service_fn(move |request| {
            let (server, caller) = (Arc::clone(&self), caller.clone());
            async move { Ok::<_, Infallible>(server.answer(request, &caller).await) }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new());
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(HEADERS)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_ANSWER);
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let finished = tokio::select! {
            finished = connection.as_mut() => finished,
            () = unknown_for_long => return,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = finished {
            tracing::debug!(error, "Connection ended");
        }
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>, caller: &Caller) -> Reply {
        match keelson_supervise::caught("API request", self.handle(request, caller)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => status_response(&error),
            // The panic's text may tell more of the process than a caller should know.
            Err(_) => status_response(&ApiError::internal("internal error, see the server's log")),
        }
    }

    async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        caller: &Caller,
    ) -> Result<Reply, ApiError> {
        let identity = self.identify(&request, caller.peer.clone())?;
        // To answer as somebody else and do it as the caller would be wrong either way.
        if request.headers().keys().any(|name| name.as_str().starts_with("impersonate-")) {
            let text = format!("this server knows no impersonation: user \"{}\"", identity.user);
            return Err(ApiError::new(403, "Forbidden", text));
        }
        if !identity.is_anonymous() {
            caller.slot.establish().map_err(|full| too_many(&full.to_string()))?;
            caller.known.notify_one();
        }
        let path = request.uri().path().to_owned();
        let route = route::parse(&path);
        let verb = rest::verb(&request, &route);
        let wants = match &route {
            Route::Resource(r) => Attributes {
                verb,
                group: &r.group,
                resource: &r.resource,
                subresource: &r.subresource,
                namespace: &r.namespace,
                name: &r.name,
                path: &path,
            },
            Route::Other(path) => Attributes { verb, path, ..Attributes::default() },
        };
        if !authorise::allowed(&identity, &wants) {
            let text = authorise::refusal(&identity, &wants);
            return Err(if identity.is_anonymous() && !wants.resource.is_empty() {
                ApiError::new(401, "Unauthorized", "Unauthorized")
            } else {
                ApiError::new(403, "Forbidden", text)
            });
        }
        // Held until the answer begins: what streams after that, as watches do, does not count.
        let running =
            if READING.contains(&request.method()) { &self.reading } else { &self.writing };
        let _running = running.try_acquire().map_err(|_| too_many("too many requests at once"))?;
        match route {
            Route::Resource(resource) => rest::handle(&self, request, &resource, &identity).await,
            Route::Other(path) => self.other(&request, &path),
        }
    }

    fn identify(
        &self,
        request: &Request<Incoming>,
        peer: Option<Identity>,
    ) -> Result<Identity, ApiError> {
        if let Some(peer) = peer {
            return Ok(peer);
        }
        let header = request.headers().get(http::header::AUTHORIZATION);
        let Some(token) = header.and_then(|h| h.to_str().ok()).and_then(bearer_token) else {
            return Ok(Identity::anonymous());
        };
        let unauthorized = || ApiError::new(401, "Unauthorized", "Unauthorized");
        let (identity, audiences) =
            self.tokens.check(token.trim(), &self.registry).ok_or_else(unauthorized)?;
        let for_us = audiences.iter().any(|a| a == crate::auth::token::ISSUER);
        if for_us { Ok(identity) } else { Err(unauthorized()) }
    }

    fn other(&self, request: &Request<Incoming>, path: &str) -> Result<Reply, ApiError> {
        let accept = body::accept(request);
        match path.trim_end_matches('/') {
            "/version" => Ok(body::json(StatusCode::OK, &discovery::version())),
            "" => Ok(body::json(StatusCode::OK, &discovery::root())),
            health if is_health(health) => Ok(body::text(StatusCode::OK, "ok")),
            path if path.starts_with("/openapi") => openapi::document(path, accept),
            path => discovery::document(path, accept).ok_or_else(|| {
                ApiError::new(404, "NotFound", "the server could not find the requested resource")
            }),
        }
    }
}

/// A caller who stays unknown holds a connection for so long only. Never ends when the caller becomes known before.
async fn unknown_for_long(known: Arc<Notify>) {
    if tokio::time::timeout(UNKNOWN, known.notified()).await.is_ok() {
        std::future::pending().await
    }
}

/// The token of an Authorization header; the scheme's case does not matter (RFC 9110).
fn bearer_token(header: &str) -> Option<&str> {
    let (scheme, token) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

/// 429, as kube-apiserver answers when it has enough to do.
fn too_many(why: &str) -> ApiError {
    let mut error = ApiError::new(429, "TooManyRequests", why);
    error.details = serde_json::json!({"retryAfterSeconds": 1});
    error
}

fn is_health(path: &str) -> bool {
    ["/healthz", "/livez", "/readyz"].iter().any(|h| path.starts_with(h))
}

/// The identity in a client certificate that TLS has already verified.
fn certified(chain: Option<&[CertificateDer<'_>]>) -> Option<Identity> {
    let first = chain?.first()?;
    let (_, parsed) = x509_parser::parse_x509_certificate(first).ok()?;
    let subject = parsed.subject();
    let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject
        .iter_organization()
        .filter_map(|o| o.as_str().ok())
        .flat_map(|o| o.split(','))
        .map(str::to_owned)
        .collect();
    Some(Identity::authenticated(&user, groups))
}

/// TLS with optional client certificates of our CA.
pub(crate) fn tls(
    authority: &pki::Authority,
    leaf: &pki::Leaf,
) -> anyhow::Result<Arc<rustls::ServerConfig>> {
    use anyhow::Context as _;
    use rustls_pki_types::PrivateKeyDer;
    use rustls_pki_types::pem::PemObject as _;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.ca_pem.as_bytes())?)?;
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        Arc::clone(&provider),
    )
    .allow_unauthenticated()
    .build()
    .context("cannot check client certificates")?;
    let chain = CertificateDer::pem_slice_iter(leaf.certificate.as_bytes())
        .collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes())?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn boxed(bytes: impl Into<bytes::Bytes>) -> Body {
    http_body_util::Full::new(bytes.into()).boxed_unsync()
}
