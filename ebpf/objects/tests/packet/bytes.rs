//! Packets as bytes, with checksums computed from nothing.

use std::net::{IpAddr, SocketAddr};

/// A packet as its sender means it. What a program makes of it is compared with what another sender means.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) body: Body,
    /// IPv4 options; a multiple of four.
    pub(crate) options: Vec<u8>,
    /// IPv6 extension headers: their numbers, and what follows their first two bytes.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    pub(crate) payload: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// With these flags.
    Tcp(u8),
    Udp,
    UdpWithoutChecksum,
    /// With a first chunk of this kind.
    Sctp(u8),
    /// The checksum is left to others.
    SctpWithoutChecksum(u8),
}

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

pub(crate) fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(crate) fn sent(body: Body, source: &str, destination: &str) -> Sent {
    Sent {
        source: at(source),
        destination: at(destination),
        body,
        options: Vec::new(),
        extensions: Vec::new(),
        payload: b"What is the answer?".to_vec(),
    }
}

pub(crate) fn tcp(flags: u8, source: &str, destination: &str) -> Sent {
    sent(Body::Tcp(flags), source, destination)
}

pub(crate) fn udp(source: &str, destination: &str) -> Sent {
    sent(Body::Udp, source, destination)
}

impl Sent {
    pub(crate) fn from(mut self, source: &str) -> Self {
        self.source = at(source);
        self
    }

    pub(crate) fn to(mut self, destination: &str) -> Self {
        self.destination = at(destination);
        self
    }

    /// The frame with `changes` (place and value), and without its last `cut` bytes. It keeps its addresses, and the link
    /// header is as it was: the kernel's own test would take the packet for another kind.
    pub(crate) fn damaged(&self, changes: &[(usize, u8)], cut: usize) -> Vec<u8> {
        let mut bytes = self.bytes();
        let least = if self.is_v4() { 34 } else { 54 };
        for (at, value) in changes {
            let at = 14 + at % (bytes.len() - 14);
            bytes[at] = *value;
        }
        bytes.truncate((bytes.len() - cut).max(least));
        bytes
    }

    pub(crate) fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    pub(crate) fn protocol(&self) -> u8 {
        match self.body {
            Body::Tcp(_) => 6,
            Body::Udp | Body::UdpWithoutChecksum => 17,
            Body::Sctp(_) | Body::SctpWithoutChecksum(_) => 132,
        }
    }

    /// How long the transport's header is.
    pub(crate) fn header(&self) -> usize {
        if self.protocol() == 6 { 20 } else { 8 }
    }

    /// Where the transport's checksum is in its header.
    pub(crate) fn checksum_at(&self) -> usize {
        if self.protocol() == 6 { 16 } else { 6 }
    }

    /// Link header and all.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        framed(&self.packet())
    }

    pub(crate) fn packet(&self) -> Vec<u8> {
        let body = self.body_bytes();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(_), IpAddr::V4(_)) => {
                v4(self.source.ip(), self.destination.ip(), self.protocol(), &self.options, &body)
            }
            _ => {
                let mut all = Vec::new();
                let first = self.extensions.first().map_or(self.protocol(), |(number, _)| *number);
                for (i, (_, rest)) in self.extensions.iter().enumerate() {
                    let next = self.extensions.get(i + 1).map_or(self.protocol(), |(n, _)| *n);
                    all.push(next);
                    all.extend(rest);
                }
                all.extend(body);
                v6(self.source.ip(), self.destination.ip(), first, &all)
            }
        }
    }

    fn body_bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(self.source.port().to_be_bytes());
        body.extend(self.destination.port().to_be_bytes());
        let checksum_at = match self.body {
            Body::Tcp(flags) => {
                body.extend(0x0102_0304u32.to_be_bytes());
                body.extend(0x0506_0708u32.to_be_bytes());
                body.extend([5 << 4, flags]);
                body.extend(1000u16.to_be_bytes());
                body.extend([0; 4]);
                16
            }
            Body::Udp | Body::UdpWithoutChecksum => {
                body.extend(u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes());
                body.extend([0; 2]);
                6
            }
            Body::Sctp(chunk) | Body::SctpWithoutChecksum(chunk) => {
                body.extend([1, 2, 3, 4, 0, 0, 0, 0, chunk, 0]);
                body.extend(u16::try_from(4 + self.payload.len()).unwrap().to_be_bytes());
                8
            }
        };
        body.extend(&self.payload);
        if matches!(self.body, Body::Sctp(_)) {
            let sum = crc32c(&body);
            body[8..12].copy_from_slice(&sum.to_le_bytes());
        } else if matches!(self.body, Body::Tcp(_) | Body::Udp) {
            let sum =
                transport_sum(self.source.ip(), self.destination.ip(), self.protocol(), &body);
            body[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        body
    }
}

/// With an Ethernet header.
pub(crate) fn framed(packet: &[u8]) -> Vec<u8> {
    let kind: u16 = if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(kind.to_be_bytes());
    frame.extend(packet);
    frame
}

pub(crate) fn v4(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    options: &[u8],
    body: &[u8],
) -> Vec<u8> {
    let length = 20 + options.len();
    let mut packet = vec![0x40 | u8::try_from(length / 4).unwrap(), 0];
    packet.extend(u16::try_from(length + body.len()).unwrap().to_be_bytes());
    packet.extend([0x12, 0x34, 0, 0, 64, protocol, 0, 0]);
    packet.extend(octets(source));
    packet.extend(octets(destination));
    packet.extend(options);
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(body);
    packet
}

pub(crate) fn v6(source: IpAddr, destination: IpAddr, next: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(octets(source));
    packet.extend(octets(destination));
    packet.extend(body);
    packet
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The checksum of TCP, UDP or ICMPv6 whose own field is 0.
pub(crate) fn transport_sum(source: IpAddr, destination: IpAddr, protocol: u8, body: &[u8]) -> u16 {
    let mut all = octets(source);
    all.extend(octets(destination));
    all.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
    all.extend(u32::from(protocol).to_be_bytes());
    all.extend(body);
    checksum(&all)
}

pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u64;
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0x82f6_3b78 };
        }
    }
    !crc
}
