//! The certificate of the HTTPS API and the clients that it knows. Both are read again when their files change, so that
//! neither a renewed certificate nor a new CA needs a restart.

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tracing::{info, warn};

use crate::config::ServerConfig;

/// How often the files are looked at, as the kubelet does at the latest.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The certificate of this server and the CA of its clients, as they are on the disk.
pub struct Certificates {
    files: Files,
    state: Mutex<State>,
}

#[derive(Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

struct State {
    current: Arc<rustls::ServerConfig>,
    /// What the files were when they were read for it.
    of: Stamp,
    /// What they were when they could not be used.
    bad: Option<Stamp>,
}

/// What changes when a file is written or replaced.
type Stamp = Vec<Option<(u64, u64, u64, i64, i64)>>;

impl Certificates {
    /// Reads the given certificate, or makes a self-signed one, and the clients' CA.
    ///
    /// # Errors
    /// When a file cannot be read or is not what it should be; the file is named.
    pub fn load(
        config: &ServerConfig,
        cert_dir: &Path,
        node_name: &str,
        addresses: &[IpAddr],
    ) -> anyhow::Result<Self> {
        let (certificate, key) = match &config.tls {
            Some(files) => files.clone(),
            None => ensure_self_signed(cert_dir, node_name, addresses)?,
        };
        let files = Files { certificate, key, client_ca: config.client_ca_file.clone() };
        let of = files.stamp();
        let current = Arc::new(files.read()?);
        Ok(Self { files, state: Mutex::new(State { current, of, bad: None }) })
    }

    /// What a new connection is served with.
    pub fn current(&self) -> Arc<rustls::ServerConfig> {
        self.state().current.clone()
    }

    /// Reads the files when they have changed. Those that cannot be used change nothing: they may be half written.
    pub fn refresh(&self) {
        // Taken before the reading, so that a change meanwhile is seen the next time.
        let stamp = self.files.stamp();
        if self.state().of == stamp {
            return;
        }
        let read = self.files.read();
        let mut state = self.state();
        match read {
            Ok(config) => {
                *state = State { current: Arc::new(config), of: stamp, bad: None };
                info!(certificate = %self.files.certificate.display(),
                    "Certificates of the HTTPS API have changed and are in use");
            }
            Err(error) if state.bad.as_ref() != Some(&stamp) => {
                state.bad = Some(stamp);
                warn!(
                    error = format!("{error:#}"),
                    "Certificates of the HTTPS API have changed and cannot be used; the old ones stay"
                );
            }
            Err(_) => {}
        }
    }

    /// Looks at the files again and again.
    pub async fn keep_current(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let certificates = self.clone();
            if let Err(error) = tokio::task::spawn_blocking(move || certificates.refresh()).await {
                warn!(%error, "Certificates of the HTTPS API were not looked at");
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Files {
    fn stamp(&self) -> Stamp {
        let files = [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref()];
        let stamp = |file: Option<&PathBuf>| {
            let meta = std::fs::metadata(file?).ok()?;
            Some((meta.dev(), meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
        };
        files.map(stamp).to_vec()
    }

    fn read(&self) -> anyhow::Result<rustls::ServerConfig> {
        let chain = certificates(&self.certificate)?;
        let private_key = PrivateKeyDer::from_pem_file(&self.key)
            .with_context(|| format!("{}: is no private key in PEM", self.key.display()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let mut roots = RootCertStore::empty();
                for ca in certificates(file)? {
                    roots.add(ca).with_context(|| format!("{}: is no CA", file.display()))?;
                }
                // Clients without a certificate may still have a token.
                let roots = Arc::new(roots);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                    .allow_unauthenticated()
                    .build()
                    .with_context(|| format!("{}: cannot be used as a CA", file.display()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut tls = builder.with_single_cert(chain, private_key).with_context(|| {
            let (certificate, key) = (self.certificate.display(), self.key.display());
            format!("{certificate} and {key} do not belong together")
        })?;
        // Upgrades to SPDY and WebSocket exist only in HTTP/1.1.
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(tls)
    }
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
            Certificates::load(&config, dir.path(), "n1", &ips).unwrap();
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
        let error = Certificates::load(&config, dir.path(), "n1", &[]).err().unwrap();
        assert!(format!("{error:#}").contains("ca.crt: has no certificate"), "{error:#}");
    }

    #[test]
    fn changed_files_are_used_and_bad_ones_leave_the_old_ones_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let files = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
        let write = || {
            let made = rcgen::generate_simple_self_signed(vec!["n1".to_owned()]).unwrap();
            std::fs::write(&files.1, made.signing_key.serialize_pem()).unwrap();
            std::fs::write(&files.0, made.cert.pem()).unwrap();
        };
        write();
        let config = ServerConfig { tls: Some(files.clone()), ..ServerConfig::default() };
        let certificates = Certificates::load(&config, dir.path(), "n1", &[]).unwrap();
        let refreshed = |before: &Arc<rustls::ServerConfig>| {
            certificates.refresh();
            !Arc::ptr_eq(before, &certificates.current())
        };
        let first = certificates.current();
        assert!(!refreshed(&first), "nothing has changed");
        std::fs::write(&files.0, "half of a certif").unwrap();
        assert!(!refreshed(&first));
        std::fs::remove_file(&files.0).unwrap();
        assert!(!refreshed(&first));
        write();
        assert!(refreshed(&first));
    }
}
