//! Writes other addresses, ports and a next hop into a frame, as the kernel and the programs for packets would.

use keelson_ebpf_abi::{Sum, Tuple};

use crate::frame::{Frame, Ipv4, Ipv6, Network, Transport};
use crate::next_hop::NextHop;

/// Makes the frame carry `to` instead of `from`, to the next hop.
#[inline(always)]
pub fn rewrite(frame: &Frame, from: &Tuple, to: &Tuple, next: &NextHop) {
    let is_v4 = matches!(frame.network, Network::V4(_));
    let addresses = Sum::default().changed_addresses(from, to, is_v4);
    match frame.network {
        Network::V4(ip) => rewrite_v4(ip, to, addresses),
        Network::V6(ip) => rewrite_v6(ip, to),
    }
    let all = addresses.changed_ports(from, to);
    // SAFETY: the headers lie within the frame.
    unsafe {
        match frame.transport {
            Transport::Tcp(tcp) => {
                (*tcp).source_be = to.source_port_be;
                (*tcp).destination_be = to.destination_port_be;
                (*tcp).checksum = all.correct((*tcp).checksum);
            }
            Transport::Udp(udp) => {
                (*udp).source_be = to.source_port_be;
                (*udp).destination_be = to.destination_port_be;
                // 0 says that there is none.
                if (*udp).checksum != 0 {
                    let checksum = all.correct((*udp).checksum);
                    (*udp).checksum = if checksum == 0 { 0xffff } else { checksum };
                }
            }
        }
        (*frame.ethernet).destination = next.destination;
        (*frame.ethernet).source = next.source;
    }
}

#[inline(always)]
fn rewrite_v4(ip: *mut Ipv4, to: &Tuple, addresses: Sum) {
    // SAFETY: it lies within the frame.
    unsafe {
        let ttl = (*ip).ttl;
        // The word that it is part of, without the rest, which stays.
        let word = |ttl: u8| u32::from(u16::from_ne_bytes([ttl, 0]));
        let change = addresses.changed(word(ttl), word(ttl - 1));
        (*ip).ttl = ttl - 1;
        (*ip).checksum = change.correct((*ip).checksum);
        (*ip).source_be = to.source.words_be[3];
        (*ip).destination_be = to.destination.words_be[3];
    }
}

#[inline(always)]
fn rewrite_v6(ip: *mut Ipv6, to: &Tuple) {
    // SAFETY: it lies within the frame.
    unsafe {
        (*ip).hops -= 1;
        (*ip).source_be = to.source.words_be;
        (*ip).destination_be = to.destination.words_be;
    }
}
