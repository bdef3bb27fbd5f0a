//! The rules around IPVS: what leads packets there, and what is behind it.

use keelson_netlink::nft::{
    CT_STATUS_DNAT, Compare, Conntrack, FIB_LOCAL, FibAddress, Meta, Register, Rule, Verdict,
};

use super::{conntrack_has, hide_others_rules, only, set_mark};
use crate::backend::BackendConfig;
use crate::model::{Family, Masquerade};
use crate::nftables::layout::Flow;

/// The connection's mark tells later packets, which see none of these chains, where to go.
pub(super) fn to_ipvs_rules(
    family: Family,
    masquerade: Masquerade,
    config: &BackendConfig,
) -> Vec<Rule> {
    let mut rules = match masquerade {
        Masquerade::Never => Vec::new(),
        Masquerade::Always => vec![set_mark(only(family), config.mark())],
        Masquerade::UnlessPod => hide_others_rules(family, config),
    };
    let (register, bit) = (Register(0), config.ipvs_mark());
    let remember = Rule::new()
        .conntrack(Conntrack::Mark, register)
        .bitwise(register, register, &(!bit).to_ne_bytes(), &bit.to_ne_bytes())
        .set_conntrack(Conntrack::Mark, register);
    rules.push(remember);
    rules
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
