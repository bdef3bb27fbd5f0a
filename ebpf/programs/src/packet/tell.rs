//! Tells the node of an endpoint which Service was asked, in the packet that begins a connection (datagrams: in each):
//! so it can answer the client by itself, who is not masqueraded then.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_NET;
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_NO_CSUM_RESET, BPF_F_RECOMPUTE_CSUM,
};
use aya_ebpf::helpers::{bpf_csum_diff, bpf_skb_adjust_room};
use keelson_ebpf_abi::{DROP_FAILED, PROTOCOL_OPTIONS6, TOLD4_LENGTH, TOLD6_LENGTH, Told4, Told6};

use crate::maps::Scratch;
use crate::parse::{Packet, load};
use crate::rewrite::{IPV4_CHECKSUM, Refused, done, folded, network_offset, store};
use crate::verdict::{PASS, dropped};

pub const IPV4: u32 = 20;
pub const IPV6: u32 = 40;
/// What an IPv4 header can be long.
const IPV4_MOST: u32 = 60;
/// Of the word that IPv4 begins with: four bytes of a header's length.
pub const IPV4_WORD: u32 = 1 << 24;
/// Where IPv6 has the word with its length, the next header and the hop limit.
pub const IPV6_LENGTH: u32 = 4;

/// Whether a packet has room for it.
#[inline(always)]
pub fn fits(packet: &Packet) -> bool {
    !packet.is_v4 || packet.transport + TOLD4_LENGTH <= IPV4_MOST
}

/// Writes where the packet at hand came to, and was translated from, into it.
#[inline(never)]
pub fn tell(skb: *mut __sk_buff, scratch: &Scratch) -> i32 {
    let network = network_offset(skb);
    let packet = &scratch.packet;
    let told = if packet.is_v4 { tell4(skb, network, packet) } else { tell6(skb, network, packet) };
    if told.is_ok() { PASS } else { dropped(skb, scratch, DROP_FAILED) }
}

#[inline(always)]
fn tell4(skb: *mut __sk_buff, network: u32, packet: &Packet) -> Result<(), Refused> {
    let tuple = &packet.tuple;
    let first = u32::from_be(load::<u32>(skb, 0).ok_or(Refused)?);
    if !fits(packet) || (first & 0xffff) + TOLD4_LENGTH > 0xffff {
        return Err(Refused);
    }
    let longer = first + TOLD4_LENGTH / 4 * IPV4_WORD + TOLD4_LENGTH;
    let told = Told4::new(&tuple.destination, tuple.destination_port_be);
    make_room(skb, TOLD4_LENGTH as i32)?;
    store(skb, network + IPV4, &told, BPF_F_RECOMPUTE_CSUM)?;
    store_first4(skb, network, [first.to_be(), 0, 0], words(longer, &told))
}

/// An IPv4 header's first word and what is told in it.
#[inline(always)]
pub fn words(first: u32, told: &Told4) -> [u32; 3] {
    let begin = u32::from_ne_bytes([told.kind, told.length, 0, 0]) | port_word(told.port_be);
    [first.to_be(), begin, told.address_be]
}

/// A port in the second half of a word.
#[inline(always)]
fn port_word(port_be: u16) -> u32 {
    let [a, b] = port_be.to_ne_bytes();
    u32::from_ne_bytes([0, 0, a, b])
}

/// Writes the first word of an IPv4 header, and its checksum, where `from` became `to`. Both begin with that word.
#[inline(always)]
pub fn store_first4(
    skb: *mut __sk_buff,
    network: u32,
    mut from: [u32; 3],
    mut to: [u32; 3],
) -> Result<(), Refused> {
    const SIZE: u32 = size_of::<[u32; 3]>() as u32;
    let was = load::<u16>(skb, IPV4_CHECKSUM).ok_or(Refused)?;
    let seed = u32::from(!was);
    // SAFETY: the helper reads as many bytes of each.
    let sum = unsafe { bpf_csum_diff(from.as_mut_ptr(), SIZE, to.as_mut_ptr(), SIZE, seed) };
    // The header adds up to what it did, but bytes came or went that the interface's sum may not know of.
    store(skb, network, &to[0], BPF_F_RECOMPUTE_CSUM)?;
    store(skb, network + IPV4_CHECKSUM, &folded(sum as u32), BPF_F_RECOMPUTE_CSUM)
}

#[inline(always)]
fn tell6(skb: *mut __sk_buff, network: u32, packet: &Packet) -> Result<(), Refused> {
    let tuple = &packet.tuple;
    let rest = u32::from_be(load::<u32>(skb, IPV6_LENGTH).ok_or(Refused)?);
    let (length, next) = (rest >> 16, (rest >> 8) as u8);
    if length + TOLD6_LENGTH > 0xffff {
        return Err(Refused);
    }
    let told = Told6::new(next, &tuple.destination, tuple.destination_port_be);
    let rest = (length + TOLD6_LENGTH) << 16 | u32::from(PROTOCOL_OPTIONS6) << 8 | rest & 0xff;
    make_room(skb, TOLD6_LENGTH as i32)?;
    store(skb, network + IPV6, &told, BPF_F_RECOMPUTE_CSUM)?;
    store(skb, network + IPV6_LENGTH, &rest.to_be(), BPF_F_RECOMPUTE_CSUM)
}

/// Makes an IP header longer behind its fixed part, or shorter.
#[inline(always)]
pub fn make_room(skb: *mut __sk_buff, by: i32) -> Result<(), Refused> {
    // Segments stay as long as they are, and what is known of their checksums stays true.
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET);
    // SAFETY: the helper checks lengths.
    done(unsafe { bpf_skb_adjust_room(skb, by, BPF_ADJ_ROOM_NET, flags) })
}
