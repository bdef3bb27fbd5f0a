//! From bytes to what decides. Only the plainest frames are read: no options, no extension headers, no pieces.

use core::mem::size_of;

use aya_ebpf::bindings::xdp_md;
use keelson_ebpf_abi::{
    Address, PROTOCOL_TCP, PROTOCOL_UDP, SIGN_START, Sum, Tuple, pseudo_header, tcp_signs,
};

const ETH_P_IP_BE: u16 = 0x0800u16.to_be();
const ETH_P_IPV6_BE: u16 = 0x86ddu16.to_be();

// Frames begin at even addresses, so nothing in them is aligned better.

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    kind_be: u16,
}

#[repr(C, packed(2))]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    version_and_length: u8,
    pub service: u8,
    length_be: u16,
    id: u16,
    fragment_be: u16,
    pub ttl: u8,
    protocol: u8,
    pub checksum: u16,
    pub source_be: u32,
    pub destination_be: u32,
}

#[repr(C, packed(2))]
#[derive(Clone, Copy)]
pub struct Ipv6 {
    pub version_and_flow_be: u32,
    length_be: u16,
    next: u8,
    pub hops: u8,
    pub source_be: [u32; 4],
    pub destination_be: [u32; 4],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tcp {
    pub source_be: u16,
    pub destination_be: u16,
    numbers: [u16; 4],
    length: u8,
    flags: u8,
    window: u16,
    pub checksum: u16,
    urgent: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Udp {
    pub source_be: u16,
    pub destination_be: u16,
    length: u16,
    pub checksum: u16,
}

#[derive(Clone, Copy)]
pub enum Network {
    V4(*mut Ipv4),
    V6(*mut Ipv6),
}

#[derive(Clone, Copy)]
pub enum Transport {
    Tcp(*mut Tcp),
    Udp(*mut Udp),
}

/// A frame's headers, where they are.
pub struct Frame {
    pub ethernet: *mut Ethernet,
    pub network: Network,
    pub transport: Transport,
    /// From IP's header on, as that says.
    pub length: u16,
    /// `SIGN_*`.
    pub signs: u8,
}

/// Where something is in the frame, if that is long enough.
#[inline(always)]
fn at<T>(ctx: *mut xdp_md, offset: usize) -> Option<*mut T> {
    // SAFETY: fields of the context.
    let (data, end) = unsafe { ((*ctx).data as usize, (*ctx).data_end as usize) };
    let begin = data + offset;
    (begin + size_of::<T>() <= end).then_some(begin as *mut T)
}

/// Reads the headers; `tuple` is what the frame carries then.
#[inline(always)]
pub fn read(ctx: *mut xdp_md, tuple: &mut Tuple) -> Option<Frame> {
    let ethernet = at::<Ethernet>(ctx, 0)?;
    let network = size_of::<Ethernet>();
    // SAFETY: it lies within the frame.
    match unsafe { (*ethernet).kind_be } {
        ETH_P_IP_BE => {
            let ip = at::<Ipv4>(ctx, network)?;
            let length = read_v4(ip, tuple)?;
            let header = size_of::<Ipv4>();
            with_transport(ctx, ethernet, Network::V4(ip), length, header, tuple)
        }
        ETH_P_IPV6_BE => {
            let ip = at::<Ipv6>(ctx, network)?;
            let length = read_v6(ip, tuple)?;
            let header = size_of::<Ipv6>();
            with_transport(ctx, ethernet, Network::V6(ip), length, header, tuple)
        }
        _ => None,
    }
}

/// The length of the packet, if it may go on.
#[inline(always)]
fn read_v4(at: *mut Ipv4, tuple: &mut Tuple) -> Option<u16> {
    const PLAIN: u8 = 0x45;
    const MORE_OR_OFFSET: u16 = 0x3fff;
    // SAFETY: it lies within the frame.
    let ip = unsafe { *at };
    let is_whole = u16::from_be(ip.fragment_be) & MORE_OR_OFFSET == 0;
    if ip.version_and_length != PLAIN || !is_whole || ip.ttl <= 1 || !has_valid_checksum(&ip) {
        return None;
    }
    tuple.source = Address::v4(ip.source_be);
    tuple.destination = Address::v4(ip.destination_be);
    tuple.protocol = ip.protocol;
    Some(u16::from_be(ip.length_be))
}

/// The kernel drops others.
#[inline(always)]
fn has_valid_checksum(ip: &Ipv4) -> bool {
    let pair = |a: u16, b: u16| u32::from(a) | u32::from(b) << 16;
    let bytes = |a: u8, b: u8| u16::from_ne_bytes([a, b]);
    let sum = Sum::default()
        .and(pair(bytes(ip.version_and_length, ip.service), ip.length_be))
        .and(pair(ip.id, ip.fragment_be))
        .and(pair(bytes(ip.ttl, ip.protocol), ip.checksum))
        .and(ip.source_be)
        .and(ip.destination_be);
    sum.folded() == 0xffff
}

/// The length of the packet, if it may go on.
#[inline(always)]
fn read_v6(at: *mut Ipv6, tuple: &mut Tuple) -> Option<u16> {
    // SAFETY: it lies within the frame.
    let ip = unsafe { *at };
    if u32::from_be(ip.version_and_flow_be) >> 28 != 6 || ip.hops <= 1 {
        return None;
    }
    tuple.source = Address { words_be: ip.source_be };
    tuple.destination = Address { words_be: ip.destination_be };
    tuple.protocol = ip.next;
    u16::from_be(ip.length_be).checked_add(size_of::<Ipv6>() as u16)
}

#[inline(always)]
fn with_transport(
    ctx: *mut xdp_md,
    ethernet: *mut Ethernet,
    network: Network,
    length: u16,
    header: usize,
    tuple: &mut Tuple,
) -> Option<Frame> {
    let place = size_of::<Ethernet>() + header;
    // SAFETY: fields of the context.
    let whole = unsafe { (*ctx).data_end as usize - (*ctx).data as usize };
    let is_v4 = matches!(network, Network::V4(_));
    let rest = usize::from(length).checked_sub(header)?;
    if size_of::<Ethernet>() + usize::from(length) > whole {
        return None;
    }
    let (transport, source_be, destination_be, checksum, least, signs) = match tuple.protocol {
        PROTOCOL_TCP => {
            let place = at::<Tcp>(ctx, place)?;
            // SAFETY: it lies within the frame.
            let tcp = unsafe { *place };
            let signs = tcp_signs(tcp.flags);
            let least = size_of::<Tcp>();
            let Tcp { source_be, destination_be, checksum, .. } = tcp;
            (Transport::Tcp(place), source_be, destination_be, checksum, least, signs)
        }
        PROTOCOL_UDP => {
            let place = at::<Udp>(ctx, place)?;
            // SAFETY: it lies within the frame.
            let Udp { source_be, destination_be, checksum, .. } = unsafe { *place };
            let least = size_of::<Udp>();
            (Transport::Udp(place), source_be, destination_be, checksum, least, SIGN_START)
        }
        _ => return None,
    };
    tuple.source_port_be = source_be;
    tuple.destination_port_be = destination_be;
    if rest < least || is_unfinished(tuple, checksum, rest as u16, is_v4) {
        return None;
    }
    Some(Frame { ethernet, network, transport, length, signs })
}

/// Whether the checksum is to be completed by hardware: then it is that of the pseudo header alone, and must be
/// corrected in another way. Senders on the same machine leave it so. Of other frames one in 65,535 looks the same.
#[inline(always)]
fn is_unfinished(tuple: &Tuple, checksum: u16, length: u16, is_v4: bool) -> bool {
    let is_none = tuple.protocol == PROTOCOL_UDP && checksum == 0;
    !is_none && pseudo_header(tuple, length, is_v4).folded() == checksum
}
