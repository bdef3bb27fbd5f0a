//! Writes other addresses and ports into a packet.
//!
//! Checksums are corrected by the difference, so one that was wrong stays wrong, and one that hardware shall
//! complete is still completed.

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::{
    bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_store_bytes,
};
use keelson_ebpf::counters;
use keelson_ebpf::maps::INTERFACES;
use keelson_ebpf_abi::{
    Address, DROP_FAILED, INTERFACE_NO_LINK_HEADER, PROTOCOL_ICMP6, PROTOCOL_SCTP, PROTOCOL_TCP,
    PROTOCOL_UDP, Tuple, sctp_checksum_change,
};

use crate::fragment;
use crate::maps::Scratch;
use crate::parse::{Packet, load};
use crate::verdict::{PASS, dropped};

const ETHERNET: u32 = 14;
pub const IPV4_CHECKSUM: u32 = 10;
const IPV4_SOURCE: u32 = 12;
const IPV6_SOURCE: u32 = 8;
const TCP_CHECKSUM: u32 = 16;
const UDP_CHECKSUM: u32 = 6;
const ICMP6_CHECKSUM: u32 = 2;
const SCTP_CHECKSUM: u32 = 8;

/// A step that the kernel refused, maybe after others that it did not.
pub struct Refused;

/// Whether packets begin with an Ethernet header here.
#[inline(always)]
pub fn has_link_header(skb: *mut __sk_buff) -> bool {
    // SAFETY: a field of the context; the map is not preallocated.
    let interface = unsafe { INTERFACES.get((*skb).ifindex) };
    !interface.is_some_and(|interface| interface.flags & INTERFACE_NO_LINK_HEADER != 0)
}

/// Where the IP header is.
#[inline(always)]
pub fn network_offset(skb: *mut __sk_buff) -> u32 {
    if has_link_header(skb) { ETHERNET } else { 0 }
}

/// Makes the packet carry `scratch.to`, and counts it for the frontend, if that is not 0.
#[inline(never)]
pub fn translate(skb: *mut __sk_buff, scratch: &Scratch, frontend: u32) -> i32 {
    let network = network_offset(skb);
    let packet = &scratch.packet;
    if packet.is_fragment && packet.has_ports {
        fragment::remember(packet);
    }
    if rewrite_addresses(skb, network, packet, &scratch.to).is_err()
        || rewrite_ports(skb, network, packet, &scratch.to).is_err()
    {
        return dropped(skb, scratch, DROP_FAILED);
    }
    if frontend == 0 {
        return PASS;
    }
    // SAFETY: fields of the context.
    let (length, segments) = unsafe { ((*skb).len, (*skb).gso_segs) };
    counters::count(frontend, |counters| {
        counters.packets += u64::from(if segments == 0 { 1 } else { segments });
        counters.bytes += u64::from(length - network);
    });
    PASS
}

/// Makes `packet` carry the addresses of `to`. `network` is where its IP header is.
#[inline(always)]
pub fn rewrite_addresses(
    skb: *mut __sk_buff,
    network: u32,
    packet: &Packet,
    to: &Tuple,
) -> Result<(), Refused> {
    let from = &packet.tuple;
    let transport = network + packet.transport;
    let checksum = checksum_offset(packet);
    if from.source != to.source || from.destination != to.destination {
        let diff = addresses_difference(from, to);
        if let Some(at) = checksum {
            let flags = flags(from.protocol) | BPF_F_PSEUDO_HDR;
            replace_transport(skb, transport + at, 0, diff, flags)?;
        }
        let mut flags = 0;
        if packet.is_v4 {
            // SAFETY: the helper checks the offset.
            done(unsafe { bpf_l3_csum_replace(skb, network + IPV4_CHECKSUM, 0, diff, 0) })?;
        } else {
            // No checksum of IPv6 makes up for them in a sum that the interface made of the whole packet.
            flags = BPF_F_RECOMPUTE_CSUM;
        }
        store_addresses(skb, network, to, packet.is_v4, flags)?;
    }
    Ok(())
}

/// Makes `packet` carry the ports of `to`.
#[inline(always)]
fn rewrite_ports(
    skb: *mut __sk_buff,
    network: u32,
    packet: &Packet,
    to: &Tuple,
) -> Result<(), Refused> {
    let from = &packet.tuple;
    let transport = network + packet.transport;
    let ports = [to.source_port_be, to.destination_port_be];
    let had = [from.source_port_be, from.destination_port_be];
    if packet.has_ports && ports != had {
        if let Some(at) = checksum_offset(packet) {
            let word = |[a, b]: [u16; 2]| u64::from(a) | u64::from(b) << 16;
            replace_transport(
                skb,
                transport + at,
                word(had),
                word(ports),
                flags(from.protocol) | 4,
            )?;
        }
        if from.protocol == PROTOCOL_SCTP && correct_sctp(skb, packet, transport, to) != 0 {
            return Err(Refused);
        }
        store(skb, transport, &ports, 0)?;
    }
    Ok(())
}

/// Corrects SCTP's checksum, which covers no addresses, for a change of ports. 0 when that is done.
#[inline(never)]
fn correct_sctp(skb: *mut __sk_buff, packet: &Packet, transport: u32, to: &Tuple) -> i64 {
    let Some(checksum) = load::<u32>(skb, packet.transport + SCTP_CHECKSUM) else { return -1 };
    if checksum == 0 {
        // Hardware, or the receiver's kernel, is still to compute it.
        return 0;
    }
    if packet.is_fragment {
        // It depends on how long the whole packet is.
        return -1;
    }
    let from = [packet.tuple.source_port_be, packet.tuple.destination_port_be];
    let ports = [to.source_port_be, to.destination_port_be];
    let length = packet.length.saturating_sub(packet.transport);
    let checksum = checksum ^ sctp_checksum_change(from, ports, length);
    if store(skb, transport + SCTP_CHECKSUM, &checksum, 0).is_ok() { 0 } else { -1 }
}

/// Writes a tuple's addresses into the IP header at `at`.
#[inline(always)]
pub fn store_addresses(
    skb: *mut __sk_buff,
    at: u32,
    to: &Tuple,
    is_v4: bool,
    flags: u32,
) -> Result<(), Refused> {
    if is_v4 {
        let addresses = [to.source.words_be[3], to.destination.words_be[3]];
        store(skb, at + IPV4_SOURCE, &addresses, flags)
    } else {
        store(skb, at + IPV6_SOURCE, &[to.source, to.destination], flags)
    }
}

/// Where the transport's checksum is, if there is one that these changes concern.
#[inline(always)]
fn checksum_offset(packet: &Packet) -> Option<u32> {
    match packet.tuple.protocol {
        PROTOCOL_TCP if packet.has_ports => Some(TCP_CHECKSUM),
        PROTOCOL_UDP if packet.has_ports => Some(UDP_CHECKSUM),
        PROTOCOL_ICMP6 => Some(ICMP6_CHECKSUM),
        _ => None,
    }
}

#[inline(always)]
fn flags(protocol: u8) -> u32 {
    // 0 says that there is none.
    if protocol == PROTOCOL_UDP { BPF_F_MARK_MANGLED_0 } else { 0 }
}

/// By how much a checksum changes when the addresses do. The parts that IPv4 addresses lack here are the same on both
/// sides.
#[inline(always)]
pub fn addresses_difference(from: &Tuple, to: &Tuple) -> u64 {
    let pointer = |address: &Address| address.words_be.as_ptr().cast_mut();
    // SAFETY: the helper reads 16 bytes from each.
    unsafe {
        let (old, new) = (pointer(&from.source), pointer(&to.source));
        let diff = bpf_csum_diff(old, 16, new, 16, 0);
        let (old, new) = (pointer(&from.destination), pointer(&to.destination));
        bpf_csum_diff(old, 16, new, 16, diff as u32) as u64
    }
}

#[inline(always)]
fn replace_transport(
    skb: *mut __sk_buff,
    at: u32,
    from: u64,
    to: u64,
    flags: u32,
) -> Result<(), Refused> {
    // SAFETY: the helper checks the offset.
    done(unsafe { bpf_l4_csum_replace(skb, at, from, to, u64::from(flags)) })
}

#[inline(always)]
pub fn store<T>(skb: *mut __sk_buff, at: u32, value: &T, flags: u32) -> Result<(), Refused> {
    let from = core::ptr::from_ref(value).cast();
    // SAFETY: the helper reads as many bytes as `value` has, and checks the offset.
    done(unsafe { bpf_skb_store_bytes(skb, at, from, size_of::<T>() as u32, flags.into()) })
}

#[inline(always)]
pub fn done(result: i64) -> Result<(), Refused> {
    if result == 0 { Ok(()) } else { Err(Refused) }
}

/// A sum as a checksum.
#[inline(always)]
pub fn folded(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}
