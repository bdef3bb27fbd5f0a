//! ICMP errors about packets that were translated: who is told must recognise what was sent.
//!
//! An error quotes the packet that it is about. Reversed, that is what an answer to it would carry where the error
//! is met, so the translation of answers tells what the sender had sent.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace};
use keelson_ebpf_abi::{
    DROP_FAILED, FLOW_MASQUERADE_SOON, STATE_TELLS, TOLD4_LENGTH, TOLD6_LENGTH, Tuple,
};

use crate::maps::{FLOWS_IN, FLOWS_OUT, Flows, Scratch};
use crate::parse::{Kind, Packet, load, parse_ip};
use crate::rewrite::{
    IPV4_CHECKSUM, Refused, addresses_difference, done, network_offset, rewrite_addresses, store,
    store_addresses,
};
use crate::verdict::{PASS, dropped};
use crate::{flow, own, told};

const ICMP_HEADER: u32 = 8;
const ICMP_CHECKSUM: u32 = 2;

#[inline(never)]
pub fn arriving(skb: *mut __sk_buff, scratch: &mut Scratch) -> i32 {
    translate_error(skb, scratch, &FLOWS_IN)
}

#[inline(never)]
pub fn leaving(skb: *mut __sk_buff, scratch: &mut Scratch) -> i32 {
    translate_error(skb, scratch, &FLOWS_OUT)
}

#[inline(always)]
fn translate_error(skb: *mut __sk_buff, scratch: &mut Scratch, flows: &'static Flows) -> i32 {
    if !is_error(skb, &scratch.packet) || !parse_quoted(skb, scratch) {
        return PASS;
    }
    scratch.opposite = scratch.quoted.tuple.reversed();
    let Some(flow) = flow::find(flows, &scratch.opposite) else { return PASS };
    if flow.role == FLOW_MASQUERADE_SOON {
        return PASS;
    }
    scratch.to.set(&flow.to);
    let tells = flow.state & STATE_TELLS != 0;
    if tells && shrink(skb, scratch) != 0 || translate(skb, scratch) != 0 {
        return dropped(skb, scratch, DROP_FAILED);
    }
    // The endpoint's error now comes from the Service, as its answers do.
    if flow.node_interface != 0 && !scratch.to.source.is(&scratch.packet.tuple.source) {
        return own::receive(skb, scratch, flow);
    }
    PASS
}

#[inline(always)]
fn is_error(skb: *mut __sk_buff, packet: &Packet) -> bool {
    let Some(kind) = load::<u8>(skb, packet.transport) else { return false };
    // Unreachable, time exceeded, parameter problem; for IPv6 also packet too big.
    if packet.is_v4 { matches!(kind, 3 | 11 | 12) } else { matches!(kind, 1..=4) }
}

/// Reads the packet that an error is about.
#[inline(never)]
fn parse_quoted(skb: *mut __sk_buff, scratch: &mut Scratch) -> bool {
    let Scratch { packet, quoted, .. } = scratch;
    let kind = parse_ip(skb, quoted, packet.is_v4, packet.transport + ICMP_HEADER);
    if kind != Kind::Ports || quoted.is_later_fragment {
        return false;
    }
    let Some([source_be, destination_be]) = load::<[u16; 2]>(skb, quoted.transport) else {
        return false;
    };
    quoted.tuple.source_port_be = source_be;
    quoted.tuple.destination_port_be = destination_be;
    true
}

/// Who sent a packet that became too long by what was told in it must send shorter ones. 0 when that is said.
#[inline(never)]
fn shrink(skb: *mut __sk_buff, scratch: &Scratch) -> i64 {
    let Scratch { packet, quoted, .. } = scratch;
    if told::read(skb, quoted, packet.transport + ICMP_HEADER).is_none() {
        return 0;
    }
    let by = if packet.is_v4 { TOLD4_LENGTH } else { TOLD6_LENGTH };
    if correct_size(skb, packet, by).is_ok() { 0 } else { -1 }
}

/// Says a smaller size, where the error says that packets were too long.
#[inline(always)]
fn correct_size(skb: *mut __sk_buff, packet: &Packet, by: u32) -> Result<(), Refused> {
    /// Where the size is: as the last 16 bits of a word for IPv4, and all of it for IPv6.
    const SIZE: u32 = 4;
    let [kind, code] = load::<[u8; 2]>(skb, packet.transport).ok_or(Refused)?;
    let is_about_size = if packet.is_v4 { kind == 3 && code == 4 } else { kind == 2 };
    let word_be = load::<u32>(skb, packet.transport + SIZE).ok_or(Refused)?;
    let word = u32::from_be(word_be);
    if !is_about_size || word & 0xffff < by {
        return Ok(());
    }
    let smaller = (word - by).to_be();
    let at = network_offset(skb) + packet.transport;
    let (from, to) = (u64::from(word_be), u64::from(smaller));
    // SAFETY: the helper checks the offset.
    done(unsafe { bpf_l4_csum_replace(skb, at + ICMP_CHECKSUM, from, to, 4) })?;
    store(skb, at + SIZE, &smaller, 0)
}

/// 0 when the error is about what its receiver knows.
#[inline(never)]
fn translate(skb: *mut __sk_buff, scratch: &mut Scratch) -> i64 {
    let Scratch { packet, quoted, opposite, to, .. } = scratch;
    if rewrite(skb, packet, quoted, opposite, to).is_ok() { 0 } else { -1 }
}

/// `key` is the reversed quoted tuple, `to` what it is translated to. The checksum of the quoted transport stays as
/// it is: what is quoted is cut off, so nobody can check it.
#[inline(always)]
fn rewrite(
    skb: *mut __sk_buff,
    packet: &mut Packet,
    quoted: &Packet,
    key: &Tuple,
    to: &mut Tuple,
) -> Result<(), Refused> {
    let network = network_offset(skb);
    let checksum = network + packet.transport + ICMP_CHECKSUM;
    let had = [quoted.tuple.source_port_be, quoted.tuple.destination_port_be];
    let ports = [to.destination_port_be, to.source_port_be];
    replace(skb, checksum, difference(had, ports))?;
    store(skb, network + quoted.transport, &ports, 0)?;
    let quoted_to = to.reversed();
    let diff = addresses_difference(&quoted.tuple, &quoted_to);
    let header = network + packet.transport + ICMP_HEADER;
    if packet.is_v4 {
        // The header's own checksum makes up for the addresses.
        // SAFETY: the helper checks the offset.
        if unsafe { bpf_l3_csum_replace(skb, header + IPV4_CHECKSUM, 0, diff, 0) } != 0 {
            return Err(Refused);
        }
    } else {
        replace(skb, checksum, diff)?;
    }
    store_addresses(skb, header, &quoted_to, packet.is_v4, 0)?;
    // The error itself comes from where an answer would, unless a router sends it.
    let outer = &packet.tuple;
    if !outer.source.is(&key.source) {
        to.source = outer.source;
    }
    if !outer.destination.is(&key.destination) {
        to.destination = outer.destination;
    }
    rewrite_addresses(skb, network, packet, to)
}

/// Corrects the error's checksum.
#[inline(always)]
fn replace(skb: *mut __sk_buff, at: u32, diff: u64) -> Result<(), Refused> {
    // SAFETY: the helper checks the offset.
    if unsafe { bpf_l4_csum_replace(skb, at, 0, diff, 0) } == 0 { Ok(()) } else { Err(Refused) }
}

#[inline(always)]
fn difference(mut from: [u16; 2], mut to: [u16; 2]) -> u64 {
    // SAFETY: the helper reads 4 bytes of each.
    unsafe { bpf_csum_diff(from.as_mut_ptr().cast(), 4, to.as_mut_ptr().cast(), 4, 0) as u64 }
}
