//! IPVS messages as bytes (`linux/ip_vs.h`).

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::{Key, Real, RealFound, Timeouts, Virtual};
use crate::genl;
use crate::message::{Attrs, Message, Reply, u16_at};

pub(super) const FAMILY: &str = "IPVS";
const VERSION: u8 = 1;

const NEW_SERVICE: u8 = 1;
const SET_SERVICE: u8 = 2;
const DEL_SERVICE: u8 = 3;
const GET_SERVICE: u8 = 4;
const NEW_DEST: u8 = 5;
const SET_DEST: u8 = 6;
const DEL_DEST: u8 = 7;
const GET_DEST: u8 = 8;
const SET_CONFIG: u8 = 12;
const FLUSH: u8 = 17;

const ATTR_SERVICE: u16 = 1;
const ATTR_DEST: u16 = 2;
const ATTR_TIMEOUT_TCP: u16 = 4;
const ATTR_TIMEOUT_TCP_FIN: u16 = 5;
const ATTR_TIMEOUT_UDP: u16 = 6;

const SERVICE_AF: u16 = 1;
const SERVICE_PROTOCOL: u16 = 2;
const SERVICE_ADDRESS: u16 = 3;
const SERVICE_PORT: u16 = 4;
const SERVICE_SCHEDULER: u16 = 6;
const SERVICE_FLAGS: u16 = 7;
const SERVICE_TIMEOUT: u16 = 8;
const SERVICE_NETMASK: u16 = 9;

const DEST_ADDRESS: u16 = 1;
const DEST_PORT: u16 = 2;
const DEST_FORWARDING: u16 = 3;
const DEST_WEIGHT: u16 = 4;
const DEST_UPPER: u16 = 5;
const DEST_LOWER: u16 = 6;
const DEST_ACTIVE: u16 = 7;
const DEST_INACTIVE: u16 = 8;
const DEST_FAMILY: u16 = 11;

const FLAG_PERSISTENT: u32 = 1;
/// The bits of the forwarding method; 0 is translation ("masquerading").
const FORWARDING_MASK: u32 = 7;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// A change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Makes a virtual server, which must not exist.
    AddVirtual(Virtual),
    /// Changes one that exists.
    SetVirtual(Virtual),
    /// Removes one with its real servers; connections through it end.
    RemoveVirtual(Key),
    /// Adds a real server, which must not be there.
    AddReal(Key, Real),
    /// Changes its weight.
    SetReal(Key, Real),
    /// Removes it; connections to it end.
    RemoveReal(Key, SocketAddr),
    /// Sets how long silent connections are remembered.
    SetTimeouts(Timeouts),
    /// Removes all virtual servers, whoever made them.
    Flush,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddVirtual(new) => {
                write!(f, "add virtual server {} with scheduler {}", new.key, new.scheduler)
            }
            Self::SetVirtual(new) => {
                write!(f, "change virtual server {} to scheduler {}", new.key, new.scheduler)
            }
            Self::RemoveVirtual(key) => write!(f, "remove virtual server {key}"),
            Self::AddReal(key, real) => write!(f, "add real server {} to {key}", real.at),
            Self::SetReal(key, real) => {
                write!(f, "give real server {} of {key} weight {}", real.at, real.weight)
            }
            Self::RemoveReal(key, at) => write!(f, "remove real server {at} of {key}"),
            Self::SetTimeouts(_) => write!(f, "set timeouts"),
            Self::Flush => write!(f, "remove all virtual servers"),
        }
    }
}

impl Command {
    pub(super) fn message(&self, family: u16) -> Message {
        let request = |command| genl::message(family, command, VERSION);
        match self {
            Self::AddVirtual(new) => with_virtual(request(NEW_SERVICE), new),
            Self::SetVirtual(new) => with_virtual(request(SET_SERVICE), new),
            Self::RemoveVirtual(key) => with_key(request(DEL_SERVICE), *key),
            Self::AddReal(key, real) => with_real(request(NEW_DEST), *key, *real),
            Self::SetReal(key, real) => with_real(request(SET_DEST), *key, *real),
            Self::RemoveReal(key, at) => {
                with_real(request(DEL_DEST), *key, Real { at: *at, weight: 0 })
            }
            Self::SetTimeouts(timeouts) => {
                let mut message = request(SET_CONFIG);
                message.attr_u32(ATTR_TIMEOUT_TCP, timeouts.tcp);
                message.attr_u32(ATTR_TIMEOUT_TCP_FIN, timeouts.tcp_fin);
                message.attr_u32(ATTR_TIMEOUT_UDP, timeouts.udp);
                message
            }
            Self::Flush => request(FLUSH),
        }
    }
}

pub(super) fn list_virtuals(family: u16) -> Message {
    genl::message(family, GET_SERVICE, VERSION)
}

pub(super) fn ask_virtual(family: u16, key: Key) -> Message {
    with_key(genl::message(family, GET_SERVICE, VERSION), key)
}

pub(super) fn list_reals(family: u16, key: Key) -> Message {
    with_key(genl::message(family, GET_DEST, VERSION), key)
}

/// `union nf_inet_addr`: always sixteen bytes.
fn padded(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&v4.octets());
            bytes
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn family_of(address: IpAddr) -> u16 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn put_key(message: &mut Message, key: Key) {
    message
        .attr(SERVICE_AF, &family_of(key.address).to_ne_bytes())
        .attr(SERVICE_PROTOCOL, &u16::from(key.protocol).to_ne_bytes())
        .attr(SERVICE_ADDRESS, &padded(key.address))
        .attr(SERVICE_PORT, &key.port.to_be_bytes());
}

fn with_key(mut message: Message, key: Key) -> Message {
    message.nest(ATTR_SERVICE, |service| put_key(service, key));
    message
}

fn with_virtual(mut message: Message, new: &Virtual) -> Message {
    let flags = if new.persistent { FLAG_PERSISTENT } else { 0 };
    // Which sources count as one client: a mask for IPv4, a prefix length for IPv6.
    let netmask: u32 = if new.key.address.is_ipv4() { u32::MAX } else { 128 };
    message.nest(ATTR_SERVICE, |service| {
        put_key(service, new.key);
        service.attr_text(SERVICE_SCHEDULER, &new.scheduler);
        // Flags and which of them to change: all.
        let both = [flags.to_ne_bytes(), u32::MAX.to_ne_bytes()].concat();
        service.attr(SERVICE_FLAGS, &both);
        service.attr_u32(SERVICE_TIMEOUT, new.mark);
        service.attr_u32(SERVICE_NETMASK, netmask);
    });
    message
}

fn with_real(message: Message, key: Key, real: Real) -> Message {
    let mut message = with_key(message, key);
    message.nest(ATTR_DEST, |dest| {
        dest.attr(DEST_ADDRESS, &padded(real.at.ip()))
            .attr(DEST_PORT, &real.at.port().to_be_bytes())
            .attr(DEST_FAMILY, &family_of(real.at.ip()).to_ne_bytes())
            .attr_u32(DEST_FORWARDING, 0)
            .attr_u32(DEST_WEIGHT, real.weight)
            .attr_u32(DEST_UPPER, 0)
            .attr_u32(DEST_LOWER, 0);
    });
    message
}

fn address(bytes: &[u8], family: u16) -> Option<IpAddr> {
    let all = <[u8; 16]>::try_from(bytes).ok()?;
    match family {
        AF_INET => Some(IpAddr::from([all[0], all[1], all[2], all[3]])),
        AF_INET6 => Some(IpAddr::from(all)),
        _ => None,
    }
}

fn port(attrs: &Attrs<'_>, kind: u16) -> Option<u16> {
    Some(u16::from_be_bytes(attrs.find(kind)?.try_into().ok()?))
}

/// `None` for one that is known by a packet mark.
pub(crate) fn read_virtual(reply: &Reply<'_>) -> Option<Virtual> {
    let service = reply.attrs(genl::HEADER).nested(ATTR_SERVICE)?;
    let family = u16_at(service.find(SERVICE_AF)?, 0)?;
    let key = Key {
        address: address(service.find(SERVICE_ADDRESS)?, family)?,
        protocol: u8::try_from(u16_at(service.find(SERVICE_PROTOCOL)?, 0)?).ok()?,
        port: port(&service, SERVICE_PORT)?,
    };
    // The flags are followed by a mask.
    let flags = service.u32(SERVICE_FLAGS)?;
    Some(Virtual {
        key,
        scheduler: service.text(SERVICE_SCHEDULER)?,
        persistent: flags & FLAG_PERSISTENT != 0,
        mark: service.u32(SERVICE_TIMEOUT)?,
    })
}

pub(crate) fn read_real(reply: &Reply<'_>, of: Key) -> Option<RealFound> {
    let dest = reply.attrs(genl::HEADER).nested(ATTR_DEST)?;
    let family = dest.find(DEST_FAMILY).and_then(|bytes| u16_at(bytes, 0));
    let ip = address(dest.find(DEST_ADDRESS)?, family.unwrap_or_else(|| family_of(of.address)))?;
    let connections =
        u64::from(dest.u32(DEST_ACTIVE)?).saturating_add(dest.u32(DEST_INACTIVE)?.into());
    Some(RealFound {
        real: Real {
            at: SocketAddr::new(ip, port(&dest, DEST_PORT)?),
            weight: dest.u32(DEST_WEIGHT)?,
        },
        translated: dest.u32(DEST_FORWARDING)? & FORWARDING_MASK == 0,
        connections,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Replies;

    fn key(address: &str) -> Key {
        Key { address: address.parse().unwrap(), protocol: 6, port: 80 }
    }

    #[test]
    fn a_virtual_server_is_read_as_it_is_written() {
        for address in ["10.96.0.1", "fd96::1"] {
            let wanted = Virtual {
                key: key(address),
                scheduler: "wlc".to_owned(),
                persistent: false,
                mark: 27_493,
            };
            let bytes = Command::AddVirtual(wanted.clone()).message(30).finish(1, 0);
            let reply = Replies::new(&bytes).next().unwrap();
            assert_eq!(read_virtual(&reply), Some(wanted));
        }
    }

    #[test]
    fn commands_say_what_they_want() {
        let real = Real { at: "10.66.0.2:8080".parse().unwrap(), weight: 0 };
        assert_eq!(
            Command::SetReal(key("10.96.0.1"), real).to_string(),
            "give real server 10.66.0.2:8080 of 10.96.0.1:80/tcp weight 0"
        );
        assert_eq!(
            Command::RemoveVirtual(key("fd96::1")).to_string(),
            "remove virtual server [fd96::1]:80/tcp"
        );
    }
}
