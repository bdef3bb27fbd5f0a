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

use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls_pki_types::CertificateDer;
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

pub(crate) type Body = UnsyncBoxBody<bytes::Bytes, Infallible>;
pub(crate) type Reply = Response<Body>;

/// What every request needs.
pub(crate) struct Server {
    pub(crate) registry: Registry,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) kubelets: kubelet::Kubelets,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
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
        Ok(Self { registry, tokens, kubelets, stop, tasks })
    }

    /// Serves on one listener until the stop signal.
    pub(crate) async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        tls: Arc<rustls::ServerConfig>,
    ) -> anyhow::Result<()> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let acceptor = TlsAcceptor::from(tls);
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (server, acceptor) = (Arc::clone(&self), acceptor.clone());
                    self.tasks.spawn(async move { server.connection(stream, acceptor).await });
                }
                // Out of file descriptors, mostly: others finish meanwhile.
                Err(error) => {
                    tracing::warn!(%error, "Cannot accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: tokio::net::TcpStream, acceptor: TlsAcceptor) {
        drop(stream.set_nodelay(true));
        let handshake =
            tokio::time::timeout(std::time::Duration::from_secs(10), acceptor.accept(stream));
        let stream = match handshake.await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
            Err(_) => return,
        };
        let peer = certified(stream.get_ref().1.peer_certificates());
        let stop = self.stop.clone();
        let service = service_fn(move |request| {
            let (server, peer) = (Arc::clone(&self), peer.clone());
            async move { Ok::<_, Infallible>(server.answer(request, peer).await) }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new());
        builder.http2().timer(TokioTimer::new()).max_concurrent_streams(1000);
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let finished = tokio::select! {
            finished = connection.as_mut() => finished,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = finished {
            tracing::debug!(error, "Connection ended");
        }
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>, peer: Option<Identity>) -> Reply {
        match keelson_supervise::caught("API request", self.handle(request, peer)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => status_response(&error),
            // The panic's text may tell more of the process than a caller should know.
            Err(_) => status_response(&ApiError::internal("internal error, see the server's log")),
        }
    }

    async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: Option<Identity>,
    ) -> Result<Reply, ApiError> {
        let identity = self.identify(&request, peer)?;
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
        let Some(token) =
            header.and_then(|h| h.to_str().ok()).and_then(|h| h.strip_prefix("Bearer "))
        else {
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
