//! The kubelet's HTTPS API: what the API server, metrics collectors and administrators ask a node.
//!
//! A request passes [`tls`] and [`auth`], then [`routes`] finds its handler. Logs, exec, attach and port-forward are
//! served by modules that know nothing of HTTP: [`logs`], [`exec`] and [`attach`] over [`remote`] streams,
//! [`port_forward`]; their protocols are the pure state machines below [`spdy`] and [`websocket`].
//! What runs on the node is seen only through [`containers::Containers`].

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

pub mod attach;
pub mod auth;
pub mod containers;
pub mod exec;
pub mod find;
pub mod logs;
pub mod metrics;
pub mod port_forward;
pub mod query;
pub mod remote;
pub mod routes;
pub mod spdy;
pub mod stats;
pub mod tls;
pub mod websocket;

use routes::{Caller, Routes};

/// A client that says nothing holds a connection no longer than this.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may wait for its next request.
const KEEP_ALIVE: Duration = Duration::from_secs(90);

/// Opens the port of the HTTPS API.
///
/// # Errors
/// When the address cannot be bound.
pub async fn bind(address: IpAddr, port: u16) -> anyhow::Result<TcpListener> {
    let result = TcpListener::bind(SocketAddr::new(address, port)).await;
    let listener = match result {
        // A kernel without IPv6 has no "every address" of both families.
        Err(_) if address.is_unspecified() && address.is_ipv6() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
        }
        other => other,
    };
    listener.with_context(|| {
        format!("cannot listen on {address} port {port}; hint: is another kubelet running here?")
    })
}

/// Serves HTTPS on `listener` until `cancel`; connections that are open then are closed.
pub async fn serve(
    listener: TcpListener,
    tls: rustls::ServerConfig,
    routes: Arc<Routes>,
    cancel: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    accept_for_ever(listener, cancel, move |socket, peer| {
        let (acceptor, routes) = (acceptor.clone(), routes.clone());
        async move {
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(socket)).await;
            let socket = match handshake {
                Ok(Ok(socket)) => socket,
                Ok(Err(error)) => return debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => return debug!(%peer, "TLS handshake took too long"),
            };
            let (_, session) = socket.get_ref();
            let certificate = session.peer_certificates().and_then(<[_]>::first);
            let caller = Caller::Remote { certificate: certificate.map(|der| der.to_vec()) };
            serve_connection(socket, caller, routes).await;
        }
    })
    .await;
}

/// Serves `/healthz` without TLS on `listener` until `cancel`.
pub async fn serve_healthz(listener: TcpListener, routes: Arc<Routes>, cancel: CancellationToken) {
    accept_for_ever(listener, cancel, move |socket, _| {
        serve_connection(socket, Caller::Healthz, routes.clone())
    })
    .await;
}

async fn accept_for_ever<F, H>(listener: TcpListener, cancel: CancellationToken, handle: H)
where
    F: Future<Output = ()> + Send + 'static,
    H: Fn(tokio::net::TcpStream, SocketAddr) -> F,
{
    let connections = TaskTracker::new();
    let accept = async {
        loop {
            match listener.accept().await {
                Ok((socket, peer)) => {
                    // Small answers must not wait for more.
                    drop(socket.set_nodelay(true));
                    let work = handle(socket, peer);
                    let cancel = cancel.clone();
                    connections.spawn(async move {
                        cancel.run_until_cancelled(work).await;
                    });
                }
                Err(error) => {
                    // Out of file descriptors, most likely: the next try is no use right away.
                    warn!(%error, "Cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    cancel.run_until_cancelled(accept).await;
    connections.close();
    connections.wait().await;
}

async fn serve_connection<S>(socket: S, caller: Caller, routes: Arc<Routes>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let caller = Arc::new(caller);
    let service = service_fn(move |request| {
        let (routes, caller) = (routes.clone(), caller.clone());
        async move { Ok::<_, std::convert::Infallible>(routes.answer(&caller, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(KEEP_ALIVE)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        debug!(%error, "HTTP connection ended");
    }
}
