//! From bytes to what decides.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::{bpf_skb_load_bytes_relative, bpf_skb_pull_data};
use keelson_ebpf_abi::{
    Address, PROTOCOL_ICMP, PROTOCOL_ICMP6, PROTOCOL_OPTIONS6, PROTOCOL_SCTP, PROTOCOL_TCP,
    PROTOCOL_UDP, SIGN_START, TOLD4_LENGTH, Tuple, sctp_signs, tcp_signs,
};

pub const ETH_P_IP_BE: u32 = 0x0800u16.to_be() as u32;
pub const ETH_P_IPV6_BE: u32 = 0x86ddu16.to_be() as u32;
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
    /// Another piece, without ports.
    LaterFragment,
    Icmp,
}

/// What is read of a packet.
#[repr(C)]
pub struct Packet {
    /// What is zero in it is so since the map was made.
    pub tuple: Tuple,
    /// Where the header after IP's begins, from IP's on.
    pub transport: u32,
    /// From IP's header on, as that says.
    pub length: u32,
    /// Tells the pieces of one packet from those of others.
    pub fragment: u32,
    /// It is a piece of one.
    pub is_fragment: bool,
    /// It is not the first.
    pub is_later_fragment: bool,
    pub is_v4: bool,
    /// `SIGN_*`.
    pub signs: u8,
    /// Ports are there to be read and changed.
    pub has_ports: bool,
    /// There is room for what another node may tell.
    pub may_tell: bool,
    pub zero: [u8; 2],
}

#[repr(C)]
pub struct Ipv4 {
    pub version_and_length: u8,
    service: u8,
    length_be: u16,
    id_be: u16,
    fragment_be: u16,
    ttl: u8,
    pub protocol: u8,
    checksum: u16,
    pub source_be: u32,
    pub destination_be: u32,
}

#[repr(C)]
pub struct Ipv6 {
    version: u32,
    length_be: u16,
    pub next: u8,
    hops: u8,
    pub source: Address,
    pub destination: Address,
}

/// The first bytes of an extension header; what is behind the length is a fragment header's.
#[repr(C)]
struct Extension {
    next: u8,
    length: u8,
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

/// Reads a packet's IP headers into `packet`. [`parse_transport`] reads what is behind them.
#[inline(always)]
pub fn parse(skb: *mut __sk_buff, packet: &mut Packet) -> Kind {
    // SAFETY: fields of the context.
    let (protocol, vlan) = unsafe { ((*skb).protocol, (*skb).vlan_present) };
    if vlan != 0 {
        // The interface of the VLAN sees it as well.
        return Kind::Other;
    }
    let is_v4 = match protocol {
        ETH_P_IP_BE => true,
        ETH_P_IPV6_BE => false,
        _ => return Kind::Other,
    };
    match parse_ip(skb, packet, is_v4, 0) {
        Kind::Ports if packet.is_later_fragment => Kind::LaterFragment,
        kind => kind,
    }
}

/// Reads the IP headers at `at`, but nothing behind them: ports are to be expected there, or not.
#[inline(always)]
pub fn parse_ip(skb: *mut __sk_buff, packet: &mut Packet, is_v4: bool, at: u32) -> Kind {
    packet.is_v4 = is_v4;
    packet.signs = 0;
    packet.has_ports = false;
    packet.may_tell = false;
    packet.is_fragment = false;
    packet.is_later_fragment = false;
    if !(if is_v4 { parse_v4(skb, packet, at) } else { parse_v6(skb, packet, at) }) {
        return Kind::Other;
    }
    match packet.tuple.protocol {
        PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP => Kind::Ports,
        PROTOCOL_ICMP if is_v4 && !packet.is_fragment => Kind::Icmp,
        PROTOCOL_ICMP6 if !is_v4 && !packet.is_fragment => Kind::Icmp,
        _ => Kind::Other,
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
fn parse_v4(skb: *mut __sk_buff, packet: &mut Packet, at: u32) -> bool {
    const MORE: u16 = 0x2000;
    const OFFSET: u16 = 0x1fff;
    let Some(ip) = load_or_pull::<Ipv4>(skb, at) else { return false };
    let length = u32::from(ip.version_and_length & 15) * 4;
    if ip.version_and_length >> 4 != 4 || length < 20 {
        return false;
    }
    packet.transport = at + length;
    packet.may_tell = length >= size_of::<Ipv4>() as u32 + TOLD4_LENGTH;
    packet.length = u32::from(u16::from_be(ip.length_be));
    packet.tuple.source = Address::v4(ip.source_be);
    packet.tuple.destination = Address::v4(ip.destination_be);
    packet.tuple.protocol = ip.protocol;
    let fragment = u16::from_be(ip.fragment_be);
    packet.fragment = u32::from(ip.id_be);
    packet.is_fragment = fragment & (MORE | OFFSET) != 0;
    packet.is_later_fragment = fragment & OFFSET != 0;
    true
}

#[inline(always)]
fn parse_v6(skb: *mut __sk_buff, packet: &mut Packet, at: u32) -> bool {
    let Some(ip) = load_or_pull::<Ipv6>(skb, at) else { return false };
    if u32::from_be(ip.version) >> 28 != 6 {
        return false;
    }
    packet.length = size_of::<Ipv6>() as u32 + u32::from(u16::from_be(ip.length_be));
    packet.tuple.source = ip.source;
    packet.tuple.destination = ip.destination;
    packet.tuple.protocol = ip.next;
    packet.transport = at + size_of::<Ipv6>() as u32;
    packet.may_tell = ip.next == PROTOCOL_OPTIONS6;
    for _ in 0..EXTENSIONS {
        match skip_extension(skb, packet) {
            Skipped::Extension => {}
            Skipped::Nothing => return true,
            Skipped::Unreadable => return false,
        }
    }
    true
}

enum Skipped {
    Extension,
    Nothing,
    Unreadable,
}

/// Skips an extension header of IPv6 where the transport's is supposed.
#[inline(always)]
fn skip_extension(skb: *mut __sk_buff, packet: &mut Packet) -> Skipped {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const OFFSET: u16 = 0xfff8;
    const MORE: u16 = 1;
    let this = packet.tuple.protocol;
    if !matches!(this, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | PROTOCOL_OPTIONS6)
        || packet.is_later_fragment
    {
        return Skipped::Nothing;
    }
    let Some(header) = load_or_pull::<Extension>(skb, packet.transport) else {
        return Skipped::Unreadable;
    };
    packet.tuple.protocol = header.next;
    packet.transport += match this {
        FRAGMENT => size_of::<Extension>() as u32,
        AUTHENTICATION => (u32::from(header.length) + 2) * 4,
        _ => (u32::from(header.length) + 1) * 8,
    };
    if this == FRAGMENT {
        let offset = u16::from_be(header.offset_be);
        packet.fragment = header.id;
        packet.is_fragment = offset & (OFFSET | MORE) != 0;
        packet.is_later_fragment = offset & OFFSET != 0;
    }
    Skipped::Extension
}

/// Reads ports and what the packet says of its connection. False when they are not there.
#[inline(always)]
pub fn parse_transport(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
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
