//! Brings the parts of an all-in-one node up in order, and down again.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ipnetwork::IpNetwork;
use keelson_proxy::backend::Mode;
use keelson_proxy::flags::EbpfFlags;
use keelson_proxy::{LocalSources, ProxyConfig};
use keelson_standalone::StandaloneConfig;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::layout::Layout;
use super::{containerd, ebpf, lock, network};
use crate::agent;
use crate::config::{AgentConfig, ImageGc, Threshold};
use crate::node::addresses::node_addresses;

/// What `keelson up` was asked for.
#[derive(Debug)]
pub struct UpConfig {
    pub layout: Layout,
    /// On the machine's own network instead of a namespace.
    pub host_network: bool,
    pub api_port: u16,
    /// The machine's host name if `None`.
    pub node_name: Option<String>,
    /// One network per family.
    pub pod_cidrs: Vec<IpNetwork>,
    /// One network per family.
    pub service_cidrs: Vec<IpNetwork>,
    /// A containerd to use instead of starting one.
    pub containerd: Option<PathBuf>,
    pub image_gc: ImageGc,
    /// Agent and proxy are run by somebody else.
    pub control_plane_only: bool,
    /// How Services are programmed, in order of preference.
    pub proxy_modes: &'static [Mode],
    pub ebpf: EbpfFlags,
    /// Pods of these runtime classes want their sockets left alone by the service proxy.
    pub socket_exempt_runtime_classes: Vec<String>,
}

/// What the node lives on, once the process is where it belongs.
struct Ground {
    listeners: Vec<TcpListener>,
    addresses: Vec<IpAddr>,
    /// A way to registries, when the node's own network has none.
    pull_netns: Option<PathBuf>,
    containerd: PathBuf,
}

/// Runs a whole node until SIGTERM or SIGINT. Pods keep running.
///
/// Must be called before the process has any other thread: it may move to another network namespace.
///
/// # Errors
/// What the machine lacks or refused, with what to do about it.
pub fn run(config: UpConfig) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("a node needs root: namespaces, cgroups, mounts and the kernel's packet filter");
    }
    let layout = &config.layout;
    make_folders(layout)?;
    let _lock = lock::take(&layout.lock_file())?;
    let ground = settle(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(&config, ground))
}

fn make_folders(layout: &Layout) -> Result<()> {
    let folders = [
        layout.state_dir.clone(),
        layout.run_dir.clone(),
        layout.cni_conf_dir(),
        layout.cni_data_dir(),
        layout.manifest_dir(),
    ];
    for folder in &folders {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    Ok(())
}

/// Everything that must be done by the one first thread: sockets of the machine's own network, then the move.
fn settle(config: &UpConfig) -> Result<Ground> {
    let layout = &config.layout;
    report("Network");
    let mut listeners = vec![listen(Ipv4Addr::LOCALHOST.into(), config.api_port)?];
    let mut pull_netns = None;
    let addresses = if config.host_network {
        node_addresses(&[])
    } else {
        let outside =
            fs::File::open("/proc/self/ns/net").context("cannot open our network namespace")?;
        network::ensure(layout)?;
        keelson_netlink::netns::enter(&layout.netns())?;
        // Kept open for the life of the process: registries are reached from there.
        pull_netns = Some(PathBuf::from(format!("/proc/self/fd/{}", outside.into_raw_fd())));
        // The same URL serves the machine's users and the node's own parts: each has a loopback of its own.
        listeners.push(listen(Ipv4Addr::LOCALHOST.into(), config.api_port)?);
        network::NODE.to_vec()
    };
    let Some(primary) = addresses.first() else {
        bail!("this machine has no address: --host-network needs a link with a default route");
    };
    listeners.push(listen(*primary, config.api_port)?);
    let containerd = match &config.containerd {
        Some(socket) => socket.clone(),
        None => {
            report("containerd");
            containerd::ensure(layout)?;
            layout.containerd_socket()
        }
    };
    Ok(Ground { listeners, addresses, pull_netns, containerd })
}

fn listen(address: IpAddr, port: u16) -> Result<TcpListener> {
    let address = SocketAddr::new(address, port);
    let listener = TcpListener::bind(address).with_context(|| {
        format!("cannot listen on {address} (is it in use? --api-port takes another port)")
    })?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn serve(config: &UpConfig, ground: Ground) -> Result<()> {
    let layout = &config.layout;
    report("Control plane");
    let standalone = standalone_config(config, ground.listeners, &ground.addresses);
    let control_plane =
        keelson_standalone::start(standalone).await.context("the control plane does not start")?;
    write_conflist(&layout.cni_conf_dir(), &layout.cni_data_dir(), &config.pod_cidrs)?;
    let shutdown = CancellationToken::new();
    let node_name = match &config.node_name {
        Some(name) => name.clone(),
        None => crate::command::agent::machine_name()?,
    };
    let mut parts = tokio::task::JoinSet::new();
    if config.control_plane_only {
        sd_notify::notify(&[NotifyState::Ready]).ok();
    } else {
        report("Agent and proxy");
        let mut agent = agent_config(
            layout,
            &node_name,
            &ground.addresses,
            ground.pull_netns,
            ground.containerd,
        );
        agent.image_gc = config.image_gc;
        agent.pods.socket_exempt_runtime_classes.clone_from(&config.socket_exempt_runtime_classes);
        let proxy = proxy_config(config, &node_name, &ground.addresses)?;
        let stop = shutdown.clone();
        parts.spawn(async move { agent::run(agent, stop).await.context("the agent failed") });
        let stop = shutdown.clone();
        parts.spawn(async move {
            keelson_proxy::run(proxy, stop).await.context("the service proxy failed")
        });
    }
    tracing::info!(kubeconfig = %layout.kubeconfig("admin").display(), "The node's API answers");
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let result = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        Some(ended) = parts.join_next() => ended.unwrap_or_else(|e| Err(e.into())),
    };
    tracing::info!("Stopping; pods keep running until `keelson down`");
    sd_notify::notify(&[NotifyState::Stopping]).ok();
    shutdown.cancel();
    while parts.join_next().await.is_some() {}
    control_plane.shutdown().await;
    result
}

fn standalone_config(
    config: &UpConfig,
    listeners: Vec<TcpListener>,
    addresses: &[IpAddr],
) -> StandaloneConfig {
    let first = |v4: bool| config.service_cidrs.iter().copied().find(|cidr| cidr.is_ipv4() == v4);
    let mut standalone = StandaloneConfig::new(config.layout.control_plane_dir(), listeners);
    standalone.advertise_address = addresses.first().copied().unwrap_or(Ipv4Addr::LOCALHOST.into());
    standalone.port = config.api_port;
    standalone.server_url = format!("https://127.0.0.1:{}", config.api_port);
    standalone.extra_sans = addresses.iter().map(ToString::to_string).collect();
    standalone.service_cidr_v4 = first(true);
    standalone.service_cidr_v6 = first(false);
    standalone.pod_cidrs.clone_from(&config.pod_cidrs);
    standalone
}

fn agent_config(
    layout: &Layout,
    node_name: &str,
    addresses: &[IpAddr],
    pull_netns: Option<PathBuf>,
    containerd: PathBuf,
) -> AgentConfig {
    let mut agent = AgentConfig {
        node_name: node_name.to_owned(),
        node_ips: addresses.to_vec(),
        kubeconfig: Some(layout.kubeconfig("node")),
        root_dir: layout.state_dir.clone(),
        run_dir: layout.run_dir.clone(),
        cert_dir: Some(layout.state_dir.join("kubelet-pki")),
        pod_logs_dir: layout.pod_logs_dir(),
        static_pod_path: Some(layout.manifest_dir()),
        ..AgentConfig::default()
    };
    // A machine that is tried out may have a full disk by the kubelet's measure (a tenth free) and room enough.
    agent.node.eviction_disk = Threshold::Amount(1 << 30);
    agent.node.eviction_inodes = Threshold::Share(0.01);
    agent.runtime.socket = containerd;
    agent.runtime.cni_conf_dir = layout.cni_conf_dir();
    agent.runtime.cgroup_root = layout.cgroup_root();
    agent.runtime.pull_netns = pull_netns;
    agent.server.client_ca_file = Some(layout.control_plane_dir().join("pki/ca.crt"));
    agent
}

/// As with pods: a disk that is nearly full by the kubelet's measure may have room enough.
pub fn image_gc() -> ImageGc {
    ImageGc { high_threshold_percent: 95, low_threshold_percent: 90, ..ImageGc::default() }
}

fn proxy_config(config: &UpConfig, node_name: &str, addresses: &[IpAddr]) -> Result<ProxyConfig> {
    let layout = &config.layout;
    Ok(ProxyConfig {
        kubeconfig: Some(layout.kubeconfig("proxy")),
        node_name: node_name.to_owned(),
        node_addresses: addresses.to_vec(),
        modes: config.proxy_modes,
        local_sources: LocalSources::Cidrs(config.pod_cidrs.clone()),
        ebpf: ebpf::config(config)?,
        ..ProxyConfig::default()
    })
}

/// The pod network's configuration, with its state among the node's own.
fn write_conflist(conf_dir: &Path, data_dir: &Path, pod_cidrs: &[IpNetwork]) -> Result<()> {
    let text = keelson_cni::conflist::default_conflist(pod_cidrs);
    let mut list: serde_json::Value = serde_json::from_str(&text)?;
    list["plugins"][0]["dataDir"] = data_dir.display().to_string().into();
    let path = conf_dir.join("10-keelson.conflist");
    Ok(keelson_durable::write(&path, format!("{list:#}\n").as_bytes(), 0o600)?)
}

/// Says where the start has got to, to whoever started us.
fn report(step: &str) {
    tracing::info!(step, "Starting");
    // Without a service manager there is nobody to tell.
    sd_notify::notify(&[NotifyState::Status(&format!("Starting: {step}"))]).ok();
}
