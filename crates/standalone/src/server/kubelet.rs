//! Requests that the API server passes on to the node: logs, exec, attach, port-forward.
//!
//! Upgrades are passed through as bytes, so any protocol that client and kubelet agree on works. The
//! node is dialled from the process's own network namespace.

use std::sync::Arc;
use std::time::Duration;

use http::header::{CONNECTION, HOST, HeaderName, UPGRADE};
use http::{HeaderMap, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::TlsConnector;

use super::route::{Query, ResourcePath};
use super::{Reply, Server, boxed};
use crate::auth::pki::Authority;
use crate::error::ApiError;
use crate::kinds;

/// How the server reaches kubelets.
pub(crate) struct Kubelets {
    tls: TlsConnector,
}

const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// The certificate of a kubelet is not checked against its address: without
/// `--kubelet-certificate-authority` kube-apiserver does not do so either, and a kubelet may have
/// signed its own. The kubelet checks ours.
#[derive(Debug)]
struct AnyKubelet(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyKubelet {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl Kubelets {
    pub(crate) fn new(authority: &Authority) -> anyhow::Result<Self> {
        let leaf = authority.client("kube-apiserver-kubelet-client", &["system:masters"])?;
        let chain = CertificateDer::pem_slice_iter(leaf.certificate.as_bytes())
            .collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyKubelet(provider)))
            .with_client_auth_cert(chain, key)?;
        Ok(Self { tls: TlsConnector::from(Arc::new(config)) })
    }
}

/// `log`, `exec`, `attach` and `portforward` of a pod.
pub(super) async fn pod(
    server: &Arc<Server>,
    request: Request<Incoming>,
    path: &ResourcePath,
) -> Result<Reply, ApiError> {
    let (namespace, name) = (path.namespace.as_str(), path.name.as_str());
    let pod = server.registry.get(&kinds::POD, namespace, name)?.value();
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    if node.is_empty() {
        let text = format!("pod {name} does not have a host assigned");
        return Err(ApiError::bad_request(text));
    }
    let query = Query::parse(request.uri().query());
    let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
    let mut passed = request.uri().query().unwrap_or_default().to_owned();
    let target = match path.subresource.as_str() {
        "log" => {
            let container = container(&pod, &query)?;
            format!("/containerLogs/{namespace}/{name}/{container}")
        }
        "portforward" => format!("/portForward/{namespace}/{name}/{uid}"),
        verb => {
            let container = container(&pod, &query)?;
            // The API speaks of `stdin`, the kubelet of `input`.
            passed = rename_streams(&passed);
            format!("/{verb}/{namespace}/{name}/{uid}/{container}")
        }
    };
    pass(server, request, node, &target, &passed).await
}

/// `/api/v1/nodes/{name}/proxy/{path}`.
pub(super) async fn node(
    server: &Arc<Server>,
    request: Request<Incoming>,
    path: &ResourcePath,
) -> Result<Reply, ApiError> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let target = format!("/{}", path.rest);
    let node = path.name.split(':').next().unwrap_or_default();
    pass(server, request, node, &target, &query).await
}

fn container(pod: &serde_json::Value, query: &Query) -> Result<String, ApiError> {
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let names = |list: &str| -> Vec<String> {
        let containers = pod["spec"][list].as_array().into_iter().flatten();
        containers.filter_map(|c| c["name"].as_str().map(str::to_owned)).collect()
    };
    let (main, init) = (names("containers"), names("initContainers"));
    let ephemeral = names("ephemeralContainers");
    match query.text("container") {
        "" => match main.as_slice() {
            [one] => Ok(one.clone()),
            _ => {
                let choice = main.join(" ");
                let mut text = format!(
                    "a container name must be specified for pod {name}, choose one of: [{choice}]"
                );
                if !init.is_empty() {
                    text.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
                }
                Err(ApiError::bad_request(text))
            }
        },
        wanted if [&main, &init, &ephemeral].iter().any(|l| l.iter().any(|n| n == wanted)) => {
            Ok(wanted.to_owned())
        }
        wanted => {
            Err(ApiError::bad_request(format!("container {wanted} is not valid for pod {name}")))
        }
    }
}

fn rename_streams(query: &str) -> String {
    let rename = |pair: &str| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let on = if matches!(value, "true" | "1") { "1" } else { "0" };
        match key {
            "stdin" => format!("input={on}"),
            "stdout" => format!("output={on}"),
            "stderr" => format!("error={on}"),
            "tty" => format!("tty={on}"),
            "container" => String::new(),
            _ => pair.to_owned(),
        }
    };
    let renamed = query.split('&').map(rename).filter(|p| !p.is_empty());
    renamed.collect::<Vec<_>>().join("&")
}

/// Where a node's kubelet listens.
fn address(server: &Server, node: &str) -> Result<String, ApiError> {
    let object = server.registry.get(&kinds::NODE, "", node)?.value();
    let addresses = object["status"]["addresses"].as_array().into_iter().flatten();
    let mut addresses: Vec<_> = addresses.collect();
    addresses.sort_by_key(|a| a["type"] != "InternalIP");
    let host = addresses.first().and_then(|a| a["address"].as_str()).ok_or_else(|| {
        ApiError::new(
            503,
            "ServiceUnavailable",
            format!("node {node} has no address in its status: is its agent running?"),
        )
    })?;
    let port = object["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64();
    let port = port.unwrap_or(10_250);
    Ok(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
}

async fn pass(
    server: &Arc<Server>,
    mut request: Request<Incoming>,
    node: &str,
    target: &str,
    query: &str,
) -> Result<Reply, ApiError> {
    let address = address(server, node)?;
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        ApiError::new(
            502,
            "ServiceUnavailable",
            format!(
                "error dialing backend: {what} the kubelet of node {node} at {address}: {error}; is its agent running?"
            ),
        )
    };
    let dial = tokio::time::timeout(DIAL_TIMEOUT, tokio::net::TcpStream::connect(&address));
    let stream = match dial.await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(failed("cannot reach", &error)),
        Err(_) => return Err(failed("cannot reach", &"no answer in 5 s")),
    };
    drop(stream.set_nodelay(true));
    let name = ServerName::try_from("kubelet").map_err(|e| failed("cannot name", &e))?;
    let tls = server.kubelets.tls.connect(name, stream).await;
    let tls = tls.map_err(|e| failed("no TLS with", &e))?;
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .preserve_header_case(true)
        .handshake(TokioIo::new(tls))
        .await
        .map_err(|e| failed("no HTTP with", &e))?;
    server.tasks.spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "Connection to a kubelet ended");
        }
    });
    let upgrade = request.headers().contains_key(UPGRADE);
    let client = upgrade.then(|| hyper::upgrade::on(&mut request));
    let outgoing = outgoing(request, target, query, &address, upgrade)?;
    let mut response =
        sender.send_request(outgoing).await.map_err(|e| failed("no answer of", &e))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(client) = client
    {
        let backend = hyper::upgrade::on(&mut response);
        let stop = server.stop.clone();
        server.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = splice(client, backend) => {}
            }
        });
        let (parts, _) = response.into_parts();
        return Ok(Response::from_parts(parts, boxed("")));
    }
    let (mut parts, body) = response.into_parts();
    strip(&mut parts.headers);
    Ok(Response::from_parts(parts, until_broken(body)))
}

/// The kubelet's answer as it comes. When it breaks off, the answer ends there: what follows cannot be
/// told in HTTP any more.
fn until_broken(body: Incoming) -> super::Body {
    let frames = futures_util::stream::unfold(body, |mut body| async move {
        match body.frame().await {
            Some(Ok(frame)) => Some((Ok(frame), body)),
            Some(Err(_)) | None => None,
        }
    });
    http_body_util::StreamBody::new(frames).boxed_unsync()
}

fn outgoing(
    request: Request<Incoming>,
    target: &str,
    query: &str,
    address: &str,
    upgrade: bool,
) -> Result<Request<Incoming>, ApiError> {
    let target = if query.is_empty() { target.to_owned() } else { format!("{target}?{query}") };
    let (mut parts, body) = request.into_parts();
    parts.uri = target.parse::<Uri>().map_err(|e| {
        ApiError::bad_request(format!("the path {target} cannot be passed on: {e}"))
    })?;
    parts.version = http::Version::HTTP_11;
    if !upgrade {
        strip(&mut parts.headers);
    }
    parts.headers.remove(http::header::AUTHORIZATION);
    if let Ok(host) = address.parse() {
        parts.headers.insert(HOST, host);
    }
    Ok(Request::from_parts(parts, body))
}

/// Headers that speak of one connection only.
fn strip(headers: &mut HeaderMap) {
    let keep_alive = HeaderName::from_static("keep-alive");
    for name in [CONNECTION, UPGRADE, http::header::TRANSFER_ENCODING, keep_alive] {
        headers.remove(name);
    }
}

async fn splice(client: hyper::upgrade::OnUpgrade, backend: hyper::upgrade::OnUpgrade) {
    let (Ok(client), Ok(backend)) = (client.await, backend.await) else { return };
    let (mut client, mut backend) = (TokioIo::new(client), TokioIo::new(backend));
    // Either side may simply go away.
    drop(tokio::io::copy_bidirectional(&mut client, &mut backend).await);
}
