//! Direct server return: endpoints on other nodes answer clients outside by themselves. Who gets it, and what stands in
//! its way.

use keelson_ebpf_abi::{SETTING_DIRECT, SETTING_DIRECT_UDP};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::{Link, Route};
use keelson_netlink::sysctl;
use serde::{Deserialize, Serialize};

use super::error::EbpfError;
use super::node::has_default_route;
use crate::backend::{BackendConfig, PodSources};
use crate::model::Protocol;

/// How clients outside and endpoints on other nodes speak with each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Forwarding {
    /// The client is masqueraded, so that answers come back by the node that was asked.
    #[default]
    Snat,
    /// The endpoint sees the client, and its node answers by itself.
    Dsr,
    /// That, except for UDP.
    Hybrid,
}

/// Whether clients outside keep their address when they come by that protocol. Who they are must be known.
pub(crate) fn is_direct(config: &BackendConfig, protocol: Protocol) -> bool {
    let wanted = match config.ebpf.forwarding {
        Forwarding::Snat => false,
        Forwarding::Dsr => true,
        Forwarding::Hybrid => protocol != Protocol::Udp,
    };
    wanted && config.pods != PodSources::Unknown
}

/// `SETTING_*`.
pub(super) fn flags(config: &BackendConfig) -> u32 {
    let all = [(Protocol::Tcp, SETTING_DIRECT), (Protocol::Udp, SETTING_DIRECT_UDP)];
    let wanted = all.into_iter().filter(|(protocol, _)| is_direct(config, *protocol));
    wanted.fold(0, |flags, (_, flag)| flags | flag)
}

/// What was warned of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Obstacles {
    pods_unknown: bool,
    /// Names of interfaces with a strict reverse path filter.
    strict: Vec<String>,
}

impl Obstacles {
    pub(super) fn find(
        config: &BackendConfig,
        netns: &Netns,
        links: &[Link],
        routes: &[Route],
    ) -> Result<Self, EbpfError> {
        if config.ebpf.forwarding == Forwarding::Snat {
            return Ok(Obstacles::default());
        }
        let candidates = from_other_nodes(links, routes);
        let strict = netns.run(|| candidates.into_iter().filter(|name| is_strict(name)).collect());
        Ok(Obstacles { pods_unknown: config.pods == PodSources::Unknown, strict: strict? })
    }

    /// A line for each, unless it was there before.
    pub(super) fn warn(&self, before: &Self) {
        if self.pods_unknown && !before.pods_unknown {
            tracing::warn!(
                "Clients outside are masqueraded: direct server return needs to know who is a pod (--cluster-cidr)"
            );
        }
        if self.strict != before.strict && !self.strict.is_empty() {
            tracing::warn!(
                interfaces = self.strict.join(", "),
                "Reverse path filters are strict there and drop what other nodes send of clients outside: set net.ipv4.conf.NAME.rp_filter to 2"
            );
        }
    }
}

/// Interfaces by which packets of clients outside come that are answered by another one.
fn from_other_nodes(links: &[Link], routes: &[Route]) -> Vec<String> {
    // Those of pods, and what pods are behind.
    let is_of_pods = |link: &Link| matches!(link.kind.as_deref(), Some("veth" | "bridge"));
    let such = links.iter().filter(|link| !link.loopback && !is_of_pods(link));
    such.filter(|link| !has_default_route(link, routes)).map(|link| link.name.clone()).collect()
}

/// The larger of two values is in force; 2 is not strict.
fn is_strict(link: &str) -> bool {
    let value = |name| sysctl::read(&format!("net/ipv4/conf/{name}/rp_filter")).ok();
    value("all").max(value(link)).as_deref() == Some("1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_interfaces_between_nodes_are_looked_at() {
        let link = |index, name: &str, kind: Option<&str>| Link {
            index,
            name: name.to_owned(),
            kind: kind.map(str::to_owned),
            ..Link::default()
        };
        let lo = Link { loopback: true, ..link(1, "lo", None) };
        let links = [
            lo,
            link(2, "eth0", None),
            link(3, "eth1", None),
            link(4, "flannel.1", Some("vxlan")),
            link(5, "cni0", Some("bridge")),
            link(6, "pod1", Some("veth")),
        ];
        let default = Route::default_via("192.0.2.254".parse().unwrap(), 2);
        assert_eq!(from_other_nodes(&links, &[default]), ["eth1", "flannel.1"]);
    }

    #[test]
    fn direct_by_protocol_and_only_where_pods_are_known() {
        let ranges = PodSources::Ranges(vec!["10.0.0.0/8".parse().unwrap()]);
        for (forwarding, pods, wanted) in [
            (Forwarding::Snat, ranges.clone(), 0),
            (Forwarding::Dsr, ranges.clone(), SETTING_DIRECT | SETTING_DIRECT_UDP),
            (Forwarding::Hybrid, ranges, SETTING_DIRECT),
            (Forwarding::Dsr, PodSources::Unknown, 0),
        ] {
            let mut config = BackendConfig { pods, ..BackendConfig::default() };
            config.ebpf.forwarding = forwarding;
            assert_eq!(flags(&config), wanted, "{forwarding:?}");
        }
    }
}
