//! The fixed part of the table: its maps and its chains. Pure.

mod chain;
mod rules;
mod setup;

use keelson_netlink::nft::{Batch, Field, Set, Table};

use super::transaction::add_chain;
use crate::backend::BackendConfig;
use crate::model::{Family, Masquerade};
pub(crate) use chain::{Chain, Flow, Forward, Sticky};
pub(crate) use rules::stamps_of;
pub(crate) use setup::{Role, Setup};

/// Changes whenever a table of an older version cannot be repaired but must be made anew.
pub(crate) const STAMP: &[u8] = b"keelson-proxy 1";

/// More clients than this are not remembered; they are served all the same.
const AFFINITY_ENTRIES: u32 = 1 << 20;

/// Makes a table with everything that is ever used and removes it, all in one transaction: the kernel
/// checks it and nobody ever sees it.
pub(crate) fn trial(role: Role) -> Batch {
    const TRIAL: Table<'static> =
        Table { family: keelson_netlink::nft::Family::Inet, name: "keelson-proxy-trial" };
    let setup = Setup { role, config: BackendConfig::default() };
    let mut batch = Batch::new();
    batch.add_table(TRIAL);
    for family in Family::BOTH {
        Map::all(role).for_each(|map| map.describe(family, |set| batch.add_set(TRIAL, set)));
    }
    for chain in Chain::fixed(role) {
        add_chain(&mut batch, TRIAL, chain, &setup);
    }
    for family in Family::BOTH.into_iter().filter(|_| role != Role::IpvsFlows) {
        let forward = Forward {
            family,
            kind: Kind::Address,
            view: View::Direct,
            masquerade: Masquerade::UnlessPod,
            sticky_secs: Some(1),
            size: 2,
        };
        add_chain(&mut batch, TRIAL, Chain::Forward(forward), &setup);
        if role == Role::BesideIpvs {
            let (kind, masquerade) = (Kind::Address, Masquerade::UnlessPod);
            let sticky = Sticky { family, kind, masquerade, secs: 1 };
            for chain in [
                Chain::ToIpvs(family, masquerade),
                Chain::StickOrToIpvs(sticky),
                Chain::Remember(sticky),
            ] {
                add_chain(&mut batch, TRIAL, chain, &setup);
            }
        }
    }
    batch.delete_table(TRIAL);
    batch
}

/// What a frontend's key consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Address, protocol, port.
    Address,
    /// Protocol, port.
    NodePort,
    /// Protocol, port: a node port on 127.0.0.1, where IPVS serves the others.
    Loopback,
}

/// Which of a frontend's two pools a look-up means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum View {
    Direct,
    /// The short cut of pods and the node itself under externalTrafficPolicy Local.
    Inside,
}

/// A map or set of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Map {
    /// Frontend to verdict.
    Frontends(Kind),
    /// Frontend to pool number.
    Pools(Kind, View),
    /// Frontend to verdict, for pods and the node.
    Inside(Kind),
    /// Frontend to verdict, for everybody else.
    Outside(Kind),
    /// Pool number and place to endpoint.
    Endpoints,
    /// Pool number and slot to place, where clients stick: slots move up, places never do.
    Places,
    /// Pool number and endpoint to place: what IPVS has chosen, as it can be remembered.
    PlacesOf,
    /// Frontend to the chain that remembers what IPVS has chosen.
    Remembering(Kind),
    /// Pool number and client to place; the kernel adds and expires elements.
    Affinity,
    /// An endpoint's address twice: it talks to itself through a Service.
    Hairpin,
    /// The pod ranges of the cluster.
    ClusterCidrs,
    /// Node addresses that serve node ports.
    NodePortAddresses,
    /// The ranges that ClusterIPs come from.
    ServiceRanges,
    /// ClusterIPs: what is no frontend there is refused.
    ClusterIps,
    /// Frontends that only some sources may use.
    Restricted,
    /// Those sources.
    Allowed,
}

impl Map {
    pub(crate) fn all(role: Role) -> impl Iterator<Item = Map> {
        let per_kind = [Kind::Address, Kind::NodePort].into_iter().flat_map(|kind| {
            [
                Map::Frontends(kind),
                Map::Pools(kind, View::Direct),
                Map::Pools(kind, View::Inside),
                Map::Inside(kind),
                Map::Outside(kind),
            ]
        });
        let beside_ipvs = [
            Map::Frontends(Kind::Loopback),
            Map::Pools(Kind::Loopback, View::Direct),
            Map::PlacesOf,
            Map::Remembering(Kind::Address),
            Map::Remembering(Kind::NodePort),
        ];
        let beside_ipvs = beside_ipvs.into_iter().filter(move |_| role == Role::BesideIpvs);
        let all = per_kind.chain(beside_ipvs).chain([
            Map::Endpoints,
            Map::Places,
            Map::Affinity,
            Map::Hairpin,
            Map::ClusterCidrs,
            Map::NodePortAddresses,
            Map::ServiceRanges,
            Map::ClusterIps,
            Map::Restricted,
            Map::Allowed,
        ]);
        all.filter(move |_| role != Role::IpvsFlows)
    }

    pub(crate) fn name(self, family: Family) -> &'static str {
        use Kind::{Address, Loopback, NodePort};
        use View::{Direct, Inside};
        let [v4, v6] = match self {
            Map::Frontends(Address) => ["services4", "services6"],
            Map::Frontends(NodePort) => ["node-ports4", "node-ports6"],
            Map::Frontends(Loopback) => ["loopback-ports4", "loopback-ports6"],
            Map::Pools(Loopback, _) => ["loopback-port-pools4", "loopback-port-pools6"],
            Map::Pools(Address, Direct) => ["service-pools4", "service-pools6"],
            Map::Pools(NodePort, Direct) => ["node-port-pools4", "node-port-pools6"],
            Map::Pools(Address, Inside) => ["service-inside-pools4", "service-inside-pools6"],
            Map::Pools(NodePort, Inside) => ["node-port-inside-pools4", "node-port-inside-pools6"],
            Map::Inside(Address) => ["service-inside4", "service-inside6"],
            Map::Inside(NodePort | Loopback) => ["node-port-inside4", "node-port-inside6"],
            Map::Outside(Address) => ["service-outside4", "service-outside6"],
            Map::Outside(NodePort | Loopback) => ["node-port-outside4", "node-port-outside6"],
            Map::Endpoints => ["endpoints4", "endpoints6"],
            Map::Affinity => ["affinity4", "affinity6"],
            Map::PlacesOf => ["affinity-endpoints4", "affinity-endpoints6"],
            Map::Remembering(Address) => ["remember-services4", "remember-services6"],
            Map::Remembering(_) => ["remember-node-ports4", "remember-node-ports6"],
            Map::Places => ["affinity-places4", "affinity-places6"],
            Map::Hairpin => ["hairpin4", "hairpin6"],
            Map::ClusterCidrs => ["cluster-cidrs4", "cluster-cidrs6"],
            Map::NodePortAddresses => ["node-port-addresses4", "node-port-addresses6"],
            Map::ServiceRanges => ["service-ranges4", "service-ranges6"],
            Map::ClusterIps => ["cluster-ips4", "cluster-ips6"],
            Map::Restricted => ["restricted4", "restricted6"],
            Map::Allowed => ["allowed-sources4", "allowed-sources6"],
        };
        if family == Family::V4 { v4 } else { v6 }
    }

    /// Hands the kernel's description of the map to `take`.
    pub(crate) fn describe<T>(self, family: Family, take: impl FnOnce(&Set<'_>) -> T) -> T {
        let name = self.name(family);
        let ip = if family == Family::V4 { Field::Ipv4 } else { Field::Ipv6 };
        let endpoint = [ip, Field::Port];
        let frontend = [ip, Field::Protocol, Field::Port];
        let key = |kind| match kind {
            Kind::Address => &frontend[..],
            Kind::NodePort | Kind::Loopback => &frontend[1..],
        };
        match self {
            Map::Frontends(kind)
            | Map::Inside(kind)
            | Map::Outside(kind)
            | Map::Remembering(kind) => take(&Set::verdict_map(name, key(kind))),
            Map::Pools(kind, _) => take(&Set::map(name, key(kind), &[Field::Mark])),
            Map::Endpoints => take(&Set::map(name, &[Field::Mark, Field::Mark], &endpoint)),
            Map::Affinity => take(&Set {
                dynamic: true,
                timeout: true,
                size: Some(AFFINITY_ENTRIES),
                ..Set::map(name, &[Field::Mark, ip], &[Field::Mark])
            }),
            Map::Places => take(&Set::map(name, &[Field::Mark, Field::Mark], &[Field::Mark])),
            Map::PlacesOf => take(&Set::map(name, &[Field::Mark, ip, Field::Port], &[Field::Mark])),
            Map::Hairpin => take(&Set::new(name, &[ip, ip])),
            Map::ClusterCidrs | Map::NodePortAddresses | Map::ServiceRanges => {
                take(&Set { interval: true, ..Set::new(name, &[ip]) })
            }
            Map::ClusterIps => take(&Set::new(name, &[ip])),
            Map::Restricted => take(&Set::new(name, &frontend)),
            Map::Allowed => {
                let key = [ip, Field::Protocol, Field::Port, ip];
                take(&Set { interval: true, ..Set::new(name, &key) })
            }
        }
    }
}
