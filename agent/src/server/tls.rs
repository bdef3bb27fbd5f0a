//! The certificate of the HTTPS API and the clients that it knows.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tracing::info;

use crate::config::ServerConfig;

/// What TLS needs to know: the given certificate or a self-signed one, and the clients' CA.
///
/// # Errors
/// When a file cannot be read or is not what it should be; the file is named.
pub fn server_config(
    config: &ServerConfig,
    cert_dir: &Path,
    node_name: &str,
    addresses: &[IpAddr],
) -> anyhow::Result<rustls::ServerConfig> {
    let (certificate, key) = match &config.tls {
        Some(files) => files.clone(),
        None => ensure_self_signed(cert_dir, node_name, addresses)?,
    };
    let chain = certificates(&certificate)?;
    let private_key = PrivateKeyDer::from_pem_file(&key)
        .with_context(|| format!("{}: is no private key in PEM", key.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?;
    let builder = match &config.client_ca_file {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let mut roots = RootCertStore::empty();
            for ca in certificates(file)? {
                roots.add(ca).with_context(|| format!("{}: is no CA", file.display()))?;
            }
            // Clients without a certificate may still have a token.
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .allow_unauthenticated()
                .build()
                .with_context(|| format!("{}: cannot be used as a CA", file.display()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut tls = builder.with_single_cert(chain, private_key).with_context(|| {
        format!("{} and {} do not belong together", certificate.display(), key.display())
    })?;
    // Upgrades to SPDY and WebSocket exist only in HTTP/1.1.
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(tls)
}

fn certificates(file: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let text = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .with_context(|| format!("{}: is no certificate in PEM", file.display()))?;
    anyhow::ensure!(!chain.is_empty(), "{}: has no certificate in it", file.display());
    Ok(chain)
}

/// A certificate that only says "this is the node of that name"; made once per name and address.
fn ensure_self_signed(
    dir: &Path,
    node_name: &str,
    addresses: &[IpAddr],
) -> anyhow::Result<(PathBuf, PathBuf)> {
    let (certificate, key) = (dir.join("kubelet.crt"), dir.join("kubelet.key"));
    if covers(&certificate, node_name, addresses) && key.exists() {
        return Ok((certificate, key));
    }
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut names = vec![node_name.to_owned()];
    names.extend(addresses.iter().map(IpAddr::to_string));
    let made = rcgen::generate_simple_self_signed(names).context("cannot make a certificate")?;
    // The key first: a certificate without its key would never be made again.
    keelson_durable::write(&key, made.signing_key.serialize_pem().as_bytes(), 0o600)?;
    keelson_durable::write(&certificate, made.cert.pem().as_bytes(), 0o644)?;
    info!(path = %certificate.display(), "Made a self-signed certificate for the HTTPS API");
    Ok((certificate, key))
}

fn covers(certificate: &Path, node_name: &str, addresses: &[IpAddr]) -> bool {
    let Ok(chain) = certificates(certificate) else { return false };
    let Some(Ok((_, parsed))) = chain.first().map(|der| x509_parser::parse_x509_certificate(der))
    else {
        return false;
    };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return false };
    let names = &names.value.general_names;
    let has_name = names.iter().any(|name| {
        matches!(name, x509_parser::extensions::GeneralName::DNSName(dns) if *dns == node_name)
    });
    let has = |ip: &IpAddr| {
        let octets = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        names.iter().any(|name| {
            matches!(name, x509_parser::extensions::GeneralName::IPAddress(ip) if *ip == octets)
        })
    };
    parsed.validity().is_valid() && has_name && addresses.iter().all(has)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_self_signed_certificate_is_made_once_per_address() {
        let dir = tempfile::tempdir().unwrap();
        let config = ServerConfig::default();
        let make = |ips: &[&str]| {
            let ips: Vec<IpAddr> = ips.iter().map(|ip| ip.parse().unwrap()).collect();
            server_config(&config, dir.path(), "n1", &ips).unwrap();
            std::fs::read(dir.path().join("kubelet.crt")).unwrap()
        };
        let first = make(&["192.0.2.1"]);
        assert_eq!(make(&["192.0.2.1"]), first);
        assert_ne!(make(&["192.0.2.2", "2001:db8::1"]), first);
    }

    #[test]
    fn bad_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.crt");
        std::fs::write(&file, "nonsense").unwrap();
        let config = ServerConfig { client_ca_file: Some(file), ..ServerConfig::default() };
        let error = server_config(&config, dir.path(), "n1", &[]).unwrap_err();
        assert!(format!("{error:#}").contains("ca.crt: has no certificate"), "{error:#}");
    }
}
