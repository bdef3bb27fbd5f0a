//! Tells a sender that nobody is there, out of the packet that it sent: TCP reset, or port unreachable.
//!
//! The packet is cut down and written anew. Its transport header is cut out on the way, also because only so the
//! kernel forgets a checksum that it was to complete there.

use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::{
    bpf_csum_diff, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
    bpf_skb_load_bytes_relative, bpf_skb_store_bytes,
};
use keelson_ebpf_abi::{
    Address, DROP_FAILED, DROP_UNANSWERED, PROTOCOL_ICMP, PROTOCOL_ICMP6, PROTOCOL_TCP, SIGN_RESET,
};

use crate::maps::Scratch;
use crate::parse::{Packet, Tcp, load};
use crate::rewrite::{Refused, done, folded, network_offset, store};
use crate::verdict::dropped;

const TTL: u8 = 64;
const IPV4: u32 = 20;
const IPV6: u32 = 40;
const TCP: u32 = 20;
const ICMP: u32 = 8;
/// What an ICMP error quotes of the transport's header.
const QUOTED: u32 = 8;
/// What an ICMP error quotes at most, so that the answer's body is at most [`BODY`] long.
const QUOTE: u32 = BODY - ICMP;
/// A power of two.
const BODY: u32 = 128;

/// What follows the IP header of an answer.
#[repr(C)]
pub struct Body {
    /// With room for as much as a length can be for the verifier, behind the header.
    words: [u32; (ICMP + BODY) as usize / 4],
}

/// Sends the answer back by the interface of the packet: `into` is 0, or `BPF_F_INGRESS` when the node itself is
/// told.
#[inline(never)]
pub fn refuse(skb: *mut __sk_buff, scratch: &mut Scratch, into: u64) -> i32 {
    if !is_answered(&scratch.packet) {
        return dropped(skb, scratch, DROP_UNANSWERED);
    }
    if answer(skb, &scratch.packet, &mut scratch.body).is_none() {
        return dropped(skb, scratch, DROP_FAILED);
    }
    // SAFETY: a field of the context; the helper has no preconditions.
    unsafe { bpf_redirect((*skb).ifindex, into) as i32 }
}

/// How functions of their own say that they failed; so their stack is not the caller's.
const FAILED: u32 = 0;

#[inline(always)]
fn answer(skb: *mut __sk_buff, packet: &Packet, body: &mut Body) -> Option<()> {
    body.words = [0; _];
    let length = if packet.tuple.protocol == PROTOCOL_TCP {
        reset(skb, packet, body)
    } else {
        unreachable(skb, packet, body)
    };
    (length != FAILED && send(skb, packet, body, length) == 0).then_some(())
}

/// Nobody answers a reset, or somebody who is not one host.
#[inline(always)]
fn is_answered(packet: &Packet) -> bool {
    let words = &packet.tuple.source.words_be;
    let is_one = if packet.is_v4 {
        let first = u32::from_be(words[3]) >> 24;
        first != 0 && first != 127 && first < 224
    } else {
        let first = u32::from_be(words[0]) >> 24;
        first != 0xff && (words[0] | words[1] | words[2] != 0)
    };
    is_one && packet.signs & SIGN_RESET == 0
}

/// RFC 9293, 3.5.2, group 1.
#[inline(never)]
fn reset(skb: *mut __sk_buff, packet: &Packet, body: &mut Body) -> u32 {
    const FIN: u8 = 1;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    let Some(tcp) = load::<Tcp>(skb, packet.transport) else { return FAILED };
    let (sequence, acknowledged, flags) = if tcp.flags & ACK != 0 {
        (u32::from_be(tcp.acknowledged_be), 0, RST)
    } else {
        let header = u32::from(tcp.length >> 4) * 4;
        let data = packet.length.saturating_sub(packet.transport + header);
        let marks = u32::from(tcp.flags & SYN != 0) + u32::from(tcp.flags & FIN != 0);
        (0, u32::from_be(tcp.sequence_be).wrapping_add(data + marks), RST | ACK)
    };
    let tuple = &packet.tuple;
    body.words[0] = u32::from(tuple.destination_port_be) | u32::from(tuple.source_port_be) << 16;
    body.words[1] = sequence.to_be();
    body.words[2] = acknowledged.to_be();
    body.words[3] = u32::from_ne_bytes([5 << 4, flags, 0, 0]);
    let sum = pseudo_header(packet, PROTOCOL_TCP, TCP);
    body.words[4] = u32::from(checksum(body, sum));
    TCP
}

/// ICMP: RFC 792; ICMPv6: RFC 4443, 3.1.
#[inline(never)]
fn unreachable(skb: *mut __sk_buff, packet: &Packet, body: &mut Body) -> u32 {
    let quoted = packet.transport + QUOTED;
    if quoted > QUOTE || load_quote(skb, body, quoted) != 0 {
        return FAILED;
    }
    let (kind, code, sum) = if packet.is_v4 {
        (3, 3, 0)
    } else {
        (1, 4, pseudo_header(packet, PROTOCOL_ICMP6, ICMP + quoted))
    };
    body.words[0] = u32::from_ne_bytes([kind, code, 0, 0]);
    body.words[0] |= u32::from(checksum(body, sum)) << 16;
    ICMP + quoted
}

#[inline(always)]
fn pseudo_header(packet: &Packet, protocol: u8, length: u32) -> u32 {
    let sum = u32::from(u16::from(protocol).to_be()) + u32::from((length as u16).to_be());
    let sum = add_address(sum, &packet.tuple.source, packet.is_v4);
    add_address(sum, &packet.tuple.destination, packet.is_v4)
}

#[inline(always)]
fn add_address(sum: u32, address: &Address, is_v4: bool) -> u32 {
    let words = &address.words_be;
    if is_v4 { add(sum, words.as_ptr().wrapping_add(3), 4) } else { add(sum, words.as_ptr(), 16) }
}

/// Adds words to a checksum. What is behind a body's end is 0 and changes nothing.
#[inline(always)]
fn add(sum: u32, words: *const u32, length: u32) -> u32 {
    // SAFETY: the callers give what lies within one object.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, words.cast_mut(), length, sum) as u32 }
}

#[inline(always)]
fn checksum(body: &Body, sum: u32) -> u16 {
    folded(add(sum, body.words.as_ptr(), size_of::<Body>() as u32))
}

/// Makes the packet consist of its link header, a new IP header, and `length` bytes of `body`.
#[inline(never)]
fn send(skb: *mut __sk_buff, packet: &Packet, body: &Body, length: u32) -> i64 {
    if write(skb, packet, body, length).is_ok() { 0 } else { -1 }
}

#[inline(always)]
fn write(skb: *mut __sk_buff, packet: &Packet, body: &Body, length: u32) -> Result<(), Refused> {
    let network = network_offset(skb);
    let header = if packet.is_v4 { IPV4 } else { IPV6 };
    // Up to the first bytes of the transport's header, behind where its checksum begins.
    let cut = packet.transport + 4;
    let size = network + cut + header + length;
    // SAFETY: the helpers check lengths.
    unsafe {
        if bpf_skb_change_tail(skb, size, 0) != 0
            || bpf_skb_adjust_room(skb, -(cut as i32), BPF_ADJ_ROOM_MAC, 0) != 0
        {
            return Err(Refused);
        }
    }
    if network != 0 {
        turn_link_header(skb)?;
    }
    if packet.is_v4 {
        store(skb, network, &ipv4(packet, header + length), BPF_F_RECOMPUTE_CSUM)?;
    } else {
        store(skb, network, &ipv6(packet, length), BPF_F_RECOMPUTE_CSUM)?;
    }
    done(store_body(skb, network + header, body, length))
}

#[inline(always)]
fn turn_link_header(skb: *mut __sk_buff) -> Result<(), Refused> {
    let mut addresses = [0u16; 6];
    // SAFETY: the helper writes 12 bytes or fails.
    let result = unsafe { bpf_skb_load_bytes(skb.cast(), 0, addresses.as_mut_ptr().cast(), 12) };
    if result != 0 {
        return Err(Refused);
    }
    let [a, b, c, d, e, f] = addresses;
    store(skb, 0, &[d, e, f, a, b, c], 0)
}

#[inline(always)]
fn ipv4(packet: &Packet, length: u32) -> [u32; 5] {
    const DONT_FRAGMENT: u16 = 0x4000;
    let [length_0, length_1] = (length as u16).to_be_bytes();
    let [flags_0, flags_1] = DONT_FRAGMENT.to_be_bytes();
    let protocol = answering_protocol(packet);
    let mut words = [
        u32::from_ne_bytes([0x45, 0, length_0, length_1]),
        u32::from_ne_bytes([0, 0, flags_0, flags_1]),
        u32::from_ne_bytes([TTL, protocol, 0, 0]),
        packet.tuple.destination.words_be[3],
        packet.tuple.source.words_be[3],
    ];
    words[2] |= u32::from(folded(add(0, words.as_ptr(), IPV4))) << 16;
    words
}

#[inline(always)]
fn ipv6(packet: &Packet, length: u32) -> [u32; 10] {
    let [length_0, length_1] = (length as u16).to_be_bytes();
    let [a, b, c, d] = packet.tuple.destination.words_be;
    let [e, f, g, h] = packet.tuple.source.words_be;
    let protocol = answering_protocol(packet);
    [
        u32::from_ne_bytes([0x60, 0, 0, 0]),
        u32::from_ne_bytes([length_0, length_1, protocol, TTL]),
        a,
        b,
        c,
        d,
        e,
        f,
        g,
        h,
    ]
}

#[inline(always)]
fn answering_protocol(packet: &Packet) -> u8 {
    match packet.tuple.protocol {
        PROTOCOL_TCP => PROTOCOL_TCP,
        _ if packet.is_v4 => PROTOCOL_ICMP,
        _ => PROTOCOL_ICMP6,
    }
}

#[inline(never)]
fn store_body(skb: *mut __sk_buff, at: u32, body: &Body, length: u32) -> i64 {
    let from = body.words.as_ptr().cast();
    // SAFETY: `body` has that many bytes; the helper checks the offset.
    unsafe { bpf_skb_store_bytes(skb, at, from, bounded(length), BPF_F_RECOMPUTE_CSUM.into()) }
}

#[inline(never)]
fn load_quote(skb: *mut __sk_buff, body: &mut Body, length: u32) -> i64 {
    // SAFETY: the buffer has room for `BODY` bytes behind the header.
    unsafe {
        let to = (&raw mut body.words).cast::<u8>().add(ICMP as usize).cast();
        bpf_skb_load_bytes_relative(skb.cast(), 0, to, bounded(length), BPF_HDR_START_NET)
    }
}

/// A length that is known to be between 1 and [`BODY`], in a form that tells verifiers, too. Those before Linux 6.3
/// forget what a comparison tells as soon as the compiler makes it on a copy.
#[inline(always)]
fn bounded(length: u32) -> u32 {
    (length.wrapping_sub(1) & (BODY - 1)) + 1
}
