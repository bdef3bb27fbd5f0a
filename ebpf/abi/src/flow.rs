//! Connections that packets are translated for.
//!
//! Translations come in pairs, one for each direction of a connection, in different maps: `flows_in` for
//! what arrives at the node, `flows_out` for what leaves it. One leads to the other: the reversed result
//! of a translation is the key of the opposite one.
//!
//! ```text
//! client C to the Service V, endpoint E
//!   arrives  C ► V   TO_ENDPOINT     C ► E           leaves   E ► C   FROM_ENDPOINT   V ► C
//! masqueraded with the node's address N also
//!   leaves   C ► E   MASQUERADE      N ► E           arrives  E ► N   UNMASQUERADE    E ► C
//! ```
//!
//! With direct server return there are two nodes. The one that is asked has the first pair and no masquerade, and
//! sees only packets of the client ([`STATE_TELLS`]); that of the endpoint has the same pair, as if it had been
//! asked, and sees only packets of the endpoint, and those that begin the connection ([`STATE_TOLD`]).
//!
//! Packets that the node itself makes are translated to the endpoint when they leave, and the answers when
//! they arrive.

use crate::{Address, layout};

/// What a packet of a connection carries, as it is met where the key's map is asked.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    pub source: Address,
    pub destination: Address,
    pub source_port_be: u16,
    pub destination_port_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    pub zero: [u8; 3],
}

impl Tuple {
    /// Equality without a call to `memcmp`, which BPF programs do not have.
    #[inline(always)]
    #[must_use]
    pub const fn is(&self, other: &Self) -> bool {
        self.source.is(&other.source)
            && self.destination.is(&other.destination)
            && self.source_port_be == other.source_port_be
            && self.destination_port_be == other.destination_port_be
            && self.protocol == other.protocol
    }

    /// A copy word by word: BPF programs have `memmove` only byte by byte.
    #[inline(always)]
    pub const fn set(&mut self, from: &Self) {
        self.source.set(&from.source);
        self.destination.set(&from.destination);
        self.source_port_be = from.source_port_be;
        self.destination_port_be = from.destination_port_be;
        self.protocol = from.protocol;
    }

    /// What an answer carries.
    #[inline(always)]
    #[must_use]
    pub fn reversed(&self) -> Self {
        Tuple {
            source: self.destination,
            destination: self.source,
            source_port_be: self.destination_port_be,
            destination_port_be: self.source_port_be,
            ..*self
        }
    }
}

/// A translation, and what is known of its connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flow {
    /// What the packet carries afterwards.
    pub to: Tuple,
    /// By the monotonic clock, with a second's precision.
    pub last_seen_ns: u64,
    pub pool: u32,
    /// The frontend's number.
    pub frontend: u32,
    /// `FLOW_*`.
    pub role: u8,
    /// `STATE_*`.
    pub state: u8,
    /// Connections that the node makes: the link address of `node_interface`.
    pub node_link: [u8; 6],
    /// Connections that the node makes: where it sends packets, and expects answers; else 0.
    pub node_interface: u32,
    /// Connections that the node makes: where packets leave for the endpoint.
    pub endpoint_interface: u32,
}

/// From the client: the destination becomes the endpoint.
pub const FLOW_TO_ENDPOINT: u8 = 1;
/// From the endpoint: the source becomes the Service's address.
pub const FLOW_FROM_ENDPOINT: u8 = 2;
/// From the client: the source becomes the node's address.
pub const FLOW_MASQUERADE: u8 = 3;
/// From the endpoint: the destination becomes the client's address.
pub const FLOW_UNMASQUERADE: u8 = 4;
/// As [`FLOW_MASQUERADE`], but address and port are chosen when the first packet leaves.
pub const FLOW_MASQUERADE_SOON: u8 = 5;

/// The endpoint has answered.
pub const STATE_ANSWERED: u8 = 1;
/// The client will send nothing more.
pub const STATE_CLIENT_DONE: u8 = 2;
/// The endpoint will send nothing more.
pub const STATE_ENDPOINT_DONE: u8 = 4;
/// One of them has broken it off.
pub const STATE_RESET: u8 = 8;
/// The endpoint was done before the client was.
pub const STATE_ENDPOINT_FIRST: u8 = 16;
/// The endpoint's node is told which Service was asked. Its answers do not come by here.
pub const STATE_TELLS: u8 = 32;
/// Another node has told which Service was asked. The client's packets come by that one.
pub const STATE_TOLD: u8 = 64;

const DONE: u8 = STATE_CLIENT_DONE | STATE_ENDPOINT_DONE;

/// A packet that may be the first of a connection.
pub const SIGN_START: u8 = 1;
/// The sender sends nothing more.
pub const SIGN_DONE: u8 = 2;
/// The sender breaks off.
pub const SIGN_RESET: u8 = 4;
/// The answer to the first packet of a connection.
pub const SIGN_ACCEPT: u8 = 8;

pub const PROTOCOL_ICMP: u8 = 1;
pub const PROTOCOL_TCP: u8 = 6;
pub const PROTOCOL_UDP: u8 = 17;
pub const PROTOCOL_ICMP6: u8 = 58;
pub const PROTOCOL_SCTP: u8 = 132;

const NS_PER_SEC: u64 = 1_000_000_000;
/// How often it is noted that a connection lives.
const NOTED_EVERY_NS: u64 = NS_PER_SEC;
/// After the last packet of a connection that nobody answered. Connection tracking's for a SYN is 120 s, but
/// then nobody tries any more for a minute.
const OPENING_SECS: u64 = 60;
/// One side is done. Linux keeps such a socket (FIN_WAIT2) for 60 s.
const CLOSING_SECS: u64 = 60;
/// As kube-proxy has it for connection tracking.
const ESTABLISHED_SECS: u64 = 86_400;
/// As connection tracking has it.
const UDP_OPENING_SECS: u64 = 30;
const UDP_SECS: u64 = 120;
/// How long Linux remembers a TCP connection that it closed first (TIME_WAIT): a minute, by timers that may be an eighth late.
const TIME_WAIT_SECS: u64 = 68;

/// What TCP flags (the byte with FIN as its lowest bit) tell.
#[inline(always)]
#[must_use]
pub const fn tcp_signs(flags: u8) -> u8 {
    const FIN: u8 = 1;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    const SYN_ACK: u8 = SYN | ACK;
    let mut signs = match flags & (SYN | ACK | RST | FIN) {
        SYN => SIGN_START,
        SYN_ACK => SIGN_ACCEPT,
        _ => 0,
    };
    if flags & FIN != 0 {
        signs |= SIGN_DONE;
    }
    if flags & RST != 0 {
        signs |= SIGN_RESET;
    }
    signs
}

/// What the first chunk of an SCTP packet tells.
#[inline(always)]
#[must_use]
pub const fn sctp_signs(chunk: u8) -> u8 {
    const INIT: u8 = 1;
    const INIT_ACK: u8 = 2;
    const ABORT: u8 = 6;
    const SHUTDOWN: u8 = 7;
    const SHUTDOWN_COMPLETE: u8 = 14;
    match chunk {
        INIT => SIGN_START,
        INIT_ACK => SIGN_ACCEPT,
        SHUTDOWN => SIGN_DONE,
        ABORT | SHUTDOWN_COMPLETE => SIGN_RESET,
        _ => 0,
    }
}

impl Flow {
    /// Whether the packets are the client's.
    #[inline(always)]
    #[must_use]
    pub const fn is_from_client(&self) -> bool {
        self.role & 1 == 1
    }

    /// The number of the frontend that packets of this translation are counted for; 0 where they are counted at the
    /// node's other end, too.
    #[inline(always)]
    #[must_use]
    pub const fn counts_for(&self) -> u32 {
        if matches!(self.role, FLOW_TO_ENDPOINT | FLOW_FROM_ENDPOINT) { self.frontend } else { 0 }
    }

    /// The translation of the other direction, which is found at `to.reversed()`.
    #[inline(always)]
    #[must_use]
    pub fn opposite(&self, key: &Tuple) -> Self {
        let role = match self.role {
            FLOW_TO_ENDPOINT => FLOW_FROM_ENDPOINT,
            FLOW_FROM_ENDPOINT => FLOW_TO_ENDPOINT,
            FLOW_UNMASQUERADE => FLOW_MASQUERADE,
            _ => FLOW_UNMASQUERADE,
        };
        Flow { to: key.reversed(), role, ..*self }
    }

    /// The state after another packet.
    #[inline(always)]
    #[must_use]
    pub const fn state_after(&self, signs: u8) -> u8 {
        let mut state = self.state;
        let done = if self.is_from_client() {
            if state & STATE_TELLS != 0 && signs & SIGN_START == 0 {
                // Nobody goes on who was not answered.
                state |= STATE_ANSWERED;
            }
            STATE_CLIENT_DONE
        } else {
            state |= STATE_ANSWERED;
            match state & (STATE_CLIENT_DONE | STATE_ENDPOINT_DONE) {
                0 => STATE_ENDPOINT_DONE | STATE_ENDPOINT_FIRST,
                _ => STATE_ENDPOINT_DONE,
            }
        };
        if signs & SIGN_DONE != 0 {
            state |= done;
        }
        if signs & SIGN_RESET != 0 {
            state |= STATE_RESET;
        }
        state
    }

    /// Whether a packet, after which the state is `state`, must be noted.
    #[inline(always)]
    #[must_use]
    pub const fn must_note(&self, state: u8, now_ns: u64) -> bool {
        state != self.state || now_ns.saturating_sub(self.last_seen_ns) >= NOTED_EVERY_NS
    }

    /// Whether nobody sends anything more, as far as that can be seen.
    #[inline(always)]
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        let done = self.state & DONE;
        done == DONE || done != 0 && self.is_one_way()
    }

    /// Whether one of them sends nothing more.
    #[inline(always)]
    #[must_use]
    pub const fn is_half_closed(&self) -> bool {
        self.state & DONE != 0
    }

    /// Whether packets of one direction do not come by here.
    #[inline(always)]
    #[must_use]
    pub const fn is_one_way(&self) -> bool {
        self.state & (STATE_TELLS | STATE_TOLD) != 0
    }

    /// Whether its ports may be used for another connection, and another packet with [`SIGN_START`] begins
    /// a new one. Packets without it are still translated, for as long as there is room for the flow.
    #[inline(always)]
    #[must_use]
    pub const fn is_over(&self, now_ns: u64) -> bool {
        if self.state & STATE_RESET != 0 || self.is_closed() {
            return true;
        }
        let answered = self.state & STATE_ANSWERED != 0;
        let secs = if self.to.protocol == PROTOCOL_UDP {
            let may_be_answered = answered || self.state & STATE_TELLS != 0;
            if may_be_answered { UDP_SECS } else { UDP_OPENING_SECS }
        } else if self.is_half_closed() {
            CLOSING_SECS
        } else if answered {
            ESTABLISHED_SECS
        } else {
            OPENING_SECS
        };
        now_ns.saturating_sub(self.last_seen_ns) >= secs * NS_PER_SEC
    }

    /// Whether its ports are over for the endpoint, too. Who closes a TCP connection first remembers it for a minute,
    /// and may take the next one with these ports for a part of it.
    #[inline(always)]
    #[must_use]
    pub const fn is_forgotten(&self, now_ns: u64) -> bool {
        let closed = self.state & (STATE_ENDPOINT_FIRST | STATE_RESET);
        let is_remembered = self.to.protocol == PROTOCOL_TCP && closed == STATE_ENDPOINT_FIRST;
        self.is_over(now_ns)
            && (!is_remembered
                || now_ns.saturating_sub(self.last_seen_ns) >= TIME_WAIT_SECS * NS_PER_SEC)
    }
}

/// The ports of a packet that came in pieces: only the first piece carries them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FragmentKey {
    pub source: Address,
    pub destination: Address,
    pub id: u32,
    pub protocol: u8,
    pub zero: [u8; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FragmentPorts {
    pub source_port_be: u16,
    pub destination_port_be: u16,
}

layout! {
    Tuple: 40,
    Flow: 72,
    FragmentKey: 40,
    FragmentPorts: 4,
}

#[cfg(test)]
mod tests;
