//! kube-apiserver with its etcd, in the node's namespace.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use keelson_tests::node::Node;
use serde_json::json;

use super::version_label;
use crate::api;
use crate::cluster::NODE_ADDRESS;
use crate::process::{Daemon, in_netns};

const PORT: u16 = 16443;
const ETCD: &str = "http://127.0.0.1:12379";
const TOKEN: &str = "bench";

/// A running kube-apiserver.
pub(crate) struct RealServer {
    label: String,
    folder: PathBuf,
    server: Daemon,
    etcd: Daemon,
}

impl RealServer {
    /// Starts etcd and kube-apiserver and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready; with the end of its log.
    pub(crate) async fn start(
        node: &Node,
        program: &Path,
        etcd: Option<&Path>,
    ) -> Result<RealServer> {
        let folder = node.scratch().join("apiserver");
        fs::create_dir_all(&folder)?;
        let netns = Path::new("/run/netns").join(node.name());
        let mut command = in_netns(&netns, &etcd_program(program, etcd));
        command.args([
            &format!("--data-dir={}", folder.join("etcd").display()),
            &format!("--listen-client-urls={ETCD}"),
            &format!("--advertise-client-urls={ETCD}"),
            "--listen-peer-urls=http://127.0.0.1:12380",
            // The peers' figures must not depend on this machine's disk.
            "--unsafe-no-fsync",
        ]);
        let group = format!("{}-bench-etcd", node.name());
        let etcd = Daemon::start("etcd", command, &folder.join("etcd.log"), &group)?;
        write_credentials(&folder)?;
        let mut command = in_netns(&netns, program);
        command.args(flags(&folder));
        let group = format!("{}-bench-apiserver", node.name());
        let log = folder.join("apiserver.log");
        let server = Daemon::start("kube-apiserver", command, &log, &group)?;
        let label = version_label("kube-apiserver", program);
        let mut this = RealServer { label, folder, server, etcd };
        this.wait_ready().await?;
        Ok(this)
    }

    pub(crate) fn url(&self) -> String {
        format!("https://{NODE_ADDRESS}:{PORT}")
    }

    pub(crate) fn describe(&self) -> &str {
        &self.label
    }

    pub(crate) fn admin_kubeconfig(&self) -> PathBuf {
        self.folder.join("admin.json")
    }

    /// There is nothing to be woken by before it listens: asked again and again.
    async fn wait_ready(&mut self) -> Result<()> {
        let client = api::client(&self.admin_kubeconfig(), &self.url()).await?;
        let deadline = tokio::time::Instant::now() + api::PATIENCE;
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            match client.request_text(request).await {
                Ok(text) if text == "ok" => return Ok(()),
                _ if tokio::time::Instant::now() > deadline => {
                    bail!("kube-apiserver is not ready:\n{}", self.server.log_tail())
                }
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
            self.etcd.must_run()?;
            self.server.must_run()?;
        }
    }

    /// Ends both.
    ///
    /// # Errors
    /// When one had to be killed.
    pub(crate) async fn stop(self) -> Result<()> {
        self.server.stop().await?;
        self.etcd.stop().await?;
        Ok(())
    }
}

fn etcd_program(apiserver: &Path, etcd: Option<&Path>) -> PathBuf {
    let beside = apiserver.with_file_name("etcd");
    match etcd {
        Some(path) => path.to_owned(),
        None if beside.is_file() => beside,
        None => PathBuf::from("etcd"),
    }
}

/// A token for everybody, the key that signs service account tokens, and a kubeconfig.
fn write_credentials(folder: &Path) -> Result<()> {
    let key = rcgen::KeyPair::generate().context("cannot make a key")?;
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "bench",
        "contexts": [{ "name": "bench", "context": { "cluster": "bench", "user": "bench" } }],
        "clusters": [{ "name": "bench", "cluster": {
            "server": format!("https://{NODE_ADDRESS}:{PORT}"),
            // Its certificate is one that it makes for itself.
            "insecure-skip-tls-verify": true,
        } }],
        "users": [{ "name": "bench", "user": { "token": TOKEN } }],
    });
    fs::write(folder.join("sa.key"), key.serialize_pem())?;
    fs::write(folder.join("sa.pub"), key.public_key_pem())?;
    fs::write(folder.join("tokens.csv"), format!("{TOKEN},bench,bench,system:masters\n"))?;
    fs::write(folder.join("admin.json"), serde_json::to_vec_pretty(&kubeconfig)?)?;
    Ok(())
}

fn flags(folder: &Path) -> Vec<String> {
    let file = |flag: &str, name: &str| format!("--{flag}={}", folder.join(name).display());
    vec![
        format!("--etcd-servers={ETCD}"),
        format!("--secure-port={PORT}"),
        format!("--bind-address={NODE_ADDRESS}"),
        format!("--advertise-address={NODE_ADDRESS}"),
        file("cert-dir", "pki"),
        file("token-auth-file", "tokens.csv"),
        file("service-account-key-file", "sa.pub"),
        file("service-account-signing-key-file", "sa.key"),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        "--service-cluster-ip-range=10.96.0.0/16".into(),
        "--authorization-mode=AlwaysAllow".into(),
        // Nobody makes the default ServiceAccount here.
        "--disable-admission-plugins=ServiceAccount".into(),
        "--allow-privileged=true".into(),
        "--max-requests-inflight=3000".into(),
        "--max-mutating-requests-inflight=1000".into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcd_is_the_given_one_then_the_one_beside_then_that_of_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let apiserver = folder.path().join("kube-apiserver");
        assert_eq!(etcd_program(&apiserver, Some(Path::new("/x"))), Path::new("/x"));
        assert_eq!(etcd_program(&apiserver, None), Path::new("etcd"));
        fs::write(folder.path().join("etcd"), "").unwrap();
        assert_eq!(etcd_program(&apiserver, None), folder.path().join("etcd"));
    }

    #[test]
    fn the_kubeconfig_can_be_read_by_a_client() {
        let folder = tempfile::tempdir().unwrap();
        write_credentials(folder.path()).unwrap();
        let server = api::server_of(&folder.path().join("admin.json")).unwrap();
        assert_eq!(server, "https://198.18.0.2:16443");
    }
}
