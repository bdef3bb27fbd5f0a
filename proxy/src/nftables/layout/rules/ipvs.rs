//! The rules around IPVS: what leads packets there, and what is behind it.

use keelson_netlink::nft::{
    CT_NEW, CT_STATUS_DNAT, Compare, Conntrack, FIB_LOCAL, FibAddress, Meta, Original, Register,
    Rule, Verdict,
};

use super::forwarding::{remember_rule, stick_rule};
use super::{address_registers, conntrack_has, hide_others_rules, only, set_mark};
use crate::backend::BackendConfig;
use crate::model::{Family, Masquerade};
use crate::nftables::layout::{Flow, Kind, Map, Sticky};

/// The connection's mark tells later packets, which see none of these chains, where to go.
pub(super) fn to_ipvs_rules(
    family: Family,
    masquerade: Masquerade,
    config: &BackendConfig,
) -> Vec<Rule> {
    let mut rules = hide_rules(family, masquerade, config);
    rules.push(mark_connection(config));
    rules
}

/// As [`to_ipvs_rules`] unless an endpoint is remembered for the client, and still there.
pub(super) fn stick_or_to_ipvs_rules(sticky: Sticky, config: &BackendConfig) -> Vec<Rule> {
    let mut rules = hide_rules(sticky.family, sticky.masquerade, config);
    rules.push(stick_rule(sticky));
    rules.push(mark_connection(config));
    rules
}

fn hide_rules(family: Family, masquerade: Masquerade, config: &BackendConfig) -> Vec<Rule> {
    match masquerade {
        Masquerade::Never => Vec::new(),
        Masquerade::Always => vec![set_mark(only(family), config.mark())],
        Masquerade::UnlessPod => hide_others_rules(family, config),
    }
}

fn mark_connection(config: &BackendConfig) -> Rule {
    let (register, bit) = (Register(0), config.ipvs_mark());
    Rule::new()
        .conntrack(Conntrack::Mark, register)
        .bitwise(register, register, &(!bit).to_ne_bytes(), &bit.to_ne_bytes())
        .set_conntrack(Conntrack::Mark, register)
}

/// First packets of connections for which IPVS has chosen: do their clients stick?
pub(super) fn chosen_rules(bit: u32) -> Vec<Rule> {
    let mut rules = Vec::new();
    for family in Family::BOTH {
        for kind in [Kind::Address, Kind::NodePort] {
            let new = conntrack_has(only(family), Conntrack::State, CT_NEW, Compare::NotEqual);
            let ours = conntrack_has(new, Conntrack::Mark, bit, Compare::NotEqual);
            let map = Map::Remembering(kind).name(family);
            rules.push(original_frontend(ours, family, kind).lookup_verdict(map, Register(0)));
        }
    }
    rules
}

pub(super) fn remember_rules(sticky: Sticky) -> Vec<Rule> {
    let key = original_frontend(only(sticky.family), sticky.family, sticky.kind);
    vec![remember_rule(sticky, key)]
}

/// Loads the key of the frontend that the connection was for into the registers from 0 on.
fn original_frontend(rule: Rule, family: Family, kind: Kind) -> Rule {
    let address = match family {
        Family::V4 => Original::Ipv4Destination,
        Family::V6 => Original::Ipv6Destination,
    };
    let (rule, next) = match kind {
        Kind::Address => (rule.conntrack_original(address, Register(0)), address_registers(family)),
        Kind::NodePort | Kind::Loopback => (rule, 0),
    };
    rule.meta(Meta::TransportProtocol, Register(next))
        .conntrack_original(Original::DestinationPort, Register(next + 1))
}

pub(super) fn flow_rules(flow: Flow, config: &BackendConfig) -> Vec<Rule> {
    let bit = config.ipvs_mark();
    match flow {
        Flow::Arriving => vec![set_mark(of_ipvs(bit), bit)],
        Flow::Arrived => vec![clear_mark(bit)],
        // IPVS has translated what it wanted: an address that is not this host's was not translated.
        Flow::Unwanted => {
            vec![destined(of_ipvs(bit), Compare::NotEqual).verdict(Verdict::Goto("reject-all"))]
        }
        // IPVS keeps the old way, which leads out, where the endpoint is the node itself.
        Flow::Turning => {
            let mut lo = [0; 16];
            lo[..2].copy_from_slice(b"lo");
            let outward = destined(of_ipvs(bit), Compare::Equal)
                .meta(Meta::OutputName, Register(0))
                .compare(Register(0), Compare::NotEqual, &lo);
            vec![set_mark(outward, bit)]
        }
    }
}

/// Tests for a packet from the side that began a connection, on its way to IPVS. One that a table of another
/// mode has translated is not.
fn of_ipvs(bit: u32) -> Rule {
    const ORIGINAL: [u8; 1] = [0];
    let forth = Rule::new().conntrack(Conntrack::Direction, Register(0)).compare(
        Register(0),
        Compare::Equal,
        &ORIGINAL,
    );
    let marked = conntrack_has(forth, Conntrack::Mark, bit, Compare::NotEqual);
    conntrack_has(marked, Conntrack::Status, CT_STATUS_DNAT, Compare::Equal)
}

fn clear_mark(bit: u32) -> Rule {
    let (register, spare) = (Register(0), Register(1));
    Rule::new()
        .meta(Meta::Mark, register)
        .bitwise(register, spare, &bit.to_ne_bytes(), &[0; 4])
        .compare(spare, Compare::NotEqual, &[0; 4])
        .bitwise(register, register, &(!bit).to_ne_bytes(), &[0; 4])
        .set_meta(Meta::Mark, register)
}

/// Tests whether the destination is an address of this host.
fn destined(rule: Rule, how: Compare) -> Rule {
    let register = Register(0);
    rule.fib_address_type(FibAddress::Destination, register).compare(
        register,
        how,
        &FIB_LOCAL.to_ne_bytes(),
    )
}
