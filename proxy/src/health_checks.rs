//! Answers load balancers on the healthCheckNodePort of each Service: are there ready endpoints here?

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::{Response, StatusCode};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::clock::Now;
use crate::engine::Progress;
use crate::events::{Notice, Notices};
use crate::model::{HealthCheck, ServiceKey};

/// How long a port that is taken waits for the next attempt.
const RETRY: Duration = Duration::from_secs(10);

/// What is to be answered, by Service.
type Wanted = HashMap<ServiceKey, HealthCheck>;

/// The engine's side: says what is to be answered.
pub(crate) struct HealthChecks(watch::Sender<Wanted>);

impl HealthChecks {
    pub(crate) fn channel() -> (Self, watch::Receiver<Wanted>) {
        let (sender, receiver) = watch::channel(Wanted::new());
        (HealthChecks(sender), receiver)
    }

    /// Takes over the state of the Services that were looked at.
    pub(crate) fn update<'k>(
        &self,
        checks: impl Iterator<Item = (&'k ServiceKey, Option<HealthCheck>)>,
    ) {
        let mut differences: Vec<_> = {
            let now = self.0.borrow();
            checks.filter(|(service, check)| now.get(service) != check.as_ref()).collect()
        };
        if differences.is_empty() {
            return;
        }
        self.0.send_modify(|wanted| {
            for (service, check) in differences.drain(..) {
                match check {
                    Some(check) => wanted.insert(service.clone(), check),
                    None => wanted.remove(service),
                };
            }
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

/// A server on one port.
struct Server {
    port: u16,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Keeps one server per Service, for ever.
pub(crate) async fn serve(mut wanted: watch::Receiver<Wanted>, context: Context) {
    let mut servers: HashMap<ServiceKey, Server> = HashMap::new();
    loop {
        let ports: HashMap<ServiceKey, u16> = wanted
            .borrow_and_update()
            .iter()
            .map(|(service, check)| (service.clone(), check.port))
            .collect();
        servers.retain(|service, server| ports.get(service) == Some(&server.port));
        for (service, port) in ports {
            servers.entry(service.clone()).or_insert_with(|| {
                let task = answer_on(port, service, wanted.clone(), context.clone());
                Server { port, task: tokio::spawn(task) }
            });
        }
        if wanted.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

async fn answer_on(
    port: u16,
    service: ServiceKey,
    wanted: watch::Receiver<Wanted>,
    context: Context,
) {
    let listener = loop {
        match bind(port).await {
            Ok(listener) => break listener,
            Err(error) => {
                tracing::warn!(%service, port, %error, "Cannot serve the healthCheckNodePort, retrying");
                let note = format!("cannot listen on healthCheckNodePort {port}: {error}");
                context.notices.send(Notice::about(&service, "HealthCheckPortTaken", note));
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    let mut connections = JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%service, port, %error, "Cannot accept a health check");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let (service, wanted, context) = (service.clone(), wanted.clone(), context.clone());
        connections.spawn(async move {
            let ended = converse(stream, &service, &wanted, &context).await;
            if let Err(error) = ended {
                tracing::debug!(%service, %error, "A health check ended early");
            }
        });
    }
}

/// All addresses of both families, or of IPv4 where there is no IPv6.
async fn bind(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)).await {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            TcpListener::bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)).await
        }
        bound => bound,
    }
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
        let check = wanted.borrow().get(service).copied();
        async move { response(service, check, asked, healthy) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(10))
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
