//! Neighbours (ARP and ND entries).

use std::net::IpAddr;

use libc::{
    NDA_DST, NDA_LLADDR, NLM_F_CREATE, NLM_F_REPLACE, NTF_PROXY, NTF_USE, NUD_PERMANENT, NUD_STALE,
    RTM_DELNEIGH, RTM_GETNEIGH, RTM_NEWNEIGH,
};

use super::{Mac, Rtnl, existed, ip, octets};
use crate::message::{Message, Reply, u16_at, u32_at};
use crate::socket::NetlinkError;

/// The length of `struct ndmsg`.
const HEADER: usize = 12;

/// A neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The link.
    pub link: u32,
    /// The neighbour's address.
    pub address: IpAddr,
    /// Its hardware address, if known.
    pub mac: Option<Mac>,
    /// Never checked, never forgotten.
    pub permanent: bool,
    /// It was there, and nobody has asked since.
    pub stale: bool,
    /// We answer for this address ourselves.
    pub proxy: bool,
}

fn header(link: u32, address: IpAddr, state: u16, flags: u8) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[0] = octets(address).0;
    bytes[4..8].copy_from_slice(&link.to_ne_bytes());
    bytes[8..10].copy_from_slice(&state.to_ne_bytes());
    bytes[10] = flags;
    bytes
}

/// Sets a permanent entry, replacing what there was for the address.
#[must_use]
pub fn neighbour_message(link: u32, address: IpAddr, mac: Mac) -> Message {
    let flags = (NLM_F_CREATE | NLM_F_REPLACE) as u16;
    let mut message = Message::new(RTM_NEWNEIGH, flags, &header(link, address, NUD_PERMANENT, 0));
    message.attr(NDA_DST, &octets(address).1).attr(NDA_LLADDR, &mac.0);
    message
}

impl Neighbour {
    pub(crate) fn parse(reply: &Reply<'_>) -> Option<Self> {
        let attrs = reply.attrs(HEADER);
        let state = u16_at(&reply.payload, 8)?;
        let flags = *reply.payload.get(10)?;
        Some(Self {
            link: u32_at(&reply.payload, 4)?,
            address: attrs.find(NDA_DST).and_then(ip)?,
            mac: attrs.find(NDA_LLADDR).and_then(|bytes| bytes.try_into().ok()).map(Mac),
            permanent: state & NUD_PERMANENT != 0,
            stale: state & NUD_STALE != 0,
            proxy: flags & NTF_PROXY != 0,
        })
    }
}

impl Rtnl {
    /// The neighbours of all links.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>, NetlinkError> {
        let replies = self.socket.dump(&Message::new(RTM_GETNEIGH, 0, &[0; HEADER]))?;
        Ok(replies.iter().filter_map(Neighbour::parse).collect())
    }

    /// Sets a permanent entry.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn ensure_neighbour(
        &mut self,
        link: u32,
        address: IpAddr,
        mac: Mac,
    ) -> Result<(), NetlinkError> {
        self.perform(neighbour_message(link, address, mac))
    }

    /// Has the kernel find out whether a neighbour is still there, as if something was sent to it. Answers whether there
    /// is such an entry.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn check_neighbour(&mut self, link: u32, address: IpAddr) -> Result<bool, NetlinkError> {
        let mut message = Message::new(RTM_NEWNEIGH, 0, &header(link, address, 0, NTF_USE));
        message.attr(NDA_DST, &octets(address).1);
        existed(self.perform(message))
    }

    /// Deletes an entry. Answers whether it was there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn delete_neighbour(&mut self, link: u32, address: IpAddr) -> Result<bool, NetlinkError> {
        let mut message = Message::new(RTM_DELNEIGH, 0, &header(link, address, 0, 0));
        message.attr(NDA_DST, &octets(address).1);
        existed(self.perform(message))
    }
}
