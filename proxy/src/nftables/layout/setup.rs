//! What a table is made for: all that its chains and rules depend on.

use keelson_netlink::nft::{Family, Table};

use crate::backend::BackendConfig;
use crate::model::PortPlan;

/// Who else works on packets to Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Nobody: the table chooses endpoints and translates.
    Whole,
    /// IPVS does that where it can: the table refuses, drops, asks for masquerading, and forwards the rest.
    BesideIpvs,
    /// The same for packets of connections that IPVS has already: it leads them there, and keeps the node's own
    /// programs out of reach. A table of its own, since connections outlive the mode.
    IpvsFlows,
}

impl Role {
    pub(crate) fn table(self) -> Table<'static> {
        let name = match self {
            Role::Whole => "keelson-proxy",
            Role::BesideIpvs => "keelson-proxy-ipvs",
            Role::IpvsFlows => "keelson-proxy-ipvs-flows",
        };
        Table { family: Family::Inet, name }
    }
}

/// Role and configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setup {
    pub(crate) role: Role,
    pub(crate) config: BackendConfig,
}

impl Setup {
    /// Whether IPVS chooses for new connections, 127.0.0.1 and short cuts excepted.
    pub(crate) fn leaves_to_ipvs(&self) -> bool {
        self.role == Role::BesideIpvs
    }

    /// Whether the table remembers what IPVS has chosen. IPVS forgets a client only minutes after its last
    /// connection, and for each address of a Service on its own; the table does it exactly.
    pub(crate) fn remembers_for_ipvs(&self, port: &PortPlan) -> bool {
        self.leaves_to_ipvs() && port.affinity_secs.is_some()
    }

    /// Whether node ports on 127.0.0.1 are served apart from the others.
    pub(crate) fn has_loopback_ports(&self) -> bool {
        self.role == Role::BesideIpvs && self.config.localhost_node_ports
    }
}
