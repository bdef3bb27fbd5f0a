//! TLS bootstrap: a node that has only a token asks the API server for a client certificate.
//!
//! The key never leaves the node. It is kept before it is used, so that an agent that is restarted
//! while it waits for the approval asks with the same key and finds its old request again.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use futures_util::TryStreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestSpec,
};
use kube::Api;
use kube::api::{ObjectMeta, PostParams};
use kube::config::{AuthInfo, Context as KubeContext, Kubeconfig, NamedAuthInfo, NamedContext};
use kube::runtime::watcher;
use rcgen::{CertificateParams, DnType, KeyPair};
use sha2::{Digest, Sha256};
use tracing::{info, warn};

use crate::config::AgentConfig;

const SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const RETRY: Duration = Duration::from_secs(5);

/// Asks for a certificate with the credentials of `bootstrap` and writes a kubeconfig that uses it
/// to `path`. Waits until the request is approved.
///
/// # Errors
/// When the request is denied, or a file cannot be used.
pub(super) async fn request_kubeconfig(
    config: &AgentConfig,
    bootstrap: &Path,
    path: &Path,
) -> anyhow::Result<()> {
    let key_path = super::client_key_path(config);
    let key = ensure_key(&key_path)?;
    let request = signing_request(&config.node_name, &key)?;
    let client = super::client_from(bootstrap).await?;
    let api: Api<CertificateSigningRequest> = Api::all(client);
    let name = request.metadata.name.clone().unwrap_or_default();
    info!(request = name, "Asking the API server for a client certificate");
    let certificate = loop {
        match certificate(&api, &name, &request).await? {
            Some(certificate) => break certificate,
            None => tokio::time::sleep(RETRY).await,
        }
    };
    let certificate_path = config.cert_dir().join("kubelet-client.crt");
    keelson_durable::write(&certificate_path, &certificate, 0o600)?;
    let kubeconfig = kubeconfig_with(bootstrap, &certificate_path, &key_path)?;
    let text = serde_json::to_string_pretty(&kubeconfig).context("cannot write a kubeconfig")?;
    keelson_durable::write(path, text.as_bytes(), 0o600)?;
    info!(path = %path.display(), "Got a client certificate");
    Ok(())
}

fn ensure_key(path: &Path) -> anyhow::Result<KeyPair> {
    if let Ok(text) = std::fs::read_to_string(path) {
        return KeyPair::from_pem(&text)
            .with_context(|| format!("{}: is no key; hint: remove it", path.display()));
    }
    let key = KeyPair::generate().context("cannot make a key")?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    keelson_durable::write(path, key.serialize_pem().as_bytes(), 0o600)?;
    Ok(key)
}

/// The request of a node; its name follows from its key, as with the kubelet.
fn signing_request(node: &str, key: &KeyPair) -> anyhow::Result<CertificateSigningRequest> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, format!("system:node:{node}"));
    let pem = params.serialize_request(key)?.pem()?;
    let digest = Sha256::digest(key.public_key_raw());
    let suffix: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let usages = ["digital signature", "client auth"].map(str::to_owned);
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(format!("node-csr-{suffix}")), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: SIGNER.to_owned(),
            usages: Some(usages.to_vec()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    })
}

/// Makes sure that the request is there and waits for its certificate; `None` when it is worth
/// another try.
async fn certificate(
    api: &Api<CertificateSigningRequest>,
    name: &str,
    request: &CertificateSigningRequest,
) -> anyhow::Result<Option<Vec<u8>>> {
    match api.create(&PostParams::default(), request).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.is_already_exists() => {}
        Err(kube::Error::Api(status)) if status.is_forbidden() => {
            bail!("the bootstrap credentials may not ask for certificates: {}", status.message)
        }
        Err(error) => {
            warn!(%error, "Cannot ask for a client certificate yet, trying on");
            return Ok(None);
        }
    }
    let mut states = std::pin::pin!(watcher::watch_object(api.clone(), name));
    loop {
        match states.try_next().await {
            Ok(Some(Some(request))) => {
                if let Some(certificate) = outcome(&request)? {
                    return Ok(Some(certificate));
                }
            }
            // Expired requests are collected; the next try makes a new one.
            Ok(Some(None) | None) => return Ok(None),
            Err(error) => {
                warn!(%error, "Cannot watch the certificate request, trying on");
                return Ok(None);
            }
        }
    }
}

fn outcome(request: &CertificateSigningRequest) -> anyhow::Result<Option<Vec<u8>>> {
    let Some(status) = &request.status else { return Ok(None) };
    for condition in status.conditions.iter().flatten() {
        if matches!(condition.type_.as_str(), "Denied" | "Failed") {
            let name = request.metadata.name.as_deref().unwrap_or_default();
            let why = condition.message.as_deref().unwrap_or("no reason given");
            bail!("certificate request {name}: {}: {why}", condition.type_);
        }
    }
    Ok(status.certificate.as_ref().map(|certificate| certificate.0.clone()))
}

/// The cluster of the bootstrap kubeconfig with the new certificate as its user.
fn kubeconfig_with(bootstrap: &Path, certificate: &Path, key: &Path) -> anyhow::Result<Kubeconfig> {
    let mut kubeconfig = Kubeconfig::read_from(bootstrap)?;
    let current = kubeconfig.current_context.clone().unwrap_or_default();
    let context = kubeconfig.contexts.iter().find(|context| context.name == current);
    let cluster = context
        .and_then(|context| context.context.as_ref())
        .map(|context| context.cluster.clone())
        .with_context(|| format!("{}: has no current context", bootstrap.display()))?;
    let user = AuthInfo {
        client_certificate: Some(certificate.display().to_string()),
        client_key: Some(key.display().to_string()),
        ..AuthInfo::default()
    };
    kubeconfig.auth_infos = vec![NamedAuthInfo {
        name: "default-auth".to_owned(),
        auth_info: Some(user),
        ..NamedAuthInfo::default()
    }];
    kubeconfig.contexts = vec![NamedContext {
        name: "default-context".to_owned(),
        context: Some(KubeContext {
            cluster,
            user: Some("default-auth".to_owned()),
            ..KubeContext::default()
        }),
        ..NamedContext::default()
    }];
    kubeconfig.current_context = Some("default-context".to_owned());
    Ok(kubeconfig)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::certificates::v1::{
        CertificateSigningRequestCondition, CertificateSigningRequestStatus,
    };

    use super::*;

    #[test]
    fn the_same_key_asks_under_the_same_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki/client.key");
        let first = signing_request("n1", &ensure_key(&path).unwrap()).unwrap();
        let second = signing_request("n1", &ensure_key(&path).unwrap()).unwrap();
        assert_eq!(first.metadata.name, second.metadata.name);
        let text = String::from_utf8(first.spec.request.0).unwrap();
        assert!(text.starts_with("-----BEGIN CERTIFICATE REQUEST-----"), "{text}");
    }

    #[test]
    fn a_denial_ends_the_wait_and_says_why() {
        let mut request = signing_request("n1", &KeyPair::generate().unwrap()).unwrap();
        assert_eq!(outcome(&request).unwrap(), None);
        request.status = Some(CertificateSigningRequestStatus {
            conditions: Some(vec![CertificateSigningRequestCondition {
                type_: "Denied".to_owned(),
                message: Some("who are you".to_owned()),
                ..CertificateSigningRequestCondition::default()
            }]),
            certificate: None,
        });
        let error = outcome(&request).unwrap_err().to_string();
        assert!(error.ends_with("Denied: who are you"), "{error}");
    }
}
