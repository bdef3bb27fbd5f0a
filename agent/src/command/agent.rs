//! `keelson agent`: the node agent as a process of its own, under the kubelet's usual flags.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::image_gc::ImageGcArgs;
use crate::config::{AgentConfig, BadValue, kubelet, labels};

/// Run the node agent: pods of one node, through containerd.
///
/// Flags have the kubelet's names and beat the file named by --config.
#[derive(Debug, Default, Args)]
pub struct AgentArgs {
    /// KubeletConfiguration file (kubelet.config.k8s.io/v1beta1), read as it is; fields without
    /// effect are named in warnings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How to reach the API server; without it only static pods run
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Credentials to request a client certificate with when --kubeconfig does not exist yet
    #[arg(long, value_name = "FILE")]
    bootstrap_kubeconfig: Option<PathBuf>,
    /// Name of the Node instead of the machine's host name
    #[arg(long, value_name = "NAME")]
    hostname_override: Option<String>,
    /// Address of the node, or one per family separated by a comma [default: the address of the
    /// link with the default route]
    #[arg(long, value_name = "IP[,IP]")]
    node_ip: Option<String>,
    /// Labels to register the node with (a=b,c=d)
    #[arg(long, value_name = "LABELS")]
    node_labels: Option<String>,
    /// Taints to register the node with (key=value:NoSchedule,...)
    #[arg(long, value_name = "TAINTS")]
    register_with_taints: Option<String>,
    /// Create the Node object [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    register_node: Option<bool>,
    /// Folder of what survives a reboot [default: /var/lib/keelson]
    #[arg(long, value_name = "DIR")]
    root_dir: Option<PathBuf>,
    /// Folder of what does not survive a reboot [default: /run/keelson]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Folder of the certificates that the agent makes [default: pki in the root folder]
    #[arg(long, value_name = "DIR")]
    cert_dir: Option<PathBuf>,
    /// Folder of the container logs [default: /var/log/pods]
    #[arg(long, value_name = "DIR")]
    pod_logs_dir: Option<PathBuf>,
    /// containerd's socket [default: unix:///run/containerd/containerd.sock]
    #[arg(long, value_name = "ENDPOINT")]
    container_runtime_endpoint: Option<String>,
    /// containerd namespace of this node's containers [default: keelson]
    #[arg(long, value_name = "NAME")]
    containerd_namespace: Option<String>,
    /// Folder of manifests to run without asking the API server
    #[arg(long, value_name = "DIR")]
    pod_manifest_path: Option<PathBuf>,
    /// Addresses that pods ask for names (IP,IP)
    #[arg(long, value_name = "IPS")]
    cluster_dns: Option<String>,
    /// Domain that cluster names end in
    #[arg(long, value_name = "DOMAIN")]
    cluster_domain: Option<String>,
    /// Resolver configuration that pods inherit; empty for none [default: /etc/resolv.conf]
    #[arg(long, value_name = "FILE")]
    resolv_conf: Option<PathBuf>,
    /// How many pods may run here [default: 110]
    #[arg(long, value_name = "COUNT")]
    max_pods: Option<u32>,
    /// Who creates cgroups: cgroupfs or systemd [default: cgroupfs]
    #[arg(long, value_name = "DRIVER")]
    cgroup_driver: Option<String>,
    /// Cgroup below which the pods' cgroups are made [default: /]
    #[arg(long, value_name = "PATH")]
    cgroup_root: Option<String>,
    /// Resources withheld from pods for the node's own services (cpu=200m,memory=150Mi)
    #[arg(long, value_name = "RESOURCES")]
    kube_reserved: Option<String>,
    /// Resources withheld from pods for the rest of the system (cpu=200m,memory=150Mi)
    #[arg(long, value_name = "RESOURCES")]
    system_reserved: Option<String>,
    /// Folder of the CNI configuration lists [default: /etc/cni/net.d]
    #[arg(long, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Folders of the CNI plugins, separated by commas [default: /opt/cni/bin and this program's]
    #[arg(long, value_name = "DIRS", value_delimiter = ',')]
    cni_bin_dir: Vec<PathBuf>,
    /// Network namespace to pull images from, when the node's own has no way out
    #[arg(long, value_name = "PATH")]
    pull_netns: Option<PathBuf>,
    /// Certificate chain of the HTTPS API in PEM [default: self-signed]
    #[arg(long, value_name = "FILE")]
    tls_cert_file: Option<PathBuf>,
    /// Key of --tls-cert-file in PEM
    #[arg(long, value_name = "FILE")]
    tls_private_key_file: Option<PathBuf>,
    /// CA of the client certificates that the HTTPS API accepts
    #[arg(long, value_name = "FILE")]
    client_ca_file: Option<PathBuf>,
    /// Let requests without credentials in as system:anonymous [default: false]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    anonymous_auth: Option<bool>,
    /// Ask the API server whom bearer tokens belong to [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    authentication_token_webhook: Option<bool>,
    /// Who decides about requests to the HTTPS API: Webhook or AlwaysAllow [default: Webhook]
    #[arg(long, value_name = "MODE")]
    authorization_mode: Option<String>,
    /// Address of the HTTPS API [default: every address]
    #[arg(long, value_name = "IP")]
    address: Option<String>,
    /// Port of the HTTPS API [default: 10250]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Port of /healthz without TLS; 0 switches it off [default: 10248]
    #[arg(long, value_name = "PORT")]
    healthz_port: Option<u16>,
    /// Address of /healthz without TLS [default: 127.0.0.1]
    #[arg(long, value_name = "IP")]
    healthz_bind_address: Option<String>,
    /// How the cloud provider names this machine (spec.providerID)
    #[arg(long, value_name = "ID")]
    provider_id: Option<String>,
    /// Runtime classes, separated by commas, whose pods' sockets the service proxy shall leave alone, as with the
    /// annotation keelson.io/socket-lb: disabled (virtual machines)
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    socket_exempt_runtime_classes: Vec<String>,
    /// How many images the Node lists; -1 is all [default: 50]
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true)]
    node_status_max_images: Option<i32>,
    #[command(flatten)]
    image_gc: ImageGcArgs,
    /// How much to log: 0-1 is info, 2-4 debug, from 5 on everything; RUST_LOG beats it
    #[arg(short, long, value_name = "LEVEL")]
    v: Option<u8>,
}

impl AgentArgs {
    /// How much to log.
    pub fn verbosity(&self) -> u8 {
        self.v.unwrap_or(0)
    }

    /// Runs the agent until SIGTERM or SIGINT; its pods run on.
    ///
    /// # Errors
    /// When the configuration cannot be, or the agent cannot work on this machine.
    pub async fn run(self) -> anyhow::Result<()> {
        let (config, warnings) = self.into_config()?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let shutdown = CancellationToken::new();
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = shutdown.clone();
        let told = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.cancel();
        };
        let agent = crate::agent::run(config, shutdown);
        // Whichever ends first: a signal lets the agent end, an agent that failed needs no signal.
        let mut agent = std::pin::pin!(agent);
        tokio::select! {
            ended = &mut agent => ended,
            () = told => agent.await,
        }
    }

    /// The configuration of these flags and of the file that they name, with the warnings that the
    /// user should see.
    ///
    /// # Errors
    /// When the file or a flag has a value that cannot be.
    pub fn into_config(self) -> anyhow::Result<(AgentConfig, Vec<String>)> {
        let mut config = AgentConfig::default();
        let warnings = match &self.config {
            Some(path) => kubelet::apply_file(&mut config, path)?,
            None => Vec::new(),
        };
        self.apply(&mut config)?;
        if config.node_name.is_empty() {
            config.node_name = machine_name().context("hint: give --hostname-override")?;
        }
        if !labels::is_dns_subdomain(&config.node_name) {
            let expected = "a DNS name in lower case (such as node-1.example.com)";
            let found = format!("{:?}", config.node_name);
            return Err(BadValue::new("--hostname-override", found, expected).into());
        }
        Ok((config, warnings))
    }

    fn apply(self, config: &mut AgentConfig) -> Result<(), BadValue> {
        config.kubeconfig = self.kubeconfig.clone().or(config.kubeconfig.take());
        config.bootstrap_kubeconfig =
            self.bootstrap_kubeconfig.clone().or(config.bootstrap_kubeconfig.take());
        config.static_pod_path = self.pod_manifest_path.clone().or(config.static_pod_path.take());
        config.cert_dir = self.cert_dir.clone().or(config.cert_dir.take());
        set(&mut config.root_dir, self.root_dir.clone());
        set(&mut config.run_dir, self.run_dir.clone());
        set(&mut config.pod_logs_dir, self.pod_logs_dir.clone());
        self.apply_node(config)?;
        self.apply_runtime(config)?;
        self.image_gc.apply(&mut config.image_gc)?;
        self.apply_server(config)
    }

    fn apply_node(&self, config: &mut AgentConfig) -> Result<(), BadValue> {
        if let Some(name) = &self.hostname_override {
            config.node_name = name.trim().to_lowercase();
        }
        if let Some(text) = &self.node_ip {
            config.node_ips = parse_addresses("--node-ip", text)?;
        }
        if let Some(text) = &self.cluster_dns {
            config.pods.cluster_dns = parse_addresses("--cluster-dns", text)?;
        }
        set(&mut config.pods.cluster_domain, self.cluster_domain.clone());
        set(&mut config.pods.resolv_conf, self.resolv_conf.clone());
        if !self.socket_exempt_runtime_classes.is_empty() {
            config
                .pods
                .socket_exempt_runtime_classes
                .clone_from(&self.socket_exempt_runtime_classes);
        }
        let node = &mut config.node;
        set(&mut node.register, self.register_node);
        set(&mut node.max_pods, self.max_pods);
        if let Some(count) = self.node_status_max_images {
            node.status_max_images = kubelet::parse_max_images("--node-status-max-images", count)?;
        }
        node.provider_id = self.provider_id.clone().or(node.provider_id.take());
        if let Some(text) = &self.node_labels {
            node.labels = labels::parse_labels("--node-labels", text)?;
        }
        if let Some(text) = &self.register_with_taints {
            node.taints = labels::parse_taints("--register-with-taints", text)?;
        }
        for (flag, text, into) in [
            ("--kube-reserved", &self.kube_reserved, &mut node.kube_reserved),
            ("--system-reserved", &self.system_reserved, &mut node.system_reserved),
        ] {
            let Some(text) = text else { continue };
            into.clear();
            for pair in text.split(',').filter(|pair| !pair.is_empty()) {
                let (resource, amount) = pair.split_once('=').unwrap_or((pair, ""));
                let value = kubelet::parse_reserved(flag, resource.trim(), amount.trim())?;
                into.insert(resource.trim().to_owned(), value);
            }
        }
        Ok(())
    }

    fn apply_runtime(&self, config: &mut AgentConfig) -> Result<(), BadValue> {
        let runtime = &mut config.runtime;
        if let Some(text) = &self.container_runtime_endpoint {
            runtime.socket = kubelet::parse_endpoint("--container-runtime-endpoint", text)?;
        }
        if let Some(text) = &self.cgroup_driver {
            runtime.cgroup_driver = kubelet::parse_cgroup_driver("--cgroup-driver", text)?;
        }
        set(&mut runtime.namespace, self.containerd_namespace.clone());
        set(&mut runtime.cgroup_root, self.cgroup_root.clone());
        set(&mut runtime.cni_conf_dir, self.cni_conf_dir.clone());
        if !self.cni_bin_dir.is_empty() {
            runtime.cni_bin_dirs.clone_from(&self.cni_bin_dir);
        }
        runtime.pull_netns = self.pull_netns.clone().or(runtime.pull_netns.take());
        Ok(())
    }

    fn apply_server(self, config: &mut AgentConfig) -> Result<(), BadValue> {
        let server = &mut config.server;
        let tls = kubelet::pair_tls(
            "--tls-cert-file",
            self.tls_cert_file,
            "--tls-private-key-file",
            self.tls_private_key_file,
        )?;
        server.tls = tls.or(server.tls.take());
        server.client_ca_file = self.client_ca_file.or(server.client_ca_file.take());
        set(&mut server.anonymous, self.anonymous_auth);
        set(&mut server.token_review, self.authentication_token_webhook);
        if let Some(text) = &self.authorization_mode {
            server.authorization = kubelet::parse_authorization("--authorization-mode", text)?;
        }
        if let Some(text) = &self.address {
            server.address = parse_address("--address", text)?;
        }
        set(&mut server.port, self.port);
        let mut healthz = config.healthz.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
        if let Some(text) = &self.healthz_bind_address {
            healthz.set_ip(parse_address("--healthz-bind-address", text)?);
        }
        if let Some(port) = self.healthz_port {
            healthz.set_port(port);
        }
        config.healthz = (healthz.port() != 0).then_some(healthz);
        Ok(())
    }
}

fn set<T>(target: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *target = value;
    }
}

fn parse_address(flag: &str, text: &str) -> Result<IpAddr, BadValue> {
    let expected = "an IP address";
    text.trim().parse().map_err(|_| BadValue::new(flag, format!("{text:?}"), expected))
}

fn parse_addresses(flag: &str, text: &str) -> Result<Vec<IpAddr>, BadValue> {
    text.split(',').filter(|a| !a.trim().is_empty()).map(|a| parse_address(flag, a)).collect()
}

/// The machine's host name as the kubelet takes it: lower case, without white space.
///
/// # Errors
/// When the kernel does not say.
pub fn machine_name() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("cannot read this machine's host name")?;
    Ok(name.to_string_lossy().trim().to_lowercase())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        agent: AgentArgs,
    }

    fn config(flags: &[&str]) -> Result<AgentConfig, String> {
        let args = ["agent", "--hostname-override=Node-1"].iter().chain(flags);
        let cli = Cli::try_parse_from(args).map_err(|error| error.to_string())?;
        cli.agent.into_config().map(|(config, _)| config).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn the_usual_flags_become_a_configuration() {
        let config = config(&[
            "--kubeconfig=/etc/node.yaml",
            "--node-ip=192.0.2.7,2001:db8::7",
            "--node-labels=a=b",
            "--register-with-taints=x=y:NoExecute",
            "--register-node=false",
            "--cluster-dns=192.0.2.10",
            "--kube-reserved=cpu=250m,memory=1Gi",
            "--anonymous-auth",
            "--cni-bin-dir=/a,/b",
            "--healthz-port=0",
            "-v=4",
        ])
        .unwrap();
        assert_eq!(config.node_name, "node-1");
        assert_eq!(config.node_ips.len(), 2);
        assert_eq!(config.node.labels["a"], "b");
        assert!(!config.node.register && config.server.anonymous);
        assert_eq!(config.node.kube_reserved["cpu"], 250);
        assert_eq!(config.runtime.cni_bin_dirs, [Path::new("/a"), Path::new("/b")]);
        assert_eq!(config.healthz, None);
    }

    #[test]
    fn without_flags_the_defaults_are_the_kubelets() {
        let config = config(&[]).unwrap();
        assert_eq!(config, AgentConfig { node_name: "node-1".into(), ..AgentConfig::default() });
    }

    #[test]
    fn flags_beat_the_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(
            b"apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
              maxPods: 20\nclusterDomain: a.example\n",
        )
        .unwrap();
        let path = format!("--config={}", file.path().display());
        let config = config(&[&path, "--max-pods=30"]).unwrap();
        assert_eq!(config.node.max_pods, 30);
        assert_eq!(config.pods.cluster_domain, "a.example");
    }

    #[test]
    fn bad_flags_are_named() {
        for (flags, want) in [
            (&["--node-ip=node"][..], "--node-ip: \"node\" is not an IP address"),
            (&["--cgroup-driver=x"], "--cgroup-driver: \"x\" is not cgroupfs or systemd"),
            (&["--tls-cert-file=a"], "--tls-private-key-file: nothing is not a file"),
            (&["--hostname-override=a_b"], "--hostname-override"),
            (&["--container-runtime-endpoint=tcp://x"], "is not a Unix socket"),
            (&["--image-gc-low-threshold=85"], "85 is not less than imageGCHigh"),
            (&["--minimum-image-ttl-duration=2"], "--minimum-image-ttl-duration: \"2\" is not a d"),
            (&["--node-status-max-images=-2"], "--node-status-max-images: -2 is not a number"),
            (&["--config=/nowhere/kubelet.yaml"], "/nowhere/kubelet.yaml"),
        ] {
            let error = config(flags).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }
}
