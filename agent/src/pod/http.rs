//! HTTP requests of probes and hooks: straight to the pod, no proxy, no connection reuse, no certificate check.

use std::net::IpAddr;
use std::sync::Arc;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;

/// kubelet reads no more of an answer than this.
const MAX_BODY: usize = 10 * 1024;
const MAX_REDIRECTS: usize = 10;

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub status: u16,
    pub body: String,
}

/// Performs a GET as a manifest describes it, following redirects on the same host.
///
/// # Errors
/// In words, when no answer came.
pub(super) async fn get(
    action: &HTTPGetAction,
    container: &Container,
    pod_ip: Option<IpAddr>,
) -> Result<Answer, String> {
    let port = port(&action.port, container)?;
    let host = action.host.clone().filter(|h| !h.is_empty());
    let host = host.or_else(|| pod_ip.map(|ip| ip.to_string())).ok_or("the pod has no address")?;
    let tls = action.scheme.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("https"));
    let path = action.path.as_deref().unwrap_or("/");
    let mut path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    for _ in 0..=MAX_REDIRECTS {
        let (answer, location) = once(&host, port, tls, &path, action).await?;
        match location {
            Some(next) if (300..400).contains(&answer.status) && next.starts_with('/') => {
                path = next
            }
            _ => return Ok(answer),
        }
    }
    Err(format!("stopped after {MAX_REDIRECTS} redirects"))
}

/// The number of a port that may be given by name.
pub(super) fn port(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|p| p.name.as_deref() == Some(name))
            .map(|p| p.container_port)
            .or_else(|| name.parse().ok()),
    };
    number
        .and_then(|n| u16::try_from(n).ok())
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("container {} has no port {port:?}", container.name))
}

async fn once(
    host: &str,
    port: u16,
    tls: bool,
    path: &str,
    action: &HTTPGetAction,
) -> Result<(Answer, Option<String>), String> {
    let request = request(host, port, path, action)?;
    let stream = TcpStream::connect((host.trim_matches(['[', ']']), port))
        .await
        .map_err(|e| format!("dial tcp {host}:{port}: {e}"))?;
    let response = if tls {
        let stream = tls_connect(host, stream).await?;
        send(TokioIo::new(stream), request).await?
    } else {
        send(TokioIo::new(stream), request).await?
    };
    let status = response.status().as_u16();
    let location =
        response.headers().get("location").and_then(|l| l.to_str().ok()).map(str::to_owned);
    let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
    let body =
        body.map(|b| String::from_utf8_lossy(&b.to_bytes()).into_owned()).unwrap_or_default();
    Ok((Answer { status, body }, location))
}

fn request(
    host: &str,
    port: u16,
    path: &str,
    action: &HTTPGetAction,
) -> Result<Request<Empty<Bytes>>, String> {
    let headers = || action.http_headers.iter().flatten();
    let set = |name: &str| headers().any(|h| h.name.eq_ignore_ascii_case(name));
    let bracketed = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let mut builder = Request::get(path).header("connection", "close");
    if !set("host") {
        builder = builder.header("host", format!("{bracketed}:{port}"));
    }
    if !set("user-agent") {
        builder = builder.header("user-agent", "kube-probe/1.36");
    }
    if !set("accept") {
        builder = builder.header("accept", "*/*");
    }
    for header in headers() {
        builder = builder.header(&header.name, &header.value);
    }
    builder.body(Empty::new()).map_err(|e| e.to_string())
}

async fn send<S>(
    io: TokioIo<S>,
    request: Request<Empty<Bytes>>,
) -> Result<hyper::Response<hyper::body::Incoming>, String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(io).await.map_err(|e| e.to_string())?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::trace!(%error, "Probe connection ended");
        }
    });
    sender.send_request(request).await.map_err(|e| e.to_string())
}

async fn tls_connect(
    host: &str,
    stream: TcpStream,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).map_err(|e| e.to_string())?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await.map_err(|e| format!("TLS with {host}: {e}"))
}

/// Probes ask whether a server answers, not who it is.
#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
