//! Addresses of links.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use libc::{
    IFA_ADDRESS, IFA_F_NODAD, IFA_FLAGS, IFA_LOCAL, NLM_F_CREATE, NLM_F_REPLACE, RTM_DELADDR,
    RTM_GETADDR, RTM_NEWADDR,
};

use super::{Rtnl, existed, family, ip, octets};
use crate::message::{Message, Reply, u32_at};
use crate::socket::NetlinkError;

/// The length of `struct ifaddrmsg`.
const HEADER: usize = 8;
const IFA_F_TENTATIVE: u32 = 0x40;

/// An address on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The link.
    pub link: u32,
    /// Address and prefix.
    pub network: IpNetwork,
    /// Still being checked for duplicates (IPv6): not usable yet.
    pub tentative: bool,
}

fn header(network: IpNetwork, link: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[0] = family(network.ip());
    bytes[1] = network.prefix();
    bytes[4..8].copy_from_slice(&link.to_ne_bytes());
    bytes
}

fn put(message: &mut Message, address: IpAddr) {
    let (_, bytes) = octets(address);
    message.attr(IFA_LOCAL, &bytes).attr(IFA_ADDRESS, &bytes);
}

/// Gives `link` an address that is usable at once (without duplicate detection). An equal one is replaced.
#[must_use]
pub fn address_message(link: u32, network: IpNetwork) -> Message {
    let flags = (NLM_F_CREATE | NLM_F_REPLACE) as u16;
    let mut message = Message::new(RTM_NEWADDR, flags, &header(network, link));
    put(&mut message, network.ip());
    message.attr_u32(IFA_FLAGS, IFA_F_NODAD);
    message
}

impl Address {
    pub(crate) fn parse(reply: &Reply<'_>) -> Option<Self> {
        let attrs = reply.attrs(HEADER);
        // On point-to-point links IFA_ADDRESS is the other side; IFA_LOCAL is ours. IPv6 has only IFA_ADDRESS.
        let bytes = attrs.find(IFA_LOCAL).or_else(|| attrs.find(IFA_ADDRESS))?;
        let prefix = *reply.payload.get(1)?;
        Some(Self {
            link: u32_at(&reply.payload, 4)?,
            network: IpNetwork::new(ip(bytes)?, prefix).ok()?,
            tentative: attrs.u32(IFA_FLAGS).is_some_and(|flags| flags & IFA_F_TENTATIVE != 0),
        })
    }
}

impl Rtnl {
    /// The addresses of all links, or of one.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn addresses(&mut self, link: Option<u32>) -> Result<Vec<Address>, NetlinkError> {
        let mut header = [0; HEADER];
        header[4..8].copy_from_slice(&link.unwrap_or_default().to_ne_bytes());
        let replies = self.socket.dump(&Message::new(RTM_GETADDR, 0, &header))?;
        let ours = |address: &Address| link.is_none_or(|index| address.link == index);
        Ok(replies.iter().filter_map(Address::parse).filter(ours).collect())
    }

    /// Gives a link an address, usable at once. The same address again is a success.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn ensure_address(&mut self, link: u32, network: IpNetwork) -> Result<(), NetlinkError> {
        self.perform(address_message(link, network))
    }

    /// Takes an address away. Answers whether it was there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn delete_address(&mut self, link: u32, network: IpNetwork) -> Result<bool, NetlinkError> {
        let mut message = Message::new(RTM_DELADDR, 0, &header(network, link));
        put(&mut message, network.ip());
        existed(self.perform(message))
    }
}
