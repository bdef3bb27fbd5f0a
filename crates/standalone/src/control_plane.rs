//! The whole: store, registry, certificates, listeners, controllers.

mod bootstrap;
mod kubeconfig;

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use ipnetwork::IpNetwork;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::pki::{self, Authority};
use crate::auth::token::Tokens;
use crate::registry::{Registry, ServiceNetwork};
use crate::server::{self, Server};

/// What an embedded control plane needs to know.
#[derive(Debug)]
pub struct StandaloneConfig {
    /// Where everything is kept. Made with mode 0700.
    pub data_dir: PathBuf,
    /// Where to serve; bound by the caller, perhaps in another network namespace.
    pub listeners: Vec<TcpListener>,
    /// The address under which pods reach the server, for the Service `kubernetes`.
    pub advertise_address: IpAddr,
    /// The port of `advertise_address`.
    pub port: u16,
    /// The URL in kubeconfigs; `https://127.0.0.1:<port of the first listener>` when empty.
    pub server_url: String,
    /// More names and addresses for the server's certificate.
    pub extra_sans: Vec<String>,
    /// IPv4 network of ClusterIPs.
    pub service_cidr_v4: Option<IpNetwork>,
    /// IPv6 network of ClusterIPs.
    pub service_cidr_v6: Option<IpNetwork>,
    /// Networks from which nodes get their `spec.podCIDRs`, one per address family; may be empty.
    pub pod_cidrs: Vec<IpNetwork>,
    /// Ports that NodePort Services may have.
    pub node_port_range: RangeInclusive<u16>,
    /// The cluster's DNS domain.
    pub cluster_domain: String,
    /// Whether controllers and scheduler run.
    pub controllers: bool,
}

impl StandaloneConfig {
    /// A configuration with Kubernetes' usual values.
    #[must_use]
    pub fn new(data_dir: PathBuf, listeners: Vec<TcpListener>) -> Self {
        let network = ServiceNetwork::default();
        Self {
            data_dir,
            listeners,
            advertise_address: Ipv4Addr::LOCALHOST.into(),
            port: 6443,
            server_url: String::new(),
            extra_sans: Vec::new(),
            service_cidr_v4: network.v4,
            service_cidr_v6: network.v6,
            pod_cidrs: Vec::new(),
            node_port_range: network.node_ports,
            cluster_domain: "cluster.local".to_owned(),
            controllers: true,
        }
    }
}

/// A running control plane.
pub struct ControlPlane {
    registry: Registry,
    authority: Authority,
    kubeconfigs: PathBuf,
    server_url: String,
    stop: CancellationToken,
    tasks: TaskTracker,
    controllers: Option<crate::controllers::Tasks>,
}

/// Starts a control plane; it serves when this returns.
///
/// # Errors
/// When the data directory, the store or the certificates are unusable: the text says which file and
/// what to do.
pub async fn start(config: StandaloneConfig) -> anyhow::Result<ControlPlane> {
    make_folders(&config.data_dir)?;
    let network = ServiceNetwork {
        v4: config.service_cidr_v4,
        v6: config.service_cidr_v6,
        node_ports: config.node_port_range.clone(),
    };
    let pki_dir = config.data_dir.join("pki");
    let authority = Authority::open(&pki_dir).context("the certificate authority is unusable")?;
    let signing = pki::signing_key(&pki_dir.join("sa.key"))?;
    let tokens = Tokens::new(signing.serialized_der())
        .map_err(|e| anyhow::anyhow!("{} is unusable: {e}", pki_dir.join("sa.key").display()))?;
    let api_service =
        bootstrap::ApiService { address: config.advertise_address, port: config.port };
    let registry = Registry::open_with(&config.data_dir, network)?;
    bootstrap::run(&registry, &api_service)
        .await
        .context("cannot make the cluster's first objects")?;

    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let (addresses, names) = certificate_names(&config);
    let leaf = authority.server("kube-apiserver", &addresses, &names)?;
    let tls = server::tls(&authority, &leaf)?;
    let server = Arc::new(Server::new(
        registry.clone(),
        Arc::new(tokens),
        &authority,
        stop.clone(),
        tasks.clone(),
    )?);
    let server_url = server_url(&config)?;
    for listener in config.listeners {
        let (server, tls) = (Arc::clone(&server), Arc::clone(&tls));
        tasks.spawn(async move {
            if let Err(error) = server.serve(listener, tls).await {
                tracing::error!(error = format!("{error:#}"), "The API server lost a listener");
            }
        });
    }
    tasks.spawn(bootstrap::keep_api_service(registry.clone(), api_service, stop.clone()));
    let mut plane = ControlPlane {
        registry,
        kubeconfigs: config.data_dir.join("kubeconfig"),
        authority,
        server_url,
        stop,
        tasks,
        controllers: None,
    };
    plane.write_kubeconfigs()?;
    if config.controllers {
        let root_ca_pem = plane.authority.ca_pem.clone();
        let settings = crate::controllers::ControllersConfig {
            root_ca_pem,
            node_ranges: config.pod_cidrs.iter().map(ToString::to_string).collect(),
        };
        let tasks = crate::controllers::start(&plane.registry, settings, plane.stop.child_token())?;
        plane.controllers = Some(tasks);
    }
    Ok(plane)
}

impl ControlPlane {
    /// The API in the process.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The kubeconfig of the administrator.
    #[must_use]
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.kubeconfigs.join("admin.yaml")
    }

    /// The CA's certificate in PEM.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.authority.ca_pem
    }

    /// The URL that kubeconfigs name.
    #[must_use]
    pub fn server_url(&self) -> &str {
        &self.server_url
    }

    /// Writes a kubeconfig for `user` in `groups` to `<data_dir>/kubeconfig/<file>.yaml`, mode 0600.
    /// `server_url` overrides the URL, for clients that reach the server on another way.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn kubeconfig_for(
        &self,
        file: &str,
        user: &str,
        groups: &[&str],
        server_url: Option<&str>,
    ) -> anyhow::Result<PathBuf> {
        let leaf = self.authority.client(user, groups)?;
        let url = server_url.unwrap_or(&self.server_url);
        let text = kubeconfig::render(url, &self.authority.ca_pem, user, &leaf);
        let path = self.kubeconfigs.join(format!("{file}.yaml"));
        keelson_durable::write(&path, text.as_bytes(), 0o600)
            .with_context(|| format!("cannot write the kubeconfig {}", path.display()))?;
        Ok(path)
    }

    fn write_kubeconfigs(&self) -> anyhow::Result<()> {
        self.kubeconfig_for("admin", "kubernetes-admin", &["system:masters"], None)?;
        self.kubeconfig_for(
            "proxy",
            "system:kube-proxy",
            &["system:node-proxier", "system:kube-proxy"],
            None,
        )?;
        self.kubeconfig_for("node", "system:node:keelson", &["system:nodes"], None)?;
        Ok(())
    }

    /// Ends watches, connections and controllers, and waits for them for a few seconds. What was
    /// answered is on the disk.
    pub async fn shutdown(self) {
        if let Some(controllers) = self.controllers {
            controllers.shutdown().await;
        }
        self.stop.cancel();
        self.tasks.close();
        let patience = std::time::Duration::from_secs(3);
        if tokio::time::timeout(patience, self.tasks.wait()).await.is_err() {
            tracing::info!("Some API connections were still open at the end");
        }
    }
}

fn make_folders(data_dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    use std::os::unix::fs::PermissionsExt as _;
    for folder in [data_dir.to_owned(), data_dir.join("pki"), data_dir.join("kubeconfig")] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .and_then(|()| {
                std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700))
            })
            .with_context(|| format!("cannot make the folder {} (mode 0700)", folder.display()))?;
    }
    Ok(())
}

fn server_url(config: &StandaloneConfig) -> anyhow::Result<String> {
    if !config.server_url.is_empty() {
        return Ok(config.server_url.clone());
    }
    let first = config.listeners.first().context("the control plane has no listener")?;
    let address = first.local_addr().context("the listener has no address")?;
    Ok(if address.ip().is_unspecified() {
        format!("https://127.0.0.1:{}", address.port())
    } else {
        format!("https://{address}")
    })
}

fn certificate_names(config: &StandaloneConfig) -> (Vec<IpAddr>, Vec<String>) {
    let network = ServiceNetwork {
        v4: config.service_cidr_v4,
        v6: config.service_cidr_v6,
        node_ports: config.node_port_range.clone(),
    };
    let mut addresses = vec![
        Ipv4Addr::LOCALHOST.into(),
        std::net::Ipv6Addr::LOCALHOST.into(),
        config.advertise_address,
    ];
    addresses.extend(network.api_address());
    addresses.extend(config.listeners.iter().filter_map(|l| l.local_addr().ok()).map(|a| a.ip()));
    let mut names: Vec<String> =
        ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
            .map(str::to_owned)
            .to_vec();
    names.push(format!("kubernetes.default.svc.{}", config.cluster_domain));
    for extra in &config.extra_sans {
        match extra.parse() {
            Ok(address) => addresses.push(address),
            Err(_) => names.push(extra.clone()),
        }
    }
    addresses.retain(|a| !a.is_unspecified());
    addresses.sort_unstable();
    addresses.dedup();
    (addresses, names)
}
