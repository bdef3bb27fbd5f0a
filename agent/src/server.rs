//! The kubelet's HTTPS API: what the API server, metrics collectors and administrators ask a node.
//!
//! A request passes [`tls`] and [`auth`], then [`routes`] finds its handler. Logs, exec, attach and port-forward are
//! served by modules that know nothing of HTTP: [`logs`], [`exec`] and [`attach`] over [`remote`] streams,
//! [`port_forward`]; their protocols are the pure state machines below [`spdy`] and [`websocket`].
//! What runs on the node is seen only through [`containers::Containers`].
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::string_slice))]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use keelson_listener::{Connection, Limits, Listener};
use keelson_supervise::{caught, restarting};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

pub mod attach;
pub mod auth;
pub mod containers;
pub mod exec;
pub mod find;
pub mod inbox;
pub mod logs;
pub mod metrics;
pub mod peer;
pub mod port_forward;
pub mod query;
pub mod remote;
pub mod routes;
pub mod spdy;
pub mod stats;
pub mod tls;
pub mod websocket;

use peer::{Peer, Socket};
use routes::{Caller, Routes};
use tls::Certificates;

/// A client that does not finish its TLS handshake holds a connection no longer than this.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// A client whose first request is not there by then is ended.
const FIRST_REQUEST_LIMIT: Duration = Duration::from_secs(15);
/// How long a connection may wait for its next request, and how long a request's headers may take.
const KEEP_ALIVE: Duration = Duration::from_secs(90);
/// What is read of a request before it is answered, give or take one read: a command to run is part of the address.
const MAX_HEAD: usize = 1 << 20;
/// The same for callers that only say who they are in the request itself.
const MAX_HEAD_OF_UNKNOWN: usize = 64 * 1024;

/// Connections that wait to be accepted; the kernel takes it for less where `net.core.somaxconn` is lower.
const BACKLOG: u32 = 4096;

/// Connections of the HTTPS API.
const LIMITS: Limits = Limits { pending: 1024, pending_of_peer: 256, established: 1024 };
/// Connections of the health checks, all of which are of unknown callers.
const HEALTHZ_LIMITS: Limits = Limits { pending: 256, pending_of_peer: 64, established: 0 };

/// Opens the port of the HTTPS API.
///
/// # Errors
/// When the address cannot be bound.
pub async fn bind(address: IpAddr, port: u16) -> anyhow::Result<TcpListener> {
    let listener = match listen(SocketAddr::new(address, port)) {
        // A kernel without IPv6 has no "every address" of both families.
        Err(_) if address.is_unspecified() && address.is_ipv6() => {
            listen((Ipv4Addr::UNSPECIFIED, port).into())
        }
        other => other,
    };
    listener.with_context(|| {
        format!("cannot listen on {address} port {port}; hint: is another kubelet running here?")
    })
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    // A caller that finds the queue full waits for a second: a crowd must not fill it at once.
    socket.listen(BACKLOG)
}

/// Serves HTTPS on `listener` until `cancel`; connections that are open then are closed.
pub async fn serve(
    listener: TcpListener,
    certificates: Arc<Certificates>,
    routes: Arc<Routes>,
    cancel: CancellationToken,
) {
    let listener = Listener::new("HTTPS API", listener, LIMITS);
    let reloading = restarting("certificates", || certificates.clone().keep_current());
    let reloading = cancel.run_until_cancelled(reloading);
    let serving = accept_for_ever(listener, cancel.clone(), |socket, peer| {
        let (acceptor, routes) = (TlsAcceptor::from(certificates.current()), routes.clone());
        async move {
            let handshake = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(socket)).await;
            let socket = match handshake {
                Ok(Ok(socket)) => socket,
                Ok(Err(error)) => {
                    return debug!(peer = %peer.address, %error, "TLS handshake failed");
                }
                Err(_) => return debug!(peer = %peer.address, "TLS handshake took too long"),
            };
            let (_, session) = socket.get_ref();
            let certificate = session.peer_certificates().and_then(<[_]>::first);
            let certificate = certificate.map(|der| der.to_vec());
            let max_head = if certificate.is_some() { MAX_HEAD } else { MAX_HEAD_OF_UNKNOWN };
            let caller = Caller::Remote { certificate, peer };
            // In a box: those that never get here, the silent ones, are small.
            Box::pin(serve_connection(socket, caller, max_head, routes)).await;
        }
    });
    tokio::join!(serving, reloading);
}

/// Serves `/healthz` without TLS on `listener` until `cancel`.
pub async fn serve_healthz(listener: TcpListener, routes: Arc<Routes>, cancel: CancellationToken) {
    let listener = Listener::new("health checks", listener, HEALTHZ_LIMITS);
    accept_for_ever(listener, cancel, move |socket, _| {
        serve_connection(socket, Caller::Healthz, MAX_HEAD_OF_UNKNOWN, routes.clone())
    })
    .await;
}

async fn accept_for_ever<F, H>(listener: Listener, cancel: CancellationToken, handle: H)
where
    F: Future<Output = ()> + Send + 'static,
    H: Fn(Socket, Peer) -> F,
{
    let connections = TaskTracker::new();
    let accept = async {
        loop {
            let Connection { stream, peer, slot } = listener.accept().await;
            let (peer, socket) = Peer::new(stream, peer.ip(), slot.clone());
            // In a box: what wraps a future holds it twice.
            let work = caught("connection", Box::pin(handle(socket, peer)));
            let cancel = cancel.clone();
            connections.spawn(async move {
                cancel.run_until_cancelled(slot.run(work)).await;
            });
        }
    };
    cancel.run_until_cancelled(accept).await;
    connections.close();
    connections.wait().await;
}

async fn serve_connection<S>(socket: S, caller: Caller, max_head: usize, routes: Arc<Routes>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let caller = Arc::new(caller);
    let asked = CancellationToken::new();
    let first = asked.clone();
    let service = service_fn(move |request| {
        first.cancel();
        let (routes, caller) = (routes.clone(), caller.clone());
        async move { Ok::<_, std::convert::Infallible>(routes.answer(&caller, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(KEEP_ALIVE)
        .max_buf_size(max_head)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    let late = async {
        if tokio::time::timeout(FIRST_REQUEST_LIMIT, asked.cancelled()).await.is_ok() {
            std::future::pending().await
        }
    };
    tokio::select! {
        ended = connection => if let Err(error) = ended {
            debug!(%error, "HTTP connection ended");
        },
        () = late => debug!("Client connected and asked for nothing"),
    }
}
