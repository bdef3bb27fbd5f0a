//! Answers load balancers on the healthCheckNodePort of each Service: are there ready endpoints here?

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::{Response, StatusCode};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use keelson_listener::{Connection, Listener};
use keelson_supervise::{Panicked, caught};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::clock::Now;
use crate::engine::Progress;
use crate::events::{Notice, Notices};
use crate::model::{HealthCheck, ServiceKey};
use crate::server::{LIMITS, MAX_REQUEST};

/// How long a port that is taken waits for the next attempt.
const RETRY: Duration = Duration::from_secs(10);

const NAME: &str = "healthCheckNodePort";
/// Sockets are few, and other work needs them, too.
const MOST_SERVERS: usize = 4096;

/// What is to be answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    checks: HashMap<ServiceKey, HealthCheck>,
    /// The addresses to listen at.
    at: BTreeSet<IpAddr>,
}

/// The engine's side: says what is to be answered.
pub(crate) struct HealthChecks(watch::Sender<Wanted>);

impl HealthChecks {
    pub(crate) fn channel() -> (Self, watch::Receiver<Wanted>) {
        let (sender, receiver) = watch::channel(Wanted::default());
        (HealthChecks(sender), receiver)
    }

    /// Takes over the state of the Services that were looked at, and where to listen.
    pub(crate) fn update<'k>(
        &self,
        checks: impl Iterator<Item = (&'k ServiceKey, Option<HealthCheck>)>,
        at: BTreeSet<IpAddr>,
    ) {
        let mut differences: Vec<_> = {
            let now = self.0.borrow();
            checks.filter(|(service, check)| now.checks.get(service) != check.as_ref()).collect()
        };
        self.0.send_if_modified(|wanted| {
            let changed = !differences.is_empty() || wanted.at != at;
            wanted.at = at;
            for (service, check) in differences.drain(..) {
                match check {
                    Some(check) => wanted.checks.insert(service.clone(), check),
                    None => wanted.checks.remove(service),
                };
            }
            changed
        });
    }
}

/// What every answer depends on.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) progress: Arc<Progress>,
    /// A proxy with changes that wait for longer is not healthy.
    pub(crate) patience: Duration,
    pub(crate) notices: Notices,
}

/// A server at one address.
struct Server(JoinHandle<Result<(), Panicked>>);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Keeps the servers of each Service, for ever: where node ports are, also when that changes.
pub(crate) async fn serve(mut wanted: watch::Receiver<Wanted>, context: Context) {
    let mut servers: HashMap<(ServiceKey, SocketAddr), Server> = HashMap::new();
    loop {
        let places = places(&wanted.borrow_and_update());
        servers.retain(|place, _| places.contains(place));
        if places.len() > MOST_SERVERS {
            let count = places.len();
            tracing::warn!(count, most = MOST_SERVERS, "Not every healthCheckNodePort is served");
        }
        for (service, at) in places {
            if servers.len() >= MOST_SERVERS {
                break;
            }
            servers.entry((service.clone(), at)).or_insert_with(|| {
                let task = answer_at(at, service, wanted.clone(), context.clone());
                Server(keelson_supervise::spawn(NAME, task))
            });
        }
        if wanted.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Who listens where.
fn places(wanted: &Wanted) -> HashSet<(ServiceKey, SocketAddr)> {
    let services = wanted.checks.iter();
    let places = services.flat_map(|(service, check)| {
        let at = |address: &IpAddr| (service.clone(), SocketAddr::new(*address, check.port));
        wanted.at.iter().map(at)
    });
    places.collect()
}

async fn answer_at(
    at: SocketAddr,
    service: ServiceKey,
    wanted: watch::Receiver<Wanted>,
    context: Context,
) {
    let socket = loop {
        match bind(at) {
            Ok(listener) => break listener,
            // A kernel without IPv6.
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return,
            Err(error) => {
                tracing::warn!(%service, %at, %error, "Cannot serve the healthCheckNodePort, retrying");
                let note = format!("cannot listen on healthCheckNodePort {at}: {error}");
                context.notices.send(Notice::about(&service, "HealthCheckPortTaken", note));
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    let listener = Listener::new(NAME, socket, LIMITS);
    let mut connections = JoinSet::new();
    loop {
        let Connection { stream, slot, .. } = listener.accept().await;
        while connections.try_join_next().is_some() {}
        let (service, wanted, context) = (service.clone(), wanted.clone(), context.clone());
        connections.spawn(caught(NAME, async move {
            let ended = slot.run(converse(stream, &service, &wanted, &context)).await;
            if let Some(Err(error)) = ended {
                tracing::debug!(%service, %error, "A health check ended early");
            }
        }));
    }
}

fn bind(at: SocketAddr) -> std::io::Result<TcpListener> {
    const BACKLOG: u32 = 128;
    let socket = if at.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    if at.is_ipv6() {
        // IPv4 has a server of its own.
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

async fn converse(
    stream: TcpStream,
    service: &ServiceKey,
    wanted: &watch::Receiver<Wanted>,
    context: &Context,
) -> anyhow::Result<()> {
    let asked = stream.local_addr()?.ip().to_canonical();
    let respond = service_fn(|_request| {
        let healthy = context.progress.get().is_healthy(context.patience, Now::read());
        let check = wanted.borrow().checks.get(service).copied();
        async move { response(service, check, asked, healthy) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(10))
        .max_buf_size(MAX_REQUEST)
        .serve_connection(TokioIo::new(stream), respond);
    Ok(connection.await?)
}

/// Body, headers and codes are kube-proxy's: load balancers read them.
fn response(
    service: &ServiceKey,
    check: Option<HealthCheck>,
    asked: IpAddr,
    healthy: bool,
) -> http::Result<Response<Full<Bytes>>> {
    let count = check.map_or(0, |check| check.ready_here[usize::from(asked.is_ipv6())]);
    let status = match count {
        1.. if healthy => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    let (namespace, name) = service.parts();
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\t\
         \"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
    );
    Response::builder()
        .status(status)
        .header(http::header::CONTENT_TYPE, "application/json")
        .header("X-Content-Type-Options", "nosniff")
        .header("X-Load-Balancing-Endpoint-Weight", count.to_string())
        .body(Full::new(Bytes::from(body)))
}
