//! From bytes to what decides.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::{bpf_skb_load_bytes_relative, bpf_skb_pull_data};
use keelson_ebpf_abi::{
    Address, PROTOCOL_ICMP, PROTOCOL_ICMP6, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, SIGN_START,
    Tuple, sctp_signs, tcp_signs,
};

const ETH_P_IP_BE: u32 = 0x0800u16.to_be() as u32;
const ETH_P_IPV6_BE: u32 = 0x86ddu16.to_be() as u32;
/// More than all headers that are looked at. What of it lies outside of a packet's first buffer is fetched.
const HEADERS: u32 = 256;
/// Extension headers of IPv6 that are skipped at most.
const EXTENSIONS: u32 = 6;

/// What a packet is for us.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No business of ours.
    Other,
    /// It has ports.
    Ports,
    /// The first piece of a packet with ports.
    FirstFragment,
    /// Another piece, without ports.
    LaterFragment,
    Icmp,
}

/// What is read of a packet.
#[repr(C)]
pub struct Packet {
    pub tuple: Tuple,
    /// Where the header after IP's begins, from IP's on.
    pub transport: u32,
    /// From IP's header on, as that says.
    pub length: u32,
    /// Tells the pieces of one packet from those of others.
    pub fragment: u32,
    pub is_v4: bool,
    /// `SIGN_*`.
    pub signs: u8,
    /// Ports are there to be read and changed.
    pub has_ports: bool,
    pub zero: u8,
}

#[repr(C)]
struct Ipv4 {
    version_and_length: u8,
    service: u8,
    length_be: u16,
    id_be: u16,
    fragment_be: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    source_be: u32,
    destination_be: u32,
}

#[repr(C)]
struct Ipv6 {
    version: u32,
    length_be: u16,
    next: u8,
    hops: u8,
    source: Address,
    destination: Address,
}

#[repr(C)]
struct Fragment6 {
    next: u8,
    zero: u8,
    offset_be: u16,
    id: u32,
}

#[repr(C)]
pub struct Tcp {
    source_be: u16,
    destination_be: u16,
    pub sequence_be: u32,
    pub acknowledged_be: u32,
    pub length: u8,
    pub flags: u8,
    window: u16,
    checksum: u16,
    urgent: u16,
}

/// With the first chunk's head.
#[repr(C)]
struct Sctp {
    source_be: u16,
    destination_be: u16,
    tag: u32,
    checksum: u32,
    chunk: u8,
    flags: u8,
    length: u16,
}

#[repr(C)]
struct Udp {
    source_be: u16,
    destination_be: u16,
    rest: u32,
}

/// Reads from the network header on, whatever is before it.
#[inline(always)]
pub fn load<T>(skb: *mut __sk_buff, offset: u32) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    let size = size_of::<T>() as u32;
    // SAFETY: the helper writes all of `value` or fails.
    unsafe {
        let to = value.as_mut_ptr().cast();
        let at_net = BPF_HDR_START_NET;
        (bpf_skb_load_bytes_relative(skb.cast(), offset, to, size, at_net) == 0)
            .then(|| value.assume_init())
    }
}

/// Reads a packet's headers into `packet`.
#[inline(always)]
pub fn parse(skb: *mut __sk_buff, packet: &mut Packet) -> Kind {
    // SAFETY: fields of the context.
    let (protocol, vlan) = unsafe { ((*skb).protocol, (*skb).vlan_present) };
    if vlan != 0 {
        // The interface of the VLAN sees it as well.
        return Kind::Other;
    }
    packet.fragment = 0;
    packet.signs = 0;
    packet.has_ports = false;
    packet.tuple.zero = [0; 3];
    let kind = match protocol {
        ETH_P_IP_BE => parse_v4(skb, packet),
        ETH_P_IPV6_BE => parse_v6(skb, packet),
        _ => return Kind::Other,
    };
    match kind {
        Kind::Ports | Kind::FirstFragment if !parse_transport(skb, packet) => Kind::Other,
        kind => kind,
    }
}

/// Reads what may lie outside of the packet's first buffer.
#[inline(always)]
fn load_or_pull<T>(skb: *mut __sk_buff, offset: u32) -> Option<T> {
    load(skb, offset).or_else(|| {
        // SAFETY: the helper checks the length.
        unsafe {
            let length = (*skb).len;
            bpf_skb_pull_data(skb, if length < HEADERS { length } else { HEADERS });
        }
        load(skb, offset)
    })
}

#[inline(always)]
fn parse_v4(skb: *mut __sk_buff, packet: &mut Packet) -> Kind {
    const MORE: u16 = 0x2000;
    const OFFSET: u16 = 0x1fff;
    let Some(ip) = load_or_pull::<Ipv4>(skb, 0) else { return Kind::Other };
    let length = u32::from(ip.version_and_length & 15) * 4;
    if ip.version_and_length >> 4 != 4 || length < 20 {
        return Kind::Other;
    }
    packet.is_v4 = true;
    packet.transport = length;
    packet.length = u32::from(u16::from_be(ip.length_be));
    packet.tuple.source = Address::v4(ip.source_be);
    packet.tuple.destination = Address::v4(ip.destination_be);
    packet.tuple.protocol = ip.protocol;
    let fragment = u16::from_be(ip.fragment_be);
    if fragment & (MORE | OFFSET) != 0 {
        packet.fragment = u32::from(ip.id_be);
        return fragment_of(ip.protocol, fragment & OFFSET != 0);
    }
    kind_of(ip.protocol, PROTOCOL_ICMP)
}

#[inline(always)]
fn parse_v6(skb: *mut __sk_buff, packet: &mut Packet) -> Kind {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    const OFFSET: u16 = 0xfff8;
    const MORE: u16 = 1;
    let Some(ip) = load_or_pull::<Ipv6>(skb, 0) else { return Kind::Other };
    if u32::from_be(ip.version) >> 28 != 6 {
        return Kind::Other;
    }
    packet.is_v4 = false;
    packet.length = size_of::<Ipv6>() as u32 + u32::from(u16::from_be(ip.length_be));
    packet.tuple.source = ip.source;
    packet.tuple.destination = ip.destination;
    let mut next = ip.next;
    let mut at = size_of::<Ipv6>() as u32;
    for _ in 0..EXTENSIONS {
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION | AUTHENTICATION => {
                let Some([after, length]) = load_or_pull::<[u8; 2]>(skb, at) else {
                    return Kind::Other;
                };
                at += if next == AUTHENTICATION {
                    (u32::from(length) + 2) * 4
                } else {
                    (u32::from(length) + 1) * 8
                };
                next = after;
            }
            FRAGMENT => {
                let Some(header) = load_or_pull::<Fragment6>(skb, at) else { return Kind::Other };
                at += size_of::<Fragment6>() as u32;
                next = header.next;
                let offset = u16::from_be(header.offset_be);
                if offset & (OFFSET | MORE) != 0 {
                    packet.fragment = header.id;
                    packet.transport = at;
                    packet.tuple.protocol = next;
                    // Extension headers may follow in the first piece; then it is not looked into.
                    return fragment_of(next, offset & OFFSET != 0);
                }
            }
            _ => break,
        }
    }
    packet.transport = at;
    packet.tuple.protocol = next;
    kind_of(next, PROTOCOL_ICMP6)
}

#[inline(always)]
fn kind_of(protocol: u8, icmp: u8) -> Kind {
    match protocol {
        PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP => Kind::Ports,
        _ if protocol == icmp => Kind::Icmp,
        _ => Kind::Other,
    }
}

#[inline(always)]
fn fragment_of(protocol: u8, is_later: bool) -> Kind {
    match protocol {
        PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP if is_later => Kind::LaterFragment,
        PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP => Kind::FirstFragment,
        _ => Kind::Other,
    }
}

#[inline(always)]
fn parse_transport(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
    let at = packet.transport;
    let (source_be, destination_be) = match packet.tuple.protocol {
        PROTOCOL_TCP => {
            let Some(tcp) = load_or_pull::<Tcp>(skb, at) else { return false };
            packet.signs = tcp_signs(tcp.flags);
            (tcp.source_be, tcp.destination_be)
        }
        PROTOCOL_UDP => {
            let Some(udp) = load_or_pull::<Udp>(skb, at) else { return false };
            packet.signs = SIGN_START;
            (udp.source_be, udp.destination_be)
        }
        _ => {
            let Some(sctp) = load_or_pull::<Sctp>(skb, at) else { return false };
            packet.signs = sctp_signs(sctp.chunk);
            (sctp.source_be, sctp.destination_be)
        }
    };
    packet.tuple.source_port_be = source_be;
    packet.tuple.destination_port_be = destination_be;
    packet.has_ports = true;
    true
}
