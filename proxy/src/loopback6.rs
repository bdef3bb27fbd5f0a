//! Node ports on ::1.
//!
//! No kernel translates a connection from ::1 to another host: an address of the loopback interface
//! never leaves it. So this process listens there and passes on what it gets to the node's own address,
//! where the kernel serves the node port. The Service sees the node as its client.

mod udp;

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::backend::BackendConfig;
use crate::diff::Change;
use crate::model::{At, Family, Protocol, ServicePlan};

/// How long a port that is taken waits for the next attempt.
const RETRY: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(10);
/// Connections at a time and port: a relay must not eat up the process's files.
const CONNECTIONS: usize = 256;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    ports: BTreeSet<(Protocol, u16)>,
    /// An address of the node that serves node ports.
    to: Option<Ipv6Addr>,
}

/// The engine's side: says which ports there are.
pub(crate) struct Loopback6(watch::Sender<Wanted>);

impl Loopback6 {
    pub(crate) fn channel() -> (Self, watch::Receiver<Wanted>) {
        let (sender, receiver) = watch::channel(Wanted::default());
        (Loopback6(sender), receiver)
    }

    pub(crate) fn update(&self, changes: &[Change], config: &BackendConfig, own: &[IpAddr]) {
        let to = if config.localhost_node_ports { target(config, own) } else { None };
        self.0.send_if_modified(|wanted| {
            let before = wanted.clone();
            // A port may have passed from one Service to another.
            for plan in changes.iter().filter_map(|change| change.before.as_deref()) {
                for port in ports_of(plan) {
                    wanted.ports.remove(&port);
                }
            }
            for plan in changes.iter().filter_map(|change| change.plan.as_deref()) {
                wanted.ports.extend(ports_of(plan));
            }
            wanted.to = to;
            *wanted != before
        });
    }
}

fn ports_of(plan: &ServicePlan) -> impl Iterator<Item = (Protocol, u16)> {
    let frontends = plan.ports.iter().flat_map(|port| &port.frontends);
    let keys = frontends.map(|frontend| frontend.key);
    let here = keys.filter(|key| key.at == At::NodePort(Family::V6));
    here.filter(|key| key.protocol != Protocol::Sctp).map(|key| (key.protocol, key.port))
}

fn target(config: &BackendConfig, own: &[IpAddr]) -> Option<Ipv6Addr> {
    own.iter().find_map(|address| match address {
        IpAddr::V6(v6) if config.wants_node_ports_on(*address) => Some(*v6),
        _ => None,
    })
}

/// A relay that ends when dropped.
struct Relay(JoinHandle<()>);

impl Drop for Relay {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Keeps one relay per port, for ever.
pub(crate) async fn serve(mut wanted: watch::Receiver<Wanted>) {
    let mut relays: HashMap<(Protocol, u16), Relay> = HashMap::new();
    let mut current = None;
    loop {
        let Wanted { ports, to } = wanted.borrow_and_update().clone();
        if current != to {
            relays.clear();
            current = to;
        }
        relays.retain(|port, _| ports.contains(port));
        if let Some(to) = to {
            for (protocol, port) in ports {
                relays.entry((protocol, port)).or_insert_with(|| match protocol {
                    Protocol::Udp => Relay(tokio::spawn(udp::relay(port, to))),
                    _ => Relay(tokio::spawn(relay(port, to))),
                });
            }
        }
        if wanted.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Keeps trying while somebody else has the port; nothing where nobody can ask.
async fn listen<L>(port: u16, bind: impl Fn() -> std::io::Result<L>) -> Option<L> {
    loop {
        match bind() {
            Ok(listener) => return Some(listener),
            // Without IPv6 nobody asks on ::1.
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => return None,
            Err(error) => {
                tracing::info!(port, %error, "The node port does not answer on ::1, retrying");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn relay(port: u16, to: Ipv6Addr) {
    let bind = || {
        let listener = std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, port))?;
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    };
    let Some(listener) = listen(port, bind).await else { return };
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS {
            connections.join_next().await;
        }
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((client, _)) => {
                connections.spawn(pass_on(client, SocketAddr::new(to.into(), port)));
            }
            Err(error) => {
                tracing::warn!(port, %error, "Cannot accept a connection to ::1");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// A Service that does not answer is told by a reset, since the connection is open already.
async fn pass_on(mut client: TcpStream, to: SocketAddr) {
    let server = tokio::time::timeout(CONNECT, TcpStream::connect(to)).await;
    let Ok(Ok(mut server)) = server else {
        let reset = client.set_zero_linger();
        tracing::debug!(%to, ?reset, "Cannot pass on a connection to ::1");
        return;
    };
    if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut server).await {
        tracing::debug!(%to, %error, "A connection to ::1 ended early");
    }
}
