//! kube-apiserver with its etcd in a node's network namespace, with a certificate authority of its own.
//!
//! The programs are those of envtest: `KUBEBUILDER_ASSETS` names the folder that has them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use serde_json::json;

use crate::node::{PATIENCE, read, tail};

/// Where it answers in the namespace of a node: the address that `keelson up` gives it.
pub const NODE_ADDRESS: &str = "198.18.0.2";
const PORT: u16 = 16443;
const ETCD: &str = "http://127.0.0.1:12379";

/// The programs.
#[derive(Debug, Clone)]
pub struct Assets {
    /// kube-apiserver.
    pub apiserver: PathBuf,
    /// etcd, any version that it can use.
    pub etcd: PathBuf,
}

impl Assets {
    /// Those in the folder that `KUBEBUILDER_ASSETS` names; `None` when it is not set.
    pub fn from_env() -> Option<Assets> {
        let folder = PathBuf::from(std::env::var_os("KUBEBUILDER_ASSETS")?);
        Some(Assets { apiserver: folder.join("kube-apiserver"), etcd: folder.join("etcd") })
    }
}

/// A running kube-apiserver. Gone with the value, and also when the thread that started it is killed.
pub struct ApiServer {
    assets: Assets,
    netns: String,
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
    flags: &'static [&'static str],
    etcd: Child,
    server: Option<Child>,
}

impl ApiServer {
    /// Starts both in the network namespace `netns`, with their files in `folder`, and waits until the API is ready.
    /// `flags` are kube-apiserver's, beyond the usual ones.
    ///
    /// # Errors
    /// When it does not become ready; with the end of its log.
    pub fn start(
        assets: Assets,
        netns: &str,
        folder: PathBuf,
        flags: &'static [&'static str],
    ) -> Result<ApiServer> {
        fs::create_dir_all(&folder)?;
        let (issuer, ca_pem) = authority()?;
        let mut command = inside(netns, &assets.etcd);
        command.args([
            &format!("--data-dir={}", folder.join("etcd").display()),
            &format!("--listen-client-urls={ETCD}"),
            &format!("--advertise-client-urls={ETCD}"),
            "--listen-peer-urls=http://127.0.0.1:12380",
            // Nothing here outlives the machine, and figures must not depend on its disk.
            "--unsafe-no-fsync",
        ]);
        let etcd = spawn(command, &folder.join("etcd.log"))?;
        let netns = netns.to_owned();
        let mut this =
            ApiServer { assets, netns, folder, issuer, ca_pem, flags, etcd, server: None };
        this.write_credentials()?;
        this.launch()?;
        Ok(this)
    }

    /// Starts kube-apiserver and waits until it is ready.
    ///
    /// # Errors
    /// As [`ApiServer::start`].
    pub fn launch(&mut self) -> Result<()> {
        let mut command = inside(&self.netns, &self.assets.apiserver);
        command.args(self.usual_flags()).args(self.flags);
        self.server = Some(spawn(command, &self.log_path())?);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.kubectl(&["get", "--raw", "/readyz"]);
            match answer {
                Ok(text) if text == "ok" => return Ok(()),
                _ if Instant::now() > deadline => bail!("{answer:?}, its log:\n{}", self.log()),
                _ => std::thread::sleep(Duration::from_millis(100)),
            }
            if let Some(status) = self.server.as_mut().and_then(|s| s.try_wait().transpose()) {
                bail!("kube-apiserver ended with {}:\n{}", status?, self.log());
            }
        }
    }

    /// Ends kube-apiserver, not etcd: the API is away until the next [`ApiServer::launch`].
    ///
    /// # Errors
    /// When it does not run.
    pub fn go_away(&mut self) -> Result<()> {
        let mut server = self.server.take().context("kube-apiserver does not run")?;
        kill(Pid::from_raw(server.id().cast_signed()), Signal::SIGKILL)?;
        server.wait()?;
        Ok(())
    }

    /// Where it answers in the namespace.
    pub fn url(&self) -> String {
        format!("https://{NODE_ADDRESS}:{PORT}")
    }

    /// The certificate authority's certificate file, that of clients and of the server.
    pub fn ca_file(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// The kubeconfig of a member of system:masters.
    pub fn admin(&self) -> PathBuf {
        self.folder.join("admin.yaml")
    }

    /// A kubeconfig for `user`, who is in `group`, with a certificate.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn kubeconfig_for(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        let path = self.folder.join(format!("{}.yaml", user.replace(':', "-")));
        self.write_kubeconfig(&path, user, group)?;
        Ok(path)
    }

    /// A kubeconfig with a bearer token.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn kubeconfig_with_token(&self, name: &str, token: &str) -> Result<PathBuf> {
        let path = self.folder.join(format!("{name}.yaml"));
        self.write_kubeconfig_of(&path, &json!({ "token": token }))?;
        Ok(path)
    }

    /// Signs a certificate request in PEM, for clients.
    ///
    /// # Errors
    /// When it is not a request.
    pub fn sign(&self, request: &str) -> Result<String> {
        let mut request = CertificateSigningRequestParams::from_pem(request)?;
        request.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Ok(request.signed_by(&self.issuer)?.pem())
    }

    /// `kubectl` as the administrator, in the namespace.
    pub fn kubectl_command(&self, args: &[&str]) -> Command {
        let mut command = inside(&self.netns, Path::new("kubectl"));
        command.arg("--kubeconfig").arg(self.admin()).args(args);
        // Discovery is cached below HOME by server address; every test has the same.
        command.env("HOME", &self.folder).current_dir(&self.folder);
        command
    }

    /// Runs kubectl and returns what it printed.
    ///
    /// # Errors
    /// When it fails; with what it wrote.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        read(&mut self.kubectl_command(args))
    }

    /// `kubectl apply -f` of `manifest`.
    ///
    /// # Errors
    /// As kubectl.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        let path = self.folder.join("manifest.yaml");
        fs::write(&path, manifest)?;
        self.kubectl(&["apply", "-f", &path.display().to_string()])
    }

    fn usual_flags(&self) -> Vec<String> {
        let file =
            |flag: &str, name: &str| format!("--{flag}={}", self.folder.join(name).display());
        vec![
            format!("--etcd-servers={ETCD}"),
            format!("--secure-port={PORT}"),
            format!("--bind-address={NODE_ADDRESS}"),
            format!("--advertise-address={NODE_ADDRESS}"),
            file("cert-dir", "pki"),
            file("tls-cert-file", "server.crt"),
            file("tls-private-key-file", "server.key"),
            file("client-ca-file", "ca.crt"),
            file("token-auth-file", "tokens.csv"),
            file("kubelet-client-certificate", "kubelet-client.crt"),
            file("kubelet-client-key", "kubelet-client.key"),
            "--kubelet-preferred-address-types=InternalIP".into(),
            file("service-account-key-file", "sa.pub"),
            file("service-account-signing-key-file", "sa.key"),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            "--service-cluster-ip-range=10.96.0.0/16".into(),
            "--authorization-mode=Node,RBAC".into(),
            "--enable-admission-plugins=NodeRestriction".into(),
            "--allow-privileged=true".into(),
            "--max-requests-inflight=3000".into(),
            "--max-mutating-requests-inflight=1000".into(),
        ]
    }

    fn write_credentials(&self) -> Result<()> {
        let key = KeyPair::generate()?;
        let write = |name: &str, text: &str| fs::write(self.folder.join(name), text);
        write("sa.key", &key.serialize_pem())?;
        write("sa.pub", &key.public_key_pem())?;
        write("ca.crt", &self.ca_pem)?;
        // The bootstrap token of the tests; its group may ask for a node's certificate.
        write("tokens.csv", "bootstrap,bootstrap,bootstrap,system:bootstrappers\n")?;
        let mut server = named("kube-apiserver", None);
        server.subject_alt_names = vec![
            SanType::IpAddress(NODE_ADDRESS.parse()?),
            SanType::DnsName(Ia5String::try_from("kubernetes")?),
        ];
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let (certificate, key) = self.issue(&server)?;
        write("server.crt", &certificate)?;
        write("server.key", &key)?;
        // Not of system:masters, whom an agent lets in without asking: the name that clusters of kubeadm use.
        let (certificate, key) = self.client("kube-apiserver-kubelet-client", None)?;
        write("kubelet-client.crt", &certificate)?;
        write("kubelet-client.key", &key)?;
        self.write_kubeconfig(&self.admin(), "admin", Some("system:masters"))
    }

    fn write_kubeconfig(&self, path: &Path, user: &str, group: Option<&str>) -> Result<()> {
        let (certificate, key) = self.client(user, group)?;
        let files = [path.with_extension("crt"), path.with_extension("key")];
        fs::write(&files[0], certificate)?;
        fs::write(&files[1], key)?;
        let user = json!({ "client-certificate": files[0], "client-key": files[1] });
        self.write_kubeconfig_of(path, &user)
    }

    fn write_kubeconfig_of(&self, path: &Path, user: &serde_json::Value) -> Result<()> {
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
            "clusters": [{ "name": "test", "cluster": {
                "server": self.url(), "certificate-authority": self.ca_file(),
            } }],
            "users": [{ "name": "test", "user": user }],
        });
        Ok(fs::write(path, serde_json::to_vec_pretty(&kubeconfig)?)?)
    }

    fn client(&self, user: &str, group: Option<&str>) -> Result<(String, String)> {
        let mut params = named(user, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(&params)
    }

    fn issue(&self, params: &CertificateParams) -> Result<(String, String)> {
        let key = KeyPair::generate()?;
        Ok((params.signed_by(&key, &self.issuer)?.pem(), key.serialize_pem()))
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("apiserver.log")
    }

    fn log(&self) -> String {
        tail(&self.log_path())
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        for child in self.server.iter_mut().chain([&mut self.etcd]) {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// A program in a network namespace, which ends with this thread. Not `ip netns exec`: that hides the cgroups.
pub fn inside(netns: &str, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "nsenter", &format!("--net=/run/netns/{netns}")]);
    command.arg(program);
    command
}

/// Starts `command` with its output in the file `log`.
///
/// # Errors
/// When it cannot be started.
pub fn spawn(mut command: Command, log: &Path) -> Result<Child> {
    let file = fs::OpenOptions::new().create(true).append(true).open(log)?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    command.spawn().with_context(|| format!("cannot run {command:?}"))
}

fn authority() -> Result<(Issuer<'static, KeyPair>, String)> {
    let mut params = named("test-ca", None);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    let pem = params.self_signed(&key)?.pem();
    Ok((Issuer::new(params, key), pem))
}

fn named(name: &str, group: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    if let Some(group) = group {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    params
}
