//! The rules in the chains. Pure.

mod forwarding;
mod ipvs;

use std::hash::{Hash, Hasher};

use keelson_netlink::nft::{
    CT_ESTABLISHED, CT_INVALID, CT_RELATED, CT_STATUS_DNAT, Compare, Conntrack, DESTINATION_PORT,
    FIB_LOCAL, FibAddress, Header, IPV4_DESTINATION, IPV4_SOURCE, IPV6_DESTINATION, IPV6_SOURCE,
    Meta, Refusal, Register, Rule, Verdict,
};

use super::{Chain, Kind, Map, Role, Setup};
use crate::backend::{BackendConfig, PodSources};
use crate::model::Family;
use forwarding::forward_rules;
use ipvs::{chosen_rules, flow_rules, remember_rules, stick_or_to_ipvs_rules, to_ipvs_rules};

impl Chain {
    /// The rules of the chain.
    pub(crate) fn rules(self, setup: &Setup) -> Vec<Rule> {
        let config = &setup.config;
        let rules = match self {
            Chain::Prerouting | Chain::Output => entry_rules(),
            Chain::Postrouting => postrouting_rules(setup),
            Chain::Input => input_rules(),
            Chain::PassThrough => pass_through_rules(),
            Chain::Services(family) => find_service_rules(family, setup),
            Chain::NodePorts(family) => find_node_port_rules(family),
            Chain::BySource(family, kind) => by_source_rules(family, kind, config),
            Chain::Sources(family) => source_rules(family),
            Chain::Reject => reject_rules(),
            Chain::Forward(forward) => forward_rules(forward, config),
            Chain::ToIpvs(family, masquerade) => to_ipvs_rules(family, masquerade, config),
            Chain::StickOrToIpvs(sticky) => stick_or_to_ipvs_rules(sticky, config),
            Chain::ChosenOutside | Chain::ChosenHere => chosen_rules(config.ipvs_mark()),
            Chain::Remember(sticky) => remember_rules(sticky),
            Chain::Flow(flow) => flow_rules(flow, config),
        };
        rules.into_iter().map(stamped).collect()
    }
}

/// Marks a rule with a hash of its content, by which it is recognised after a restart.
fn stamped(rule: Rule) -> Rule {
    // A fixed hash: the stamp must not differ between builds.
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    rule.encoded().hash(&mut hasher);
    rule.stamp(&hasher.finish().to_be_bytes())
}

struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// The stamp that [`Chain::rules`] gave a rule.
pub(crate) fn stamps_of(chain: Chain, setup: &Setup) -> Vec<Vec<u8>> {
    let stamp = |rule: &Rule| {
        let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
        rule.encoded().hash(&mut hasher);
        hasher.finish().to_be_bytes().to_vec()
    };
    chain.rules(setup).iter().map(stamp).collect()
}

fn address_registers(family: Family) -> u8 {
    if family == Family::V4 { 1 } else { 4 }
}

fn only(family: Family) -> Rule {
    if family == Family::V4 { Rule::new().only_ipv4() } else { Rule::new().only_ipv6() }
}

/// Loads the source address.
fn source(rule: Rule, family: Family, to: u8) -> Rule {
    match family {
        Family::V4 => rule.payload(Header::Network, IPV4_SOURCE, 4, Register(to)),
        Family::V6 => rule.payload(Header::Network, IPV6_SOURCE, 16, Register(to)),
    }
}

/// Loads the destination address.
fn destination(rule: Rule, family: Family, to: u8) -> Rule {
    match family {
        Family::V4 => rule.payload(Header::Network, IPV4_DESTINATION, 4, Register(to)),
        Family::V6 => rule.payload(Header::Network, IPV6_DESTINATION, 16, Register(to)),
    }
}

/// Loads a frontend's key into the registers from 0 on; the next free register comes back, too.
fn frontend(rule: Rule, family: Family, kind: Kind) -> (Rule, u8) {
    let (rule, next) = match kind {
        Kind::Address => (destination(rule, family, 0), address_registers(family)),
        Kind::NodePort | Kind::Loopback => (rule, 0),
    };
    let rule = rule.meta(Meta::TransportProtocol, Register(next)).payload(
        Header::Transport,
        DESTINATION_PORT,
        2,
        Register(next + 1),
    );
    (rule, next + 2)
}

/// Sets the bit of the packet mark that asks for masquerading.
fn set_mark(rule: Rule, mark: u32) -> Rule {
    let register = Register(15);
    rule.meta(Meta::Mark, register)
        .bitwise(register, register, &(!mark).to_ne_bytes(), &mark.to_ne_bytes())
        .set_meta(Meta::Mark, register)
}

fn entry_rules() -> Vec<Rule> {
    let find = |family| only(family).verdict(Verdict::Jump(services_chain(family)));
    Family::BOTH.map(find).into()
}

fn services_chain(family: Family) -> &'static str {
    if family == Family::V4 { "find-service4" } else { "find-service6" }
}

fn find_service_rules(family: Family, setup: &Setup) -> Vec<Rule> {
    let v4 = family == Family::V4;
    let (key, _) = frontend(only(family), family, Kind::Address);
    let restricted = key
        .clone()
        .lookup(Map::Restricted.name(family), Register(0), false)
        .verdict(Verdict::Jump(if v4 { "check-source4" } else { "check-source6" }));
    let found = key.lookup_verdict(Map::Frontends(Kind::Address).name(family), Register(0));
    let in_set = |map: Map| {
        destination(only(family), family, 0).lookup(map.name(family), Register(0), false)
    };
    let unknown_port = in_set(Map::ClusterIps).verdict(Verdict::Goto("reject-all"));
    let nobody = in_set(Map::ServiceRanges).verdict(Verdict::Drop);
    let mut rules = vec![restricted, found, unknown_port];
    rules.extend(own_address_rules(family, setup));
    rules.push(nobody);
    rules
}

/// A node port answers on the node's own addresses; on loopback ones only as far as the kernel can
/// route them.
fn own_address_rules(family: Family, setup: &Setup) -> Vec<Rule> {
    let v4 = family == Family::V4;
    let address = || destination(only(family), family, 0);
    let find = if v4 { "find-node-port4" } else { "find-node-port6" };
    let mut rules = Vec::new();
    let on_loopback = loopback(address(), Compare::Equal);
    if v4 && setup.has_loopback_ports() {
        // IPVS sends nothing that comes from 127.0.0.1 to another host.
        let (key, _) = frontend(on_loopback, family, Kind::Loopback);
        let map = Map::Frontends(Kind::Loopback).name(family);
        rules.push(key.lookup_verdict(map, Register(0)));
    } else if v4 && setup.config.localhost_node_ports {
        rules.push(on_loopback.verdict(Verdict::Goto(find)));
    }
    let elsewhere = match family {
        Family::V4 => loopback(address(), Compare::NotEqual),
        Family::V6 => {
            let loopback = std::net::Ipv6Addr::LOCALHOST.octets();
            address().compare(Register(0), Compare::NotEqual, &loopback)
        }
    };
    rules.push(
        elsewhere
            .lookup(Map::NodePortAddresses.name(family), Register(0), false)
            .fib_address_type(FibAddress::Destination, Register(4))
            .compare(Register(4), Compare::Equal, &FIB_LOCAL.to_ne_bytes())
            .verdict(Verdict::Goto(find)),
    );
    rules
}

/// Tests whether the IPv4 address in register 0 is in 127.0.0.0/8.
fn loopback(rule: Rule, how: Compare) -> Rule {
    rule.bitwise(Register(0), Register(4), &[255, 0, 0, 0], &[0; 4]).compare(
        Register(4),
        how,
        &[127, 0, 0, 0],
    )
}

/// Tests a bit mask of connection tracking.
fn conntrack_has(rule: Rule, what: Conntrack, bits: u32, how: Compare) -> Rule {
    let register = Register(0);
    // "Has one of them" is "not equal to none".
    rule.conntrack(what, register)
        .bitwise(register, register, &bits.to_ne_bytes(), &[0; 4])
        .compare(register, how, &[0; 4])
}

/// With `route_localnet` on, which node ports on 127.0.0.1 need, the kernel lets strangers on the same
/// network send to 127.0.0.1 (CVE-2020-8558). Only answers may come.
fn input_rules() -> Vec<Rule> {
    let to_loopback = loopback(destination(only(Family::V4), Family::V4, 0), Compare::Equal);
    let mut lo = [0; 16];
    lo[..2].copy_from_slice(b"lo");
    let from_elsewhere =
        to_loopback.meta(Meta::InputName, Register(0)).compare(Register(0), Compare::NotEqual, &lo);
    let known = CT_ESTABLISHED | CT_RELATED;
    let unknown = conntrack_has(from_elsewhere, Conntrack::State, known, Compare::Equal);
    let untranslated = conntrack_has(unknown, Conntrack::Status, CT_STATUS_DNAT, Compare::Equal);
    vec![untranslated.verdict(Verdict::Drop)]
}

/// A packet outside the window of its connection is not translated back; the client would answer a
/// server that it does not know with a reset, and so end the connection.
fn pass_through_rules() -> Vec<Rule> {
    let tcp = Rule::new().meta(Meta::TransportProtocol, Register(0)).compare(
        Register(0),
        Compare::Equal,
        &[TCP],
    );
    let invalid = conntrack_has(tcp, Conntrack::State, CT_INVALID, Compare::NotEqual);
    vec![invalid.verdict(Verdict::Drop)]
}

fn find_node_port_rules(family: Family) -> Vec<Rule> {
    let (key, _) = frontend(only(family), family, Kind::NodePort);
    vec![key.lookup_verdict(Map::Frontends(Kind::NodePort).name(family), Register(0))]
}

fn by_source_rules(family: Family, kind: Kind, config: &BackendConfig) -> Vec<Rule> {
    let inside = Map::Inside(kind).name(family);
    let from_node = set_mark(from_node(family), config.mark());
    let follow = |rule, map: &str| frontend(rule, family, kind).0.lookup_verdict(map, Register(0));
    let mut rules: Vec<Rule> =
        from_pod(family, config).map(|from_pod| follow(from_pod, inside)).into_iter().collect();
    rules.push(follow(from_node, inside));
    rules.push(follow(only(family), Map::Outside(kind).name(family)));
    rules
}

/// Tests that the source is the node itself.
fn from_node(family: Family) -> Rule {
    only(family).fib_address_type(FibAddress::Source, Register(0)).compare(
        Register(0),
        Compare::Equal,
        &FIB_LOCAL.to_ne_bytes(),
    )
}

/// Tests that the source is a pod; nothing when pods are not known.
fn from_pod(family: Family, config: &BackendConfig) -> Option<Rule> {
    let rule = only(family);
    Some(match &config.pods {
        PodSources::Unknown => return None,
        PodSources::Ranges(_) => {
            source(rule, family, 0).lookup(Map::ClusterCidrs.name(family), Register(0), false)
        }
        PodSources::Bridge(_) | PodSources::InterfacePrefix(_) => {
            came_in_through(rule, &config.pods, Compare::Equal)
        }
    })
}

fn came_in_through(rule: Rule, pods: &PodSources, how: Compare) -> Rule {
    let mut name = [0; 16];
    let (text, compared) = match pods {
        PodSources::Bridge(text) => (text.as_str(), 16),
        PodSources::InterfacePrefix(text) => (text.as_str(), text.len()),
        PodSources::Unknown | PodSources::Ranges(_) => ("", 0),
    };
    // The kernel's names have at most 15 bytes.
    let text = &text.as_bytes()[..text.len().min(15)];
    name[..text.len()].copy_from_slice(text);
    rule.meta(Meta::InputName, Register(0)).compare(Register(0), how, &name[..compared.min(16)])
}

/// Asks for masquerading unless the source is a pod.
fn hide_others_rules(family: Family, config: &BackendConfig) -> Vec<Rule> {
    let mark = config.mark();
    match &config.pods {
        PodSources::Unknown => vec![set_mark(only(family), mark)],
        PodSources::Ranges(_) => {
            let cidrs = Map::ClusterCidrs.name(family);
            vec![set_mark(source(only(family), family, 0).lookup(cidrs, Register(0), true), mark)]
        }
        pods @ (PodSources::Bridge(_) | PodSources::InterfacePrefix(_)) => {
            let other = came_in_through(only(family), pods, Compare::NotEqual);
            // The node's own packets came in nowhere, so that older kernels skip the first rule.
            vec![set_mark(other, mark), set_mark(from_node(family), mark)]
        }
    }
}

fn source_rules(family: Family) -> Vec<Rule> {
    let (key, next) = frontend(only(family), family, Kind::Address);
    let allowed = source(key, family, next)
        .lookup(Map::Allowed.name(family), Register(0), false)
        .verdict(Verdict::Return);
    vec![allowed, Rule::new().verdict(Verdict::Drop)]
}

const TCP: u8 = 6;

fn reject_rules() -> Vec<Rule> {
    let tcp = Rule::new().meta(Meta::TransportProtocol, Register(0)).compare(
        Register(0),
        Compare::Equal,
        &[TCP],
    );
    vec![tcp.reject(Refusal::TcpReset), Rule::new().reject(Refusal::PortUnreachable)]
}

fn postrouting_rules(setup: &Setup) -> Vec<Rule> {
    let (register, bit) = (Register(0), setup.config.mark().to_ne_bytes());
    let all = (!0u32).to_ne_bytes();
    let marked = Rule::new()
        .meta(Meta::Mark, register)
        .bitwise(register, Register(1), &bit, &[0; 4])
        .compare(Register(1), Compare::Equal, &bit)
        .bitwise(register, register, &all, &bit)
        .set_meta(Meta::Mark, register)
        .masquerade();
    let hairpin = |family| {
        let translated = match setup.role {
            Role::Whole => {
                conntrack_has(only(family), Conntrack::Status, CT_STATUS_DNAT, Compare::NotEqual)
            }
            // What IPVS translates does not count as translated in connection tracking.
            Role::BesideIpvs | Role::IpvsFlows => only(family),
        };
        let addresses =
            destination(source(translated, family, 0), family, address_registers(family));
        addresses.lookup(Map::Hairpin.name(family), Register(0), false).masquerade()
    };
    vec![marked, hairpin(Family::V4), hairpin(Family::V6)]
}
