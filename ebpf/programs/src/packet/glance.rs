//! Most packets are no business of ours. A glance at their addresses tells, where those lie in the open.

use core::mem::size_of;

use aya_ebpf::bindings::__sk_buff;
use keelson_ebpf_abi::{Address, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP};

use crate::parse::{ETH_P_IP_BE, ETH_P_IPV6_BE, Ipv4, Ipv6};

/// Where a packet comes from and goes to.
pub struct Addresses {
    pub source: Address,
    pub destination: Address,
}

#[repr(C)]
struct Ethernet {
    destination: [u8; 6],
    source: [u8; 6],
    protocol_be: u16,
}

/// The addresses of a packet with a plain IP header and ports behind it, all in an Ethernet frame's first buffer.
/// Of others nothing is said.
#[inline(always)]
pub fn glance(skb: *mut __sk_buff) -> Option<Addresses> {
    // SAFETY: fields of the context.
    let (start, end, protocol, vlan) = unsafe {
        let skb = &*skb;
        (skb.data as usize, skb.data_end as usize, skb.protocol, skb.vlan_present)
    };
    let network = start + size_of::<Ethernet>();
    if vlan != 0 || network + size_of::<Ipv4>() > end {
        return None;
    }
    // SAFETY: inside of the packet's first buffer, as the verifier sees.
    let frame = unsafe { &*(start as *const Ethernet) };
    // Interfaces without link addresses (WireGuard, tunnels) have the IP header first, which begins with its version.
    if matches!(frame.destination[0] >> 4, 4 | 6) || u32::from(frame.protocol_be) != protocol {
        return None;
    }
    match protocol {
        ETH_P_IP_BE => {
            // SAFETY: as above.
            let ip = unsafe { &*(network as *const Ipv4) };
            (ip.version_and_length == 0x45 && has_ports(ip.protocol)).then(|| Addresses {
                source: Address::v4(ip.source_be),
                destination: Address::v4(ip.destination_be),
            })
        }
        ETH_P_IPV6_BE if network + size_of::<Ipv6>() <= end => {
            // SAFETY: as above.
            let ip = unsafe { &*(network as *const Ipv6) };
            has_ports(ip.next)
                .then_some(Addresses { source: ip.source, destination: ip.destination })
        }
        _ => None,
    }
}

#[inline(always)]
fn has_ports(protocol: u8) -> bool {
    matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP)
}
