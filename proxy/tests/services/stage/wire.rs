//! TCP segments, SCTP and ICMP packets by hand, and what arrives of them.

use std::net::SocketAddrV4;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, socket,
};

use super::{Namespace, silence};

/// Sees every packet of a protocol that arrives.
pub(crate) struct Wire(OwnedFd);

impl Wire {
    /// The next segment from that address, or nothing when it stays silent.
    pub(crate) fn next_from(&self, source: [u8; 4]) -> Option<Vec<u8>> {
        let patience = PollTimeout::try_from(silence()).unwrap();
        let mut buffer = [0; 2000];
        loop {
            let mut waiting = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if poll(&mut waiting, patience).unwrap() == 0 {
                return None;
            }
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
            if buffer[12..16] == source {
                return Some(buffer[..length].to_vec());
            }
        }
    }

    /// Who sent the next segment to that port.
    #[track_caller]
    pub(crate) fn sender_to(&self, port: u16) -> [u8; 4] {
        let patience = PollTimeout::try_from(silence()).unwrap();
        let mut buffer = [0; 2000];
        loop {
            let mut waiting = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            assert_ne!(poll(&mut waiting, patience).unwrap(), 0, "nothing came to port {port}");
            recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
            let transport = usize::from(buffer[0] & 0xf) * 4;
            if buffer[transport + 2..transport + 4] == port.to_be_bytes() {
                return buffer[12..16].try_into().unwrap();
            }
        }
    }
}

fn raw_socket(protocol: SockProtocol) -> OwnedFd {
    socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), protocol).unwrap()
}

impl Namespace {
    pub(crate) fn tcp_wire(&self) -> Wire {
        Wire(self.run(|| raw_socket(SockProtocol::Tcp)))
    }

    pub(crate) fn icmp_wire(&self) -> Wire {
        Wire(self.run(|| raw_socket(SockProtocol::Icmp)))
    }

    /// Tells `from` that a TCP segment that it has sent to `to` was too long.
    pub(crate) fn send_too_long(&self, from: SocketAddrV4, to: SocketAddrV4) {
        // The segment's header as it came: version, length, ..., time to live, protocol, checksum, addresses.
        let mut header = vec![0x45, 0, 5, 220, 0, 1, 0x40, 0, 60, 6, 0, 0];
        header.extend(from.ip().octets());
        header.extend(to.ip().octets());
        let sum = internet_checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header.extend(from.port().to_be_bytes());
        header.extend(to.port().to_be_bytes());
        header.extend([0; 4]);
        // Destination unreachable, fragmentation needed, next hop takes 1400.
        let mut packet = vec![3, 4, 0, 0, 0, 0, 0x05, 0x78];
        packet.extend(header);
        let sum = internet_checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        self.run(|| {
            let raw = raw_socket(SockProtocol::Icmp);
            let to = SockaddrIn::from(SocketAddrV4::new(*from.ip(), 0));
            sendto(raw.as_raw_fd(), &packet, &to, MsgFlags::empty()).unwrap();
        });
    }

    pub(crate) fn sctp_wire(&self) -> Wire {
        Wire(self.run(|| raw_socket(SockProtocol::Sctp)))
    }

    /// The packet that asks for an association.
    pub(crate) fn send_sctp_init(&self, from: u16, to: [u8; 4], port: u16) {
        let mut packet = Vec::new();
        packet.extend(from.to_be_bytes());
        packet.extend(port.to_be_bytes());
        // Verification tag and checksum.
        packet.extend([0; 8]);
        // Chunk INIT of 20 bytes: tag, window, streams out and in, first number.
        packet.extend([1, 0, 0, 20, 1, 2, 3, 4, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
        self.run(|| {
            let raw = raw_socket(SockProtocol::Sctp);
            let to = SockaddrIn::from(SocketAddrV4::new(to.into(), 0));
            sendto(raw.as_raw_fd(), &packet, &to, MsgFlags::empty()).unwrap();
        });
    }

    /// Sends a TCP segment that connection tracking cannot place.
    pub(crate) fn send_stray_segment(&self, from: SocketAddrV4, to: SocketAddrV4) {
        let mut segment = vec![0; 20];
        segment[..2].copy_from_slice(&from.port().to_be_bytes());
        segment[2..4].copy_from_slice(&to.port().to_be_bytes());
        segment[4..8].copy_from_slice(&0x7777_7777_u32.to_be_bytes());
        segment[8..12].copy_from_slice(&0x3333_3333_u32.to_be_bytes());
        segment[12] = 5 << 4;
        // No flag at all: nonsense in every state, so that it does not depend on sequence numbers.
        segment[14..16].copy_from_slice(&1000u16.to_be_bytes());
        let sum = checksum(from, to, &segment);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        self.run(|| {
            let raw = raw_socket(SockProtocol::Tcp);
            let to = SockaddrIn::from(to);
            sendto(raw.as_raw_fd(), &segment, &to, MsgFlags::empty()).unwrap();
        });
    }
}

/// TCP's checksum over pseudo header and segment.
fn checksum(from: SocketAddrV4, to: SocketAddrV4, segment: &[u8]) -> u16 {
    let mut bytes = Vec::new();
    bytes.extend(from.ip().octets());
    bytes.extend(to.ip().octets());
    bytes.extend([0, 6]);
    bytes.extend(u16::try_from(segment.len()).unwrap().to_be_bytes());
    bytes.extend(segment);
    internet_checksum(&bytes)
}

fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}
