//! The cluster's own certificate authority and what it issues.
//!
//! The CA is made once and kept. Leaf certificates are issued anew at each start, so a restart is
//! also their rotation; older ones stay valid until they expire.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

/// Years that a CA lives.
const CA_YEARS: i16 = 20;
/// Years that a leaf lives: longer than a machine stays up.
const LEAF_YEARS: i16 = 5;

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PkiError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] keelson_durable::DurableError),
    /// One of the CA's two files is missing.
    #[error(
        "{missing} is missing beside {present}: restore it, or remove both to make a new CA (all kubeconfigs change then)"
    )]
    Half {
        /// The file that is not there.
        missing: PathBuf,
        /// The file that is.
        present: PathBuf,
    },
    /// A key or certificate is unusable.
    #[error("cannot use {what}: restore it, or remove the pki folder to make a new CA")]
    Crypto {
        /// Which one.
        what: String,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
}

/// The certificate authority.
pub(crate) struct Authority {
    pub(crate) ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub(crate) struct Leaf {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Authority {
    /// Reads the CA from `folder`, or makes one there.
    pub(crate) fn open(folder: &Path) -> Result<Self, PkiError> {
        let (certificate_path, key_path) = (folder.join("ca.crt"), folder.join("ca.key"));
        let (ca_pem, key_pem) = match (read(&certificate_path)?, read(&key_path)?) {
            (Some(certificate), Some(key)) => (certificate, key),
            (None, None) => {
                let (certificate, key) = make_ca()?;
                // The key first: a certificate without key would be the worse half, and a crash
                // between the two is told apart by `Half`, never by a wrong pair.
                keelson_durable::write(&key_path, key.as_bytes(), 0o600)?;
                keelson_durable::write(&certificate_path, certificate.as_bytes(), 0o644)?;
                (certificate, key)
            }
            // A crash between the two writes: nobody has seen a certificate of this key.
            (None, Some(key)) => {
                let certificate = certify_ca(&key)?;
                keelson_durable::write(&certificate_path, certificate.as_bytes(), 0o644)?;
                (certificate, key)
            }
            (Some(_), None) => {
                return Err(PkiError::Half { missing: key_path, present: certificate_path });
            }
        };
        let wrong = |what: &Path| {
            let what = what.display().to_string();
            move |source| PkiError::Crypto { what, source }
        };
        let key = KeyPair::from_pem(&key_pem).map_err(wrong(&key_path))?;
        let issuer = Issuer::from_ca_cert_pem(&ca_pem, key).map_err(wrong(&certificate_path))?;
        Ok(Self { ca_pem, issuer })
    }

    /// A client certificate: the user is the common name, the groups are the organisations.
    pub(crate) fn client(&self, user: &str, groups: &[&str]) -> Result<Leaf, PkiError> {
        let mut params = leaf_params(user, groups);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(&params)
    }

    /// A server certificate for these addresses and names.
    pub(crate) fn server(
        &self,
        name: &str,
        addresses: &[IpAddr],
        names: &[String],
    ) -> Result<Leaf, PkiError> {
        let mut params = leaf_params(name, &[]);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names = addresses.iter().map(|ip| SanType::IpAddress(*ip)).collect();
        for name in names {
            let name = name.clone().try_into().map_err(crypto(name))?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        self.issue(&params)
    }

    fn issue(&self, params: &CertificateParams) -> Result<Leaf, PkiError> {
        let key = KeyPair::generate().map_err(crypto("a new key"))?;
        let certificate =
            params.signed_by(&key, &self.issuer).map_err(crypto("the CA to sign with"))?;
        Ok(Leaf { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

fn crypto(what: &str) -> impl FnOnce(rcgen::Error) -> PkiError {
    let what = what.to_owned();
    move |source| PkiError::Crypto { what, source }
}

fn read(path: &Path) -> Result<Option<String>, PkiError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PkiError::Read { path: path.to_owned(), source }),
    }
}

/// Reads a PKCS#8 key, or makes one. Used for the tokens' signature.
pub(crate) fn signing_key(path: &Path) -> Result<KeyPair, PkiError> {
    let what = path.display().to_string();
    if let Some(pem) = read(path)? {
        return KeyPair::from_pem(&pem).map_err(crypto(&what));
    }
    let key = KeyPair::generate().map_err(crypto(&what))?;
    keelson_durable::write(path, key.serialize_pem().as_bytes(), 0o600)?;
    Ok(key)
}

fn make_ca() -> Result<(String, String), PkiError> {
    let key = KeyPair::generate().map_err(crypto("a new CA key"))?.serialize_pem();
    Ok((certify_ca(&key)?, key))
}

fn certify_ca(key_pem: &str) -> Result<String, PkiError> {
    let key = KeyPair::from_pem(key_pem).map_err(crypto("ca.key"))?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
    ];
    params.distinguished_name = distinguished("keelson-ca", &[]);
    set_lifetime(&mut params, CA_YEARS);
    let certificate = params.self_signed(&key).map_err(crypto("a new CA"))?;
    Ok(certificate.pem())
}

fn leaf_params(name: &str, groups: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished(name, groups);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    set_lifetime(&mut params, LEAF_YEARS);
    params
}

/// rcgen keeps one value per attribute type, so several groups are joined, and the server splits them
/// again. (Names of groups hold no comma.)
fn distinguished(name: &str, groups: &[&str]) -> DistinguishedName {
    let mut found = DistinguishedName::new();
    if !groups.is_empty() {
        found.push(DnType::OrganizationName, groups.join(","));
    }
    found.push(DnType::CommonName, name);
    found
}

fn set_lifetime(params: &mut CertificateParams, years: i16) {
    let today = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date();
    // A day in the past, for clocks that are behind.
    let start = today.yesterday().unwrap_or(today);
    let year = |y: i16| i32::from(y);
    let (month, day) = (start.month().unsigned_abs(), start.day().unsigned_abs().min(28));
    params.not_before = rcgen::date_time_ymd(year(start.year()), month, day);
    params.not_after = rcgen::date_time_ymd(year(start.year() + years), month, day);
}
