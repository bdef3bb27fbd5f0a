//! What users may choose, and what the kernel must be told once.

use ipnetwork::IpNetwork;
use keelson_netlink::ipvs::Timeouts;
use keelson_netlink::netns::Netns;
use keelson_netlink::sysctl;
use serde::{Deserialize, Serialize};

/// The schedulers of the kernel; each may be a module of its own.
pub const SCHEDULERS: [&str; 14] =
    ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "fo", "ovf", "mh", "twos"];

/// Settings of this mode, as kube-proxy has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IpvsConfig {
    /// Who chooses among the endpoints: one of [`SCHEDULERS`].
    pub scheduler: String,
    /// Virtual servers in these ranges that no Service asks for stay when they are found at a start.
    pub excluded: Vec<IpNetwork>,
    /// Answer ARP only for addresses of the interface that was asked.
    pub strict_arp: bool,
    /// How long silent connections are remembered, in seconds; 0 leaves the kernel's value.
    pub tcp_timeout: u32,
    pub tcp_fin_timeout: u32,
    pub udp_timeout: u32,
}

impl Default for IpvsConfig {
    fn default() -> Self {
        IpvsConfig {
            scheduler: "rr".to_owned(),
            excluded: Vec::new(),
            strict_arp: false,
            tcp_timeout: 0,
            tcp_fin_timeout: 0,
            udp_timeout: 0,
        }
    }
}

impl IpvsConfig {
    pub(crate) fn timeouts(&self) -> Timeouts {
        Timeouts { tcp: self.tcp_timeout, tcp_fin: self.tcp_fin_timeout, udp: self.udp_timeout }
    }

    /// Kernel settings and the values that they shall have.
    fn sysctls(&self) -> Vec<(&'static str, &'static str)> {
        let mut settings = vec![
            // Connection tracking knows what IPVS does: masquerading and its answers need that.
            ("net/ipv4/vs/conntrack", "1"),
            // A client may use its port for a new connection at once.
            ("net/ipv4/vs/conn_reuse_mode", "1"),
            // UDP flows to a real server that is gone begin anew instead of being dropped.
            ("net/ipv4/vs/expire_nodest_conn", "1"),
        ];
        if self.strict_arp {
            settings.push(("net/ipv4/conf/all/arp_ignore", "1"));
            settings.push(("net/ipv4/conf/all/arp_announce", "2"));
        }
        settings
    }

    /// Sets them in that namespace. What cannot be set is named.
    pub(crate) fn apply(&self, netns: &Netns) {
        let set =
            || self.sysctls().into_iter().map(|(key, value)| (key, sysctl::ensure(key, value)));
        let results = match netns.run(|| set().collect::<Vec<_>>()) {
            Ok(results) => results,
            Err(error) => return tracing::warn!(%error, "Cannot change kernel settings for IPVS"),
        };
        for (key, result) in results {
            match result {
                Ok(true) => tracing::info!(key, "Changed a kernel setting for IPVS"),
                Ok(false) => {}
                Err(error) => {
                    let error = crate::switch::with_sources(&error);
                    tracing::warn!(key, %error, "Cannot change a kernel setting for IPVS");
                }
            }
        }
    }
}
