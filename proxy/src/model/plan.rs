//! The normalised desired state: what a backend puts in force, without any Service semantics left.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// `namespace/name` of a Service. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey(Arc<str>);

impl ServiceKey {
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        ServiceKey(format!("{namespace}/{name}").into())
    }
}

impl ServiceKey {
    /// Namespace and name.
    #[must_use]
    pub fn parts(&self) -> (&str, &str) {
        self.0.split_once('/').unwrap_or(("", &self.0))
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    Tcp = 6,
    Udp = 17,
    Sctp = 132,
}

impl Protocol {
    /// As Kubernetes writes it; nothing means TCP.
    #[must_use]
    pub fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("TCP" | "") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(_) => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        })
    }
}

/// Where a connection is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: IpAddr,
    pub port: u16,
}

impl Endpoint {
    #[must_use]
    pub fn new(address: IpAddr, port: u16) -> Self {
        Endpoint { address, port }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", SocketAddr::new(self.address, self.port))
    }
}

/// The destination address that a frontend answers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum At {
    Address(IpAddr),
    /// The node's own addresses of that family.
    NodePort(Family),
}

impl At {
    #[must_use]
    pub fn family(self) -> Family {
        match self {
            At::Address(address) => Family::of(address),
            At::NodePort(family) => family,
        }
    }
}

/// What a packet must carry to reach a frontend. At most one Service owns such a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FrontendKey {
    pub at: At,
    pub protocol: Protocol,
    pub port: u16,
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            At::Address(address) if self.port == 0 => write!(f, "all of {address}"),
            At::Address(address) => {
                write!(f, "{}/{}", SocketAddr::new(address, self.port), self.protocol)
            }
            At::NodePort(_) => write!(f, "node port {}/{}", self.port, self.protocol),
        }
    }
}

/// The two lists of endpoints of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Scope {
    /// All endpoints that may serve this node.
    Cluster,
    /// Those on this node.
    Local,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Target {
    /// A random (or sticky) endpoint of that list, which is not empty.
    Forward(Scope),
    /// Tell the client that nobody is there.
    Reject,
    /// Say nothing, so that the client tries another node.
    Drop,
}

/// When the source address is replaced by the node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Masquerade {
    Never,
    /// Unless the source is a pod.
    UnlessPod,
    Always,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Route {
    /// Everybody is treated alike.
    Same { target: Target, masquerade: Masquerade },
    /// externalTrafficPolicy Local: pods (as they are) and the node itself (masqueraded) take the
    /// short cut `inside`; everybody else goes `outside` and keeps the source address.
    BySource { inside: Target, outside: Target },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frontend {
    pub key: FrontendKey,
    pub route: Route,
    /// When given, only these sources may connect; others are dropped.
    pub sources: Option<Box<[IpNetwork]>>,
}

/// One port of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortPlan {
    /// The port's name, empty when it has none.
    pub name: Box<str>,
    pub protocol: Protocol,
    pub family: Family,
    /// Clients stick to an endpoint for so many seconds after their last connection.
    pub affinity_secs: Option<u32>,
    /// Sorted; empty when no frontend forwards to that list.
    pub cluster: Box<[Endpoint]>,
    /// Sorted; empty when no frontend forwards to that list.
    pub local: Box<[Endpoint]>,
    /// UDP only: endpoints that get nothing new but keep their flows.
    pub draining: Box<[Endpoint]>,
    /// Those of `cluster` and `local` that live on this node (a pod may then meet itself).
    pub here: Box<[IpAddr]>,
    /// Those of `cluster` that live on no node, so that nobody there knows Services.
    #[serde(default)]
    pub strangers: Box<[IpAddr]>,
    pub frontends: Box<[Frontend]>,
}

impl PortPlan {
    #[must_use]
    pub fn pool(&self, scope: Scope) -> &[Endpoint] {
        match scope {
            Scope::Cluster => &self.cluster,
            Scope::Local => &self.local,
        }
    }
}

/// All that is to be in force for one Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePlan {
    pub ports: Box<[PortPlan]>,
    /// Its ClusterIPs, which nobody else uses: connections to a port there that is no frontend are
    /// refused. An address is in one Service's list only.
    pub guarded: Box<[IpAddr]>,
}
