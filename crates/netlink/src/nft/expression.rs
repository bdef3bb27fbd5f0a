//! Rules: a list of expressions that load, test, look up and act on 32-bit registers.

use std::time::Duration;

use super::attribute::Writer;

/// One of the sixteen 32-bit registers; longer values occupy the following ones too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register(pub u8);

impl Register {
    fn number(self) -> u32 {
        const NFT_REG32_00: u32 = 8;
        NFT_REG32_00 + u32::from(self.0)
    }
}

/// What a rule or a verdict map decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// Let the packet pass this base chain.
    Accept,
    /// Discard the packet.
    Drop,
    /// Leave the chain.
    Return,
    /// Continue in another chain and come back.
    Jump(&'a str),
    /// Continue in another chain without coming back.
    Goto(&'a str),
}

impl<'a> Verdict<'a> {
    pub(crate) fn write(self, writer: &mut Writer<'_>) {
        writer.nest(2, |data| {
            data.u32(1, self.code().cast_unsigned());
            if let Verdict::Jump(chain) | Verdict::Goto(chain) = self {
                data.text(2, chain);
            }
        });
    }

    fn code(self) -> i32 {
        match self {
            Verdict::Drop => 0,
            Verdict::Accept => 1,
            Verdict::Jump(_) => -3,
            Verdict::Goto(_) => -4,
            Verdict::Return => -5,
        }
    }

    pub(crate) fn from_code(code: i32, chain: &'a str) -> Option<Self> {
        Some(match code {
            0 => Verdict::Drop,
            1 => Verdict::Accept,
            -3 => Verdict::Jump(chain),
            -4 => Verdict::Goto(chain),
            -5 => Verdict::Return,
            _ => return None,
        })
    }
}

/// Where a payload expression starts to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// IPv4 or IPv6 header.
    Network = 1,
    /// TCP, UDP or SCTP header.
    Transport = 2,
}

/// Facts about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meta {
    /// The packet mark (host byte order).
    Mark = 3,
    /// Name of the input interface, 16 bytes.
    InputName = 6,
    /// Name of the output interface, 16 bytes.
    OutputName = 7,
    /// 2 for IPv4, 10 for IPv6; one byte.
    NetworkProtocol = 15,
    /// Transport protocol number; one byte.
    TransportProtocol = 16,
}

/// Facts about a tracked connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conntrack {
    /// Bit mask of states ([`CT_NEW`] and friends), host byte order.
    State = 0,
    /// 0 for packets of the side that began the connection, 1 for answers; one byte.
    Direction = 1,
    /// Bit mask of status bits ([`CT_STATUS_DNAT`]), host byte order.
    Status = 2,
    /// The connection's mark, host byte order.
    Mark = 3,
}

/// Facts about the first packet of a tracked connection, before any translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Original {
    /// Destination port, network byte order; two bytes.
    DestinationPort = 12,
    /// IPv4 destination address.
    Ipv4Destination = 20,
    /// IPv6 destination address.
    Ipv6Destination = 22,
}

/// `ct state invalid`.
pub const CT_INVALID: u32 = 1;
/// `ct state established`.
pub const CT_ESTABLISHED: u32 = 2;
/// `ct state related`.
pub const CT_RELATED: u32 = 4;
/// `ct state new`.
pub const CT_NEW: u32 = 8;
/// `ct status dnat`.
pub const CT_STATUS_DNAT: u32 = 1 << 5;
/// The result of a [`Rule::fib_address_type`] for an address of this host (RTN_LOCAL).
pub const FIB_LOCAL: u32 = 2;

/// How a comparison ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    /// Go on when equal.
    Equal = 0,
    /// Go on when different.
    NotEqual = 1,
}

/// Which address a routing look-up asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FibAddress {
    /// The source address.
    Source = 1,
    /// The destination address.
    Destination = 2,
}

/// What a refused sender gets to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// ICMP or ICMPv6 port unreachable.
    PortUnreachable,
    /// A TCP reset; the rule must have tested for TCP before.
    TcpReset,
}

/// What a dynamic set expression does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dynamic {
    /// Add when absent; an element that is there stays untouched.
    Add = 0,
    /// Add when absent, else start its timeout anew. The data of a present element stay.
    Update = 1,
    /// Remove.
    Delete = 2,
}

/// Translates addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nat {
    /// True for destination, false for source translation.
    pub destination: bool,
    /// True when the address is an IPv6 address.
    pub ipv6: bool,
    /// First register of the address.
    pub address: Register,
    /// Last address of a range.
    pub address_end: Option<Register>,
    /// Register of the port (network byte order).
    pub port: Option<Register>,
    /// Last port of a range.
    pub port_end: Option<Register>,
}

/// A rule under construction: expressions in order of evaluation.
///
/// A test that fails ends the rule; the next rule of the chain is tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    pub(crate) expressions: Vec<u8>,
    pub(crate) user_data: Vec<u8>,
}

impl Rule {
    /// A rule without expressions: matches everything and does nothing.
    #[must_use]
    pub fn new() -> Self {
        Rule::default()
    }

    /// The encoded expressions, to compare or to hash two rules.
    #[must_use]
    pub fn encoded(&self) -> &[u8] {
        &self.expressions
    }

    fn push(mut self, name: &str, fill: impl FnOnce(&mut Writer<'_>)) -> Self {
        Writer::new(&mut self.expressions).nest(1, |element| {
            element.text(1, name);
            element.nest(2, fill);
        });
        self
    }

    /// Loads `length` bytes at `offset` of a header.
    #[must_use]
    pub fn payload(self, header: Header, offset: u32, length: u32, to: Register) -> Self {
        self.push("payload", |e| {
            e.u32(1, to.number());
            e.u32(2, header as u32);
            e.u32(3, offset);
            e.u32(4, length);
        })
    }

    /// Loads a fact about the packet.
    #[must_use]
    pub fn meta(self, key: Meta, to: Register) -> Self {
        self.push("meta", |e| {
            e.u32(2, key as u32);
            e.u32(1, to.number());
        })
    }

    /// Sets a fact about the packet (the mark).
    #[must_use]
    pub fn set_meta(self, key: Meta, from: Register) -> Self {
        self.push("meta", |e| {
            e.u32(2, key as u32);
            e.u32(3, from.number());
        })
    }

    /// Loads a fact about the connection.
    #[must_use]
    pub fn conntrack(self, key: Conntrack, to: Register) -> Self {
        self.push("ct", |e| {
            e.u32(2, key as u32);
            e.u32(1, to.number());
        })
    }

    /// Loads a fact about the connection's first packet.
    #[must_use]
    pub fn conntrack_original(self, key: Original, to: Register) -> Self {
        const ORIGINAL: u8 = 0;
        self.push("ct", |e| {
            e.u32(2, key as u32);
            e.u32(1, to.number());
            e.bytes(3, &[ORIGINAL]);
        })
    }

    /// Sets a fact about the connection (the mark).
    #[must_use]
    pub fn set_conntrack(self, key: Conntrack, from: Register) -> Self {
        self.push("ct", |e| {
            e.u32(2, key as u32);
            e.u32(4, from.number());
        })
    }

    /// Loads the type that routing gives an address, as a host byte order number ([`FIB_LOCAL`]).
    #[must_use]
    pub fn fib_address_type(self, address: FibAddress, to: Register) -> Self {
        self.push("fib", |e| {
            e.u32(1, to.number());
            e.u32(2, 3);
            e.u32(3, address as u32);
        })
    }

    /// Loads the index of the link that the packet came in by if answers to its source would leave there, else 0
    /// (host byte order).
    #[must_use]
    pub fn fib_source_link(self, to: Register) -> Self {
        const RESULT_LINK: u32 = 1;
        const OF_SOURCE: u32 = 1;
        const AT_INPUT_LINK: u32 = 1 << 3;
        self.push("fib", |e| {
            e.u32(1, to.number());
            e.u32(2, RESULT_LINK);
            e.u32(3, OF_SOURCE | AT_INPUT_LINK);
        })
    }

    /// Goes on only when the register compares so with the value.
    #[must_use]
    pub fn compare(self, from: Register, how: Compare, value: &[u8]) -> Self {
        self.push("cmp", |e| {
            e.u32(1, from.number());
            e.u32(2, how as u32);
            e.nest(3, |data| data.bytes(1, value));
        })
    }

    /// `to = (from & mask) ^ xor`.
    #[must_use]
    pub fn bitwise(self, from: Register, to: Register, mask: &[u8], xor: &[u8]) -> Self {
        self.push("bitwise", |e| {
            e.u32(1, from.number());
            e.u32(2, to.number());
            e.u32(3, u32::try_from(mask.len()).unwrap_or(0));
            e.nest(4, |data| data.bytes(1, mask));
            e.nest(5, |data| data.bytes(1, xor));
        })
    }

    /// Loads a constant.
    #[must_use]
    pub fn immediate(self, to: Register, value: &[u8]) -> Self {
        self.push("immediate", |e| {
            e.u32(1, to.number());
            e.nest(2, |data| data.bytes(1, value));
        })
    }

    /// Decides.
    #[must_use]
    pub fn verdict(self, verdict: Verdict<'_>) -> Self {
        self.push("immediate", |e| {
            e.u32(1, 0);
            e.nest(2, |data| verdict.write(data));
        })
    }

    /// Goes on only when the set has the key (or, `inverted`, has it not).
    #[must_use]
    pub fn lookup(self, set: &str, key: Register, inverted: bool) -> Self {
        self.push("lookup", |e| {
            e.text(1, set);
            e.u32(2, key.number());
            if inverted {
                e.u32(5, 1);
            }
        })
    }

    /// Loads the value that a map has for the key; goes on only when there is one.
    #[must_use]
    pub fn lookup_value(self, map: &str, key: Register, to: Register) -> Self {
        self.push("lookup", |e| {
            e.text(1, map);
            e.u32(2, key.number());
            e.u32(3, to.number());
        })
    }

    /// Follows the verdict that a map has for the key; goes on when there is none.
    #[must_use]
    pub fn lookup_verdict(self, map: &str, key: Register) -> Self {
        self.push("lookup", |e| {
            e.text(1, map);
            e.u32(2, key.number());
            e.u32(3, 0);
        })
    }

    /// Loads a random number below `modulus` (host byte order).
    #[must_use]
    pub fn random(self, modulus: u32, to: Register) -> Self {
        self.push("numgen", |e| {
            e.u32(1, to.number());
            e.u32(2, modulus);
            e.u32(3, 1);
            e.u32(4, 0);
        })
    }

    /// Translates an address, and a port with it.
    #[must_use]
    pub fn nat(self, nat: Nat) -> Self {
        const INET: u32 = 2;
        const INET6: u32 = 10;
        self.push("nat", |e| {
            e.u32(1, u32::from(nat.destination));
            e.u32(2, if nat.ipv6 { INET6 } else { INET });
            e.u32(3, nat.address.number());
            let registers = [(4, nat.address_end), (5, nat.port), (6, nat.port_end.or(nat.port))];
            for (kind, register) in registers {
                if let Some(register) = register {
                    e.u32(kind, register.number());
                }
            }
            // NF_NAT_RANGE_PROTO_SPECIFIED is set by the kernel itself when a port register is given.
        })
    }

    /// Translates the source to an address of the output interface, with a fully random port.
    #[must_use]
    pub fn masquerade(self) -> Self {
        const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 16;
        self.push("masq", |e| e.u32(1, NF_NAT_RANGE_PROTO_RANDOM_FULLY))
    }

    /// Refuses the packet and tells the sender.
    #[must_use]
    pub fn reject(self, how: Refusal) -> Self {
        self.push("reject", |e| match how {
            Refusal::TcpReset => {
                e.u32(1, 1);
                e.bytes(2, &[0]);
            }
            Refusal::PortUnreachable => {
                e.u32(1, 2);
                e.bytes(2, &[1]);
            }
        })
    }

    /// Keeps the packet out of connection tracking.
    #[must_use]
    pub fn no_track(self) -> Self {
        self.push("notrack", |_| {})
    }

    /// Counts packets and bytes.
    #[must_use]
    pub fn counter(self) -> Self {
        self.push("counter", |e| {
            e.u64(1, 0);
            e.u64(2, 0);
        })
    }

    /// Goes on for at most so many packets a second.
    #[must_use]
    pub fn limit(self, packets_per_second: u64, burst: u32) -> Self {
        self.push("limit", |e| {
            e.u64(1, packets_per_second);
            e.u64(2, 1);
            e.u32(3, burst);
            e.u32(4, 0);
        })
    }

    /// Changes an element of a dynamic set or map from the packet path.
    #[must_use]
    pub fn dynamic_set(
        self,
        set: &str,
        how: Dynamic,
        key: Register,
        value: Option<Register>,
        timeout: Option<Duration>,
    ) -> Self {
        self.push("dynset", |e| {
            e.text(1, set);
            e.u32(3, how as u32);
            e.u32(4, key.number());
            if let Some(value) = value {
                e.u32(5, value.number());
            }
            if let Some(timeout) = timeout {
                e.u64(6, u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
            }
        })
    }

    /// A remark that `nft list` shows.
    #[must_use]
    pub fn comment(mut self, text: &str) -> Self {
        push_user_data(&mut self.user_data, 0, &[text.as_bytes(), &[0]].concat());
        self
    }

    /// Private bytes (at most 64) that the kernel keeps with the rule and `nft` ignores.
    #[must_use]
    pub fn stamp(mut self, bytes: &[u8]) -> Self {
        push_user_data(&mut self.user_data, STAMP_KIND, bytes);
        self
    }
}

/// A kind of user data that `nft` does not know and so leaves alone.
pub(crate) const STAMP_KIND: u8 = 0x6b;

/// User data are a list of (kind, length, bytes).
pub(crate) fn push_user_data(buffer: &mut Vec<u8>, kind: u8, value: &[u8]) {
    buffer.push(kind);
    buffer.push(u8::try_from(value.len()).unwrap_or(u8::MAX));
    buffer.extend_from_slice(value);
}

/// Finds one kind among user data.
pub(crate) fn find_user_data(mut bytes: &[u8], kind: u8) -> Option<&[u8]> {
    while let [found, length, rest @ ..] = bytes {
        let value = rest.get(..usize::from(*length))?;
        if *found == kind {
            return Some(value);
        }
        bytes = &rest[usize::from(*length)..];
    }
    None
}
