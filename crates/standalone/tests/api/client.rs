//! A plain HTTPS client: one connection per request, so that a test says exactly what it sends.

use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use tokio_rustls::TlsConnector;

#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) address: String,
    tls: TlsConnector,
    token: Option<String>,
}

/// A watch: JSON objects, line by line.
pub(crate) struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Client {
    pub(crate) fn from_kubeconfig(path: &Path) -> Self {
        let config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let decode = |value: &Value| STANDARD.decode(value.as_str().unwrap()).unwrap();
        let cluster = &config["clusters"][0]["cluster"];
        let user = &config["users"][0]["user"];
        let mut roots = rustls::RootCertStore::empty();
        let ca = decode(&cluster["certificate-authority-data"]);
        roots.add(CertificateDer::from_pem_slice(&ca).unwrap()).unwrap();
        let certificate = CertificateDer::from_pem_slice(&decode(&user["client-certificate-data"]));
        let key = PrivateKeyDer::from_pem_slice(&decode(&user["client-key-data"])).unwrap();
        let tls = builder(roots).with_client_auth_cert(vec![certificate.unwrap()], key).unwrap();
        let url = cluster["server"].as_str().unwrap();
        Self {
            address: url.trim_start_matches("https://").to_owned(),
            tls: TlsConnector::from(Arc::new(tls)),
            token: None,
        }
    }

    /// The same server without a certificate.
    pub(crate) fn anonymous(&self, ca_pem: &str) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap()).unwrap();
        let tls = Arc::new(builder(roots).with_no_client_auth());
        Self { address: self.address.clone(), tls: TlsConnector::from(tls), token: None }
    }

    pub(crate) fn with_token(mut self, token: &str) -> Self {
        self.token = Some(token.to_owned());
        self
    }

    /// Sends a request; an error is a connection that broke.
    pub(crate) async fn try_send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&Value>,
    ) -> anyhow::Result<http::Response<Incoming>> {
        let stream = tokio::net::TcpStream::connect(&self.address).await?;
        let stream = self.tls.connect(ServerName::try_from("localhost")?, stream).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", &self.address);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let bytes = body.map(|b| Bytes::from(b.to_string())).unwrap_or_default();
        Ok(sender.send_request(request.body(Full::new(bytes))?).await?)
    }

    pub(crate) async fn try_json(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&Value>,
    ) -> anyhow::Result<(u16, Value)> {
        let response = self.try_send(method, path, headers, body).await?;
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await?.to_bytes();
        let value = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into_owned().into());
        Ok((status, value))
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        self.try_json("GET", path, &[], None).await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let headers = [("content-type", "application/json")];
        self.try_json("POST", path, &headers, Some(body)).await.unwrap()
    }

    pub(crate) async fn put(&self, path: &str, body: &Value) -> (u16, Value) {
        let headers = [("content-type", "application/json")];
        self.try_json("PUT", path, &headers, Some(body)).await.unwrap()
    }

    pub(crate) async fn delete(&self, path: &str, body: &Value) -> (u16, Value) {
        let headers = [("content-type", "application/json")];
        self.try_json("DELETE", path, &headers, Some(body)).await.unwrap()
    }

    pub(crate) async fn patch(&self, path: &str, kind: &str, body: &Value) -> (u16, Value) {
        let media = format!("application/{kind}-patch+json");
        self.try_json("PATCH", path, &[("content-type", &media)], Some(body)).await.unwrap()
    }

    pub(crate) async fn watch(&self, path: &str) -> Lines {
        let response = self.try_send("GET", path, &[], None).await.unwrap();
        Lines { body: response.into_body(), buffer: Vec::new() }
    }
}

impl Lines {
    /// The next object, or None when the stream ends.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let frame = self.body.frame().await?.ok()?;
            self.buffer.extend_from_slice(&frame.into_data().unwrap_or_default());
        }
    }
}

fn builder(
    roots: rustls::RootCertStore,
) -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
}
