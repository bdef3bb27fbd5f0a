//! The network of one proxy: a node with two pods, and a cable to the outside of the bench's ground.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ipnetwork::IpNetwork;
use keelson_netlink::netns::{self, Netns};
use keelson_netlink::route::{Route, Rtnl, VethEnd, VethPair};

use super::load::Server;
use super::objects;
use super::proxy::Contender;
use crate::api::PATIENCE;
use crate::bpf::ThreadGroup;
use crate::cluster::{Ground, OUTSIDE_ADDRESS};
use crate::process::Daemon;

const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 244, 0, 3));
/// The node as its pods see it.
const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 244, 0, 1));

/// What all worlds are cabled to passes their packets on to the API server, and that one answers.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn route_between(ground: &Ground<'_>) -> Result<()> {
    let outside = Netns::open(&ground.outside_netns())?;
    set_inside(&outside, &[("net/ipv4/ip_forward", "1")])?;
    let node = Netns::open(&ground.netns())?;
    let mut rtnl = Rtnl::open_in(&node)?;
    let way = Route {
        gateway: Some(OUTSIDE_ADDRESS),
        ..Route::to(IpNetwork::new(Ipv4Addr::new(198, 18, 0, 0).into(), 15)?)
    };
    Ok(rtnl.ensure_route(&way)?)
}

/// Where connections are made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spot {
    /// A pod on the server's node.
    Pod,
    /// Somebody outside of the cluster.
    Outside,
}

/// A proxy and what it serves.
pub(super) struct World {
    pub(super) label: String,
    pub(super) node: Ipv4Addr,
    /// None where packets find no Service, and nothing that looks for one.
    proxy: Option<Daemon>,
    server: Server,
    client: Netns,
    outside: Netns,
    /// Pods are in cgroups, whatever proxy there is.
    cgroup: ThreadGroup,
    _pin: Pin,
}

/// A pinned namespace; not pinned any more when dropped.
struct Pin(PathBuf);

impl Drop for Pin {
    fn drop(&mut self) {
        if let Err(error) = netns::delete(&self.0) {
            eprintln!("{error}: {}", error.source);
        }
    }
}

impl World {
    /// Makes the network, starts the proxy if there is one, and waits until the measured Service answers.
    ///
    /// # Errors
    /// When that does not happen.
    pub(super) fn make(
        ground: &Ground<'_>,
        contender: Option<Contender>,
        number: u8,
    ) -> Result<World> {
        let name = format!("{}-datapath-{number}", ground.node().name());
        let netns = Path::new("/run/netns").join(&name);
        let node = Netns::create(&netns)?;
        let pin = Pin(netns.clone());
        let outside = Netns::open(&ground.outside_netns())?;
        let address = cable(&node, &outside, number)?;
        let server = Server::start(pod(&node, "server", objects::SERVER)?)?;
        let client = pod(&node, "client", CLIENT)?;
        // Whoever closes first keeps its port for a minute otherwise.
        let again = [("net/ipv4/tcp_tw_reuse", "1")];
        [&client, &outside].iter().try_for_each(|netns| set_inside(netns, &again))?;
        let mut world = World {
            label: "no proxy".into(),
            node: address,
            proxy: None,
            server,
            client,
            outside,
            cgroup: ThreadGroup::make(&name)?,
            _pin: pin,
        };
        if let Some(contender) = contender {
            world.start(ground, &contender, &netns, &name)?;
        }
        Ok(world)
    }

    fn start(
        &mut self,
        ground: &Ground<'_>,
        contender: &Contender,
        netns: &Path,
        name: &str,
    ) -> Result<()> {
        self.label = contender.label();
        let folder = ground.node().scratch().join(name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let command = contender.command(ground, netns, &folder, self.cgroup.path())?;
        let proxy = Daemon::start(&self.label, command, &folder.join("log"), name)?;
        let places =
            [(Spot::Pod, objects::service()), (Spot::Outside, objects::node_port(self.node))];
        self.connect_from("20000 29999")?;
        let mut all = places.into_iter();
        let serves = all.try_for_each(|(spot, address)| self.run(spot, || answers(address)));
        self.connect_from("32768 65000")?;
        let log = proxy.log_tail();
        self.proxy = Some(proxy);
        serves.with_context(|| format!("{} does not serve; its log ends with:\n{log}", self.label))
    }

    /// The ports that clients have. Whose attempts come before the Service is known to connection tracking as
    /// somebody that nothing is to be done for: the port is spoiled for two minutes.
    fn connect_from(&self, ports: &str) -> Result<()> {
        // Who is lost shall not hold up the others for minutes.
        let settings = [("net/ipv4/ip_local_port_range", ports), ("net/ipv4/tcp_syn_retries", "2")];
        [&self.client, &self.outside].iter().try_for_each(|netns| set_inside(netns, &settings))
    }

    pub(super) fn has_services(&self) -> bool {
        self.proxy.is_some()
    }

    /// Runs `work` on a thread there; its sockets are those of the place.
    ///
    /// # Errors
    /// Those of `work`, or when the place cannot be entered.
    pub(super) fn run<T: Send>(
        &self,
        spot: Spot,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        match spot {
            Spot::Outside => self.outside.run(work)?,
            Spot::Pod => self.client.run(|| self.cgroup.run(work)?)?,
        }
    }

    /// Ends the proxy; then the network goes, too.
    ///
    /// # Errors
    /// When the proxy does not end.
    pub(super) async fn stop(self) -> Result<()> {
        if let Some(proxy) = self.proxy {
            proxy.stop().await?;
        }
        self.server.stop()
    }
}

fn answers(address: SocketAddr) -> Result<()> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        match TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            Ok(_) => return Ok(()),
            Err(_) => std::thread::park_timeout(Duration::from_millis(20)),
        }
    }
    bail!("{address} does not answer after {PATIENCE:?}")
}

/// The node's way out; returns the node's address.
fn cable(node: &Netns, outside: &Netns, number: u8) -> Result<Ipv4Addr> {
    let name = format!("world{number}");
    let [near, far] = [2, 1].map(|host| Ipv4Addr::new(198, 19, number, host));
    join(node, "eth0", near.into(), outside, &name, far.into(), 24)?;
    let mut rtnl = Rtnl::open_in(node)?;
    let eth0 = rtnl.link("eth0")?.context("eth0 is gone")?.index;
    rtnl.ensure_route(&Route::default_via(far.into(), eth0))?;
    set_inside(node, &[("net/ipv4/ip_forward", "1")])?;
    Ok(near)
}

/// A pod with a cable of its own to the node.
fn pod(node: &Netns, name: &str, address: IpAddr) -> Result<Netns> {
    let pod = Netns::anonymous()?;
    join(&pod, "eth0", address, node, name, GATEWAY, 32)?;
    let mut rtnl = Rtnl::open_in(&pod)?;
    let eth0 = rtnl.link("eth0")?.context("eth0 is gone")?.index;
    rtnl.ensure_route(&Route::host(GATEWAY, eth0))?;
    rtnl.ensure_route(&Route::default_via(GATEWAY, eth0))?;
    let mut rtnl = Rtnl::open_in(node)?;
    let link = rtnl.link(name)?.context("a pod's link is gone")?.index;
    rtnl.ensure_route(&Route::host(address, link))?;
    Ok(pod)
}

fn join(
    here: &Netns,
    name: &str,
    address: IpAddr,
    there: &Netns,
    far_name: &str,
    far_address: IpAddr,
    prefix: u8,
) -> Result<()> {
    Rtnl::open_in(here)?.create_veth(&VethPair {
        near: VethEnd { name, mac: None, netns: None },
        far: VethEnd { name: far_name, mac: None, netns: Some(there.as_fd()) },
        mtu: None,
    })?;
    for (netns, name, address) in [(here, name, address), (there, far_name, far_address)] {
        let mut rtnl = Rtnl::open_in(netns)?;
        rtnl.set_up("lo")?;
        rtnl.set_up(name)?;
        let link = rtnl.link(name)?.context("a link is gone")?.index;
        rtnl.ensure_address(link, IpNetwork::new(address, prefix)?)?;
    }
    Ok(())
}

fn set_inside(netns: &Netns, settings: &[(&str, &str)]) -> Result<()> {
    netns.run(|| {
        settings.iter().try_for_each(|(name, value)| {
            let path = Path::new("/proc/sys").join(name);
            fs::write(&path, value).with_context(|| format!("cannot set {}", path.display()))
        })
    })?
}
