//! The chains that are there however many Services there are. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::names::{
    Chain, FORWARD, HAIRPIN, INPUT, MARK, MARK_OTHERS, NODE_PORTS, OUTPUT, POSTROUTING, REJECT,
    SERVICES, Table, UNSERVED, UNSERVED_PORTS,
};
use super::rules::{masked, pod_matches};
use crate::backend::BackendConfig;
use crate::model::Family;

/// Built-in chains and where each of them jumps to.
pub(crate) const HOOKS: [(Table, &str, &str); 6] = [
    (Table::Nat, "PREROUTING", SERVICES),
    (Table::Nat, "OUTPUT", SERVICES),
    (Table::Nat, "POSTROUTING", POSTROUTING),
    (Table::Filter, "INPUT", INPUT),
    (Table::Filter, "FORWARD", FORWARD),
    (Table::Filter, "OUTPUT", OUTPUT),
];

pub(crate) fn names(family: Family) -> impl Iterator<Item = Chain> {
    let nat = [MARK, MARK_OTHERS, HAIRPIN, NODE_PORTS, SERVICES, POSTROUTING];
    let filter = [REJECT, UNSERVED_PORTS, UNSERVED, INPUT, FORWARD, OUTPUT];
    let nat = nat.into_iter().map(move |name| Chain::new(family, Table::Nat, name));
    nat.chain(filter.into_iter().map(move |name| Chain::new(family, Table::Filter, name)))
}

/// The rules of a chain that depends on nothing but the configuration.
pub(crate) fn rules(config: &BackendConfig, family: Family, name: &str) -> Vec<String> {
    let mark = config.mark();
    let to_unserved = || format!("-m conntrack --ctstate NEW -j {UNSERVED}");
    match name {
        MARK => vec![format!("-j MARK --set-xmark {mark:#x}/{mark:#x}")],
        MARK_OTHERS => {
            let pods = pod_matches(&config.pods, family);
            let mut lines: Vec<String> =
                pods.into_iter().map(|from_pod| format!("{from_pod} -j RETURN")).collect();
            lines.push(format!("-j MARK --set-xmark {mark:#x}/{mark:#x}"));
            lines
        }
        POSTROUTING => vec![
            format!("-m conntrack --ctstate DNAT -j {HAIRPIN}"),
            format!("-m mark ! --mark {mark:#x}/{mark:#x} -j RETURN"),
            // The bit is private: nobody after us shall see it.
            format!("-j MARK --set-xmark {mark:#x}/0x0"),
            "-j MASQUERADE --random-fully".to_owned(),
        ],
        REJECT => vec![
            // The kernel limits how many ICMP messages it sends, but not resets.
            "-p tcp -j REJECT --reject-with tcp-reset".to_owned(),
            format!("-j REJECT --reject-with {}", unreachable(family)),
        ],
        INPUT => {
            let mut lines = vec![to_unserved()];
            if family == Family::V4 && config.localhost_node_ports {
                // route_localnet lets packets from outside reach 127.0.0.1: as before they shall not
                // (CVE-2020-8558).
                let state = "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT";
                lines.push(format!("! -s 127.0.0.0/8 -d 127.0.0.0/8 {state} -j DROP"));
            }
            lines
        }
        FORWARD => vec![
            to_unserved(),
            // Out of window for connection tracking: not translated back, it would reach the client
            // from an address that it does not know, and be answered with a reset.
            "-m conntrack --ctstate INVALID -j DROP".to_owned(),
            // For hosts whose FORWARD policy is DROP, as kube-proxy does.
            format!("-m mark --mark {mark:#x}/{mark:#x} -j ACCEPT"),
            "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".to_owned(),
        ],
        OUTPUT => vec![to_unserved()],
        _ => Vec::new(),
    }
}

fn unreachable(family: Family) -> &'static str {
    match family {
        Family::V4 => "icmp-port-unreachable",
        Family::V6 => "icmp6-port-unreachable",
    }
}

/// The rules that tell which addresses serve node ports.
pub(crate) fn to_node_ports(config: &BackendConfig, family: Family, to: &str) -> Vec<String> {
    const LOCAL: &str = "-m addrtype --dst-type LOCAL";
    let mut lines = Vec::new();
    // ::1 cannot be left for another host, and nothing like route_localnet exists for IPv6.
    match (family, config.localhost_node_ports) {
        (Family::V4, true) => lines.push(format!("-d 127.0.0.0/8 {LOCAL} -j {to}")),
        (Family::V4, false) => lines.push("-d 127.0.0.0/8 -j RETURN".to_owned()),
        (Family::V6, _) => lines.push("-d ::1/128 -j RETURN".to_owned()),
    }
    let ranges: Vec<_> =
        config.node_port_ranges.iter().filter(|range| Family::of(range.ip()) == family).collect();
    if ranges.is_empty() || ranges.iter().any(|range| range.prefix() == 0) {
        lines.push(format!("{LOCAL} -j {to}"));
    } else {
        lines.extend(ranges.iter().map(|range| format!("-d {} {LOCAL} -j {to}", masked(**range))));
    }
    lines
}

/// Packets for an address of the Service ranges that no Service has.
pub(crate) fn unassigned(config: &BackendConfig, family: Family) -> Vec<String> {
    let ranges = config.service_ranges.iter();
    let ranges = ranges.filter(|range| Family::of(range.ip()) == family && range.prefix() > 0);
    ranges.map(|range| format!("-d {} -j DROP", masked(*range))).collect()
}

/// A pod that reached itself through a Service must not answer itself directly.
pub(crate) fn hairpins(addresses: BTreeSet<IpAddr>) -> Vec<String> {
    let networks = addresses.into_iter().map(IpNetwork::from);
    networks.map(|pod| format!("-s {pod} -d {pod} -j MASQUERADE --random-fully")).collect()
}
