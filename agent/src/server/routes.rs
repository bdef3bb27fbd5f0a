//! Which request goes where, and the short answers themselves.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use keelson_supervise::caught;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::auth::{Access, Identity, Origin};
use super::containers::{Containers, ExecRequest};
use super::find::{self, Refusal};
use super::logs::follow::{Logs, OpenError};
use super::metrics::Metrics;
use super::peer::Peer;
use super::remote::{self, Agreed, Transport};
use super::spdy::connection::{Connection, Terms};
use super::spdy::session::Role;
use super::{attach, exec, logs, port_forward, query, websocket};

/// An answer whose body may go on for as long as a container runs.
pub type Answer = Response<BoxBody<Bytes, io::Error>>;

/// Pieces of a log that wait for a slow client.
const LOG_QUEUE: usize = 2;
/// How long a request waits for a pod of which an agent that has just started may not know yet.
const START_PATIENCE: Duration = Duration::from_secs(5);

/// How a request came in.
pub enum Caller {
    /// Over HTTPS, perhaps with a certificate that was verified (DER).
    Remote { certificate: Option<Vec<u8>>, peer: Peer },
    /// On the port that has nothing but the health checks, without any check of the caller.
    Healthz,
}

/// Everything that answers need.
pub struct Routes {
    pub access: Access,
    pub containers: Arc<dyn Containers>,
    pub logs: Logs,
    pub settings: Settings,
    /// `None`, or why the agent does not work as it should.
    pub health: Box<dyn Fn() -> Option<String> + Send + Sync>,
    pub metrics: Metrics,
    /// Sessions that outlive their request.
    pub sessions: TaskTracker,
    /// Ends the sessions.
    pub cancel: CancellationToken,
}

/// What answers need of the configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    pub streaming_idle_timeout: Duration,
    pub debugging_handlers: bool,
    /// What `/configz` shows.
    pub configz: Value,
}

impl Routes {
    /// Answers one request.
    pub async fn answer(&self, caller: &Caller, request: Request<Incoming>) -> Answer {
        let started = Instant::now();
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let answer = match caught("HTTPS request", self.try_answer(caller, request)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(refusal)) => refused(refusal),
            Err(panicked) => text(StatusCode::INTERNAL_SERVER_ERROR, panicked.to_string()),
        };
        debug!(%method, path, status = answer.status().as_u16(), elapsed = ?started.elapsed(),
            "Request answered");
        answer
    }

    async fn try_answer(
        &self,
        caller: &Caller,
        request: Request<Incoming>,
    ) -> Result<Answer, Refusal> {
        let path = query::segments(request.uri().path());
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        let peer = match caller {
            Caller::Healthz => &Peer::none(),
            Caller::Remote { certificate, peer } => {
                let (uri, headers) = (request.uri().path(), request.headers());
                let origin = Origin { peer: peer.address, certificate: certificate.as_deref() };
                let identity = self.access.check(origin, request.method(), uri, headers).await?;
                // A caller without a name that may ask something still gives way to others.
                if identity == Identity::Named {
                    peer.establish().map_err(full)?;
                }
                peer
            }
        };
        match path.as_slice() {
            ["healthz"] | ["healthz", "ping" | "log" | "syncloop"] => return self.healthz(),
            _ if matches!(caller, Caller::Healthz) => return Err(not_found()),
            ["pods"] => return Ok(pod_list(&self.containers.pods())),
            ["runningpods"] => return Ok(pod_list(&running(self.containers.pods()))),
            ["metrics", ..] => return self.metrics(&path.join("/")).await,
            ["stats", "summary"] => return self.metrics(&path.join("/")).await,
            ["configz"] => return Ok(json_answer(&self.settings.configz)),
            _ => {}
        }
        if !self.settings.debugging_handlers {
            let text = "logs, exec, attach and port-forward are switched off on this node \
                        (enableDebuggingHandlers)";
            return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text));
        }
        match path.as_slice() {
            ["containerLogs", namespace, pod, container] => {
                require(&request, &[Method::GET])?;
                self.logs(&request, peer, (*namespace, *pod), container).await
            }
            ["exec", namespace, pod, container] => {
                self.command(request, peer, (*namespace, *pod, None), container, Command::Exec)
                    .await
            }
            ["exec", namespace, pod, uid, container] => {
                let pod = (*namespace, *pod, Some(*uid));
                self.command(request, peer, pod, container, Command::Exec).await
            }
            ["attach", namespace, pod, container] => {
                self.command(request, peer, (*namespace, *pod, None), container, Command::Attach)
                    .await
            }
            ["attach", namespace, pod, uid, container] => {
                let pod = (*namespace, *pod, Some(*uid));
                self.command(request, peer, pod, container, Command::Attach).await
            }
            ["portForward", namespace, pod] => {
                self.port_forward(request, peer, (*namespace, *pod, None)).await
            }
            ["portForward", namespace, pod, uid] => {
                self.port_forward(request, peer, (*namespace, *pod, Some(*uid))).await
            }
            _ => Err(not_found()),
        }
    }

    fn healthz(&self) -> Result<Answer, Refusal> {
        match (self.health)() {
            None => Ok(text(StatusCode::OK, "ok".to_owned())),
            Some(reason) => Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, reason)),
        }
    }

    async fn metrics(&self, path: &str) -> Result<Answer, Refusal> {
        let body = self.metrics.text(path).await.ok_or_else(not_found)?;
        let kind = if path.starts_with("stats") {
            "application/json"
        } else {
            "text/plain; version=0.0.4; charset=utf-8"
        };
        Ok(with_type(text(StatusCode::OK, body), kind))
    }

    /// The pod that a request means. An agent that has just started is given time to find its pods.
    async fn pod(
        &self,
        namespace: &str,
        name: &str,
        uid: Option<&str>,
    ) -> Result<Arc<Pod>, Refusal> {
        let look = || find::pod(&self.containers.pods(), namespace, name, uid);
        if let Ok(pod) = look() {
            return Ok(pod);
        }
        drop(tokio::time::timeout(START_PATIENCE, self.containers.settled()).await);
        look()
    }

    async fn logs(
        &self,
        request: &Request<Incoming>,
        peer: &Peer,
        (namespace, pod): (&str, &str),
        container: &str,
    ) -> Result<Answer, Refusal> {
        let query = query::pairs(request.uri().query().unwrap_or_default());
        let bad_request = |text| Refusal::new(StatusCode::BAD_REQUEST, text);
        let options = logs::options::parse(&query, Timestamp::now()).map_err(bad_request)?;
        let pod = self.pod(namespace, pod, None).await?;
        let id = find::container_for_logs(&pod, container, options.previous)?;
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let internal = |text| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text);
        let path = self.containers.log_path(&uid, &id).await.map_err(internal)?;
        let session = self.logs.open(path, options).await.map_err(|error| {
            let status = match error {
                OpenError::TooMany(_) => StatusCode::TOO_MANY_REQUESTS,
                OpenError::Unreadable { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            };
            Refusal::new(status, error.to_string())
        })?;
        start_session(peer)?;
        let ended = self.containers.ended(&uid, &id);
        let (to, pieces) = mpsc::channel(LOG_QUEUE);
        let cancel = self.cancel.clone();
        self.sessions.spawn(async move {
            let sending = caught("log session", session.send(ended, &to));
            if let Some(Ok(Err(error))) = cancel.run_until_cancelled(sending).await {
                warn!(%error, "Cannot read a container's log");
                // A client must not take what it has for the whole log.
                drop(to.send(Err(error)).await);
            }
        });
        // The headers go out before there is anything to read, so that a client of a silent
        // container knows that it is connected.
        let frames = ReceiverStream::new(pieces).map(|piece| piece.map(Frame::data));
        let answer = Response::new(BodyExt::boxed(StreamBody::new(frames)));
        Ok(with_type(answer, "text/plain"))
    }

    async fn command(
        &self,
        request: Request<Incoming>,
        peer: &Peer,
        (namespace, pod, uid): (&str, &str, Option<&str>),
        container: &str,
        command: Command,
    ) -> Result<Answer, Refusal> {
        require(&request, &[Method::GET, Method::POST])?;
        let wanted = exec_request(request.uri().query().unwrap_or_default(), command)?;
        let pod = self.pod(namespace, pod, uid).await?;
        let id = match command {
            Command::Exec => find::running_container(&pod, container)?,
            Command::Attach => find::container_to_attach_to(&pod, container)?,
        };
        let agreed = remote::negotiate_command(request.headers()).map_err(bad_upgrade)?;
        let containers = self.containers.clone();
        let idle = self.settings.streaming_idle_timeout;
        start_session(peer)?;
        let peer = peer.clone();
        Ok(self.upgrade(request, agreed, move |io, agreed| async move {
            let io = match remote::establish(io, &agreed, &wanted, idle, peer).await {
                Ok(io) => io,
                Err(error) => return debug!(error, "Client gave up before its command started"),
            };
            let failed = match command {
                Command::Exec => match containers.exec(&id, wanted).await {
                    Ok(process) => return exec::run(process, io).await,
                    Err(reason) => reason,
                },
                Command::Attach => match containers.attach(&id, wanted.stdin).await {
                    Ok(attached) => return attach::run(attached, io).await,
                    Err(reason) => reason,
                },
            };
            exec::finish(io, &exec::Ending::Failed(failed)).await;
        }))
    }

    async fn port_forward(
        &self,
        request: Request<Incoming>,
        peer: &Peer,
        (namespace, pod, uid): (&str, &str, Option<&str>),
    ) -> Result<Answer, Refusal> {
        require(&request, &[Method::GET, Method::POST])?;
        let pod = self.pod(namespace, pod, uid).await?;
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let internal = |text| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text);
        let network = self.containers.network(&uid).await.map_err(internal)?;
        let agreed = remote::negotiate(
            request.headers(),
            &[port_forward::SPDY_PROTOCOL],
            &[port_forward::WEBSOCKET_PROTOCOL],
        )
        .map_err(bad_upgrade)?;
        let name = pod.metadata.name.clone().unwrap_or_default();
        let idle = self.settings.streaming_idle_timeout;
        start_session(peer)?;
        let terms = Terms { idle, max_streams: port_forward::MAX_STREAMS, peer: peer.clone() };
        Ok(self.upgrade(request, agreed, move |io, agreed| async move {
            let connection = match agreed.transport {
                Transport::Spdy => Connection::new(io, Role::Server, terms),
                Transport::WebSocket => {
                    let tunnel = websocket::tunnel(websocket::accept(io).await);
                    Connection::new(tunnel, Role::Server, terms)
                }
            };
            port_forward::run(connection, network, name).await;
        }))
    }

    /// Says yes to an upgrade and runs `session` on the connection once it has happened.
    fn upgrade<S, F>(&self, mut request: Request<Incoming>, agreed: Agreed, session: S) -> Answer
    where
        S: FnOnce(TokioIo<hyper::upgrade::Upgraded>, Agreed) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let mut answer = text(StatusCode::SWITCHING_PROTOCOLS, String::new());
        *answer.headers_mut() = HeaderMap::clone(&agreed.answer);
        let upgrade = hyper::upgrade::on(&mut request);
        let cancel = self.cancel.clone();
        self.sessions.spawn(async move {
            let work = async {
                match upgrade.await {
                    Ok(io) => session(TokioIo::new(io), agreed).await,
                    Err(error) => debug!(%error, "Client left before the upgrade"),
                }
            };
            drop(caught("session", cancel.run_until_cancelled(work)).await);
        });
        answer
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Exec,
    Attach,
}

/// What the query of an exec or attach asks for.
fn exec_request(query: &str, command: Command) -> Result<ExecRequest, Refusal> {
    let query = query::pairs(query);
    let words = query::all(&query, "command");
    let tty = query::is_set(&query, "tty");
    let request = ExecRequest {
        command: words.into_iter().map(str::to_owned).collect(),
        tty,
        stdin: query::is_set(&query, "input"),
        stdout: query::is_set(&query, "output"),
        // A terminal has one output.
        stderr: query::is_set(&query, "error") && !tty,
    };
    let bad_request = |text| Err(Refusal::new(StatusCode::BAD_REQUEST, text));
    if !request.stdin && !request.stdout && !request.stderr {
        return bad_request("you must specify at least 1 of stdin, stdout, stderr");
    }
    if command == Command::Exec && request.command.is_empty() {
        return bad_request("command: must be specified");
    }
    Ok(request)
}

fn require(request: &Request<Incoming>, methods: &[Method]) -> Result<(), Refusal> {
    if methods.contains(request.method()) {
        return Ok(());
    }
    Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed"))
}

/// What follows on this connection may take as long as the caller likes.
fn start_session(peer: &Peer) -> Result<(), Refusal> {
    peer.establish().map_err(full)?;
    peer.may_pause();
    Ok(())
}

/// A caller that was not let in has no further requests on this connection.
fn refused(refusal: Refusal) -> Answer {
    let last = matches!(
        refusal.status,
        StatusCode::UNAUTHORIZED | StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    );
    let mut answer = text(refusal.status, refusal.text);
    if last {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

fn full(full: keelson_listener::Full) -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, full.to_string())
}

fn not_found() -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "404 page not found")
}

fn bad_upgrade(reason: String) -> Refusal {
    let missing = reason.contains("missing upgrade headers");
    let status = if missing { StatusCode::BAD_REQUEST } else { StatusCode::FORBIDDEN };
    Refusal::new(status, reason)
}

fn text(status: StatusCode, text: String) -> Answer {
    let mut answer =
        Response::new(Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed());
    *answer.status_mut() = status;
    with_type(answer, "text/plain; charset=utf-8")
}

fn json_answer(value: &Value) -> Answer {
    with_type(text(StatusCode::OK, value.to_string()), "application/json")
}

fn with_type(mut answer: Answer, kind: &'static str) -> Answer {
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

fn pod_list(pods: &[Arc<Pod>]) -> Answer {
    let items: Vec<&Pod> = pods.iter().map(Arc::as_ref).collect();
    json_answer(&json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}))
}

fn running(mut pods: Vec<Arc<Pod>>) -> Vec<Arc<Pod>> {
    let phase = |pod: &Arc<Pod>| pod.status.as_ref().and_then(|status| status.phase.clone());
    pods.retain(|pod| phase(pod).as_deref() == Some("Running"));
    pods
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_needs_words_and_a_stream() {
        let read = |query| exec_request(query, Command::Exec);
        let request = read("command=ls&command=-l&output=1&error=1&tty=1").unwrap();
        assert_eq!(request.command, ["ls", "-l"]);
        assert!(request.tty && request.stdout && !request.stderr && !request.stdin);
        assert!(read("command=ls").unwrap_err().text.contains("at least 1 of"));
        assert!(read("output=1").unwrap_err().text.contains("command"));
        assert!(exec_request("output=1", Command::Attach).is_ok());
    }
}
