//! Ports of the node that lead to a pod.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// A transport protocol that ports belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

impl Transport {
    /// The number in the IP header.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// One entry of the capability `portMappings`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    /// The node's port.
    pub host: u16,
    /// The pod's port.
    pub container: u16,
    /// The protocol.
    pub protocol: Transport,
    /// Only this address of the node; all if `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
}

impl HostPort {
    /// Whether both cannot be had at once. A port on all addresses is also one on each of them.
    #[must_use]
    pub fn clashes(&self, other: &HostPort) -> bool {
        let same_address = match (self.address, other.address) {
            (Some(one), Some(two)) => one == two,
            _ => true,
        };
        same_address && self.host == other.host && self.protocol == other.protocol
    }
}

impl std::fmt::Display for HostPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = match self.protocol {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
            Transport::Sctp => "sctp",
        };
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:{}/{protocol}", self.host),
            Some(address) => write!(f, "{address}:{}/{protocol}", self.host),
            None => write!(f, "{}/{protocol}", self.host),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host: u16, protocol: Transport, address: Option<&str>) -> HostPort {
        HostPort { host, container: 80, protocol, address: address.map(|a| a.parse().unwrap()) }
    }

    #[test]
    fn a_port_clashes_with_the_same_port_where_their_addresses_meet() {
        use Transport::{Tcp, Udp};
        let all = port(80, Tcp, None);
        assert!(all.clashes(&all) && all.clashes(&port(80, Tcp, Some("192.0.2.1"))));
        assert!(port(80, Tcp, Some("::1")).clashes(&port(80, Tcp, Some("::1"))));
        for other in [port(81, Tcp, None), port(80, Udp, None)] {
            assert!(!all.clashes(&other));
        }
        let (one, two) = (port(80, Tcp, Some("192.0.2.1")), port(80, Tcp, Some("192.0.2.2")));
        assert!(!one.clashes(&two));
    }

    #[test]
    fn a_port_is_written_as_people_write_it() {
        assert_eq!(port(80, Transport::Tcp, None).to_string(), "80/tcp");
        assert_eq!(port(53, Transport::Udp, Some("::1")).to_string(), "[::1]:53/udp");
        assert_eq!(port(53, Transport::Udp, Some("192.0.2.1")).to_string(), "192.0.2.1:53/udp");
    }
}
