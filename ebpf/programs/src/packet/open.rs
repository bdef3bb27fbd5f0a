//! The first packet of a connection: where it goes, and what is remembered of that.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use keelson_ebpf::maps::{INTERFACES, POD_RANGES, SETTINGS};
use keelson_ebpf::{counters, endpoint, filter, frontend, hold};
use keelson_ebpf_abi::{
    ADDRESS_CLUSTER_IP, Address, DROP_FAILED, DROP_HELD, DROP_NO_PORT, DROP_NO_SUCH_ADDRESS,
    DROP_POLICY, DROP_SOURCE, ENDPOINT_HERE, ENDPOINT_STRANGER, Endpoint, FLOW_FROM_ENDPOINT,
    FLOW_MASQUERADE_SOON, FLOW_TO_ENDPOINT, FRONTEND_HAS_SOURCES, FRONTEND_HASHED, Flow, Frontend,
    INTERFACE_PODS, MASQUERADE_ALWAYS, MASQUERADE_UNLESS_POD, PROTOCOL_UDP, RangeKey,
    SETTING_DIRECT, SETTING_DIRECT_UDP, SETTING_KNOWS_PODS, SETTING_PASSES_UNKNOWN,
    SETTING_PODS_BY_INTERFACE, SIGN_START, STATE_TELLS, Tuple, VERDICT_DROP, VERDICT_FORWARD,
};

use crate::flow::{self, Reuse};
use crate::maps::{FLOWS_IN, FLOWS_OUT, Flows, Scratch};
use crate::masquerade::random_port;
use crate::parse::Packet;
use crate::tell;

/// What is to be done with a packet that belongs to no known connection: one of the constants, or a reason
/// to drop it.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Opened(pub u32);

impl Opened {
    /// No business of Services.
    pub const PASS: Opened = Opened(0x100);
    /// It shall carry `scratch.to`, and the connection is `scratch.flow`.
    pub const TRANSLATE: Opened = Opened(0x101);
    /// The sender is told that nobody is there.
    pub const REFUSE: Opened = Opened(0x102);
}

/// Who sent a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// Somebody behind the interface.
    Other,
    /// The node itself.
    Node,
}

const ATTEMPTS: u32 = 16;

/// Decides on a packet. To be translated means that `scratch.to` leads to an endpoint, that `scratch.hides` says
/// whether the client shall be hidden, and that `scratch.flow` is the translation of the answers; nothing of it
/// is in the maps yet.
#[inline(never)]
pub fn decide(skb: *mut __sk_buff, scratch: &mut Scratch, sender: Sender) -> Opened {
    let tuple = &scratch.packet.tuple;
    // A flow that is over may have had one.
    scratch.flow.frontend = 0;
    let found = match frontend::find(&tuple.destination, tuple.destination_port_be, tuple.protocol)
    {
        frontend::Found::Frontend(found) => found,
        frontend::Found::NoSuchPort => return unknown(scratch.packet.signs),
        frontend::Found::Nothing => return nothing(scratch),
    };
    scratch.flow.frontend = found.number;
    if scratch.packet.signs & SIGN_START == 0 {
        return unknown(scratch.packet.signs);
    }
    if found.flags & FRONTEND_HAS_SOURCES != 0 && !frontend::lets_in(found.number, &tuple.source) {
        return Opened(DROP_SOURCE);
    }
    follow(skb, scratch, found, sender)
}

/// What becomes of a packet that is not for a Service, unless it is for an address that only a Service could have.
#[inline(always)]
fn nothing(scratch: &Scratch) -> Opened {
    let begins = scratch.packet.signs & SIGN_START != 0;
    if begins && frontend::is_in_service_range(&scratch.packet.tuple.destination) {
        Opened(DROP_NO_SUCH_ADDRESS)
    } else {
        Opened::PASS
    }
}

/// What becomes of a packet to a Service that goes nowhere. One that begins nothing is of a connection that
/// was forgotten, unless those that netfilter translates are still to live, or it is on its way to another map.
#[inline(always)]
fn unknown(signs: u8) -> Opened {
    if signs & SIGN_START == 0 && hold::is_held() {
        return Opened(DROP_HELD);
    }
    let passes = SETTINGS.get(0).is_some_and(|s| s.flags & SETTING_PASSES_UNKNOWN != 0);
    if passes && signs & SIGN_START == 0 { Opened::PASS } else { Opened::REFUSE }
}

#[inline(always)]
fn follow(skb: *mut __sk_buff, scratch: &mut Scratch, found: &Frontend, sender: Sender) -> Opened {
    let client = &scratch.packet.tuple.source;
    let is_pod = sender == Sender::Other && is_pod(skb, client);
    let route = if is_pod || sender == Sender::Node { &found.inside } else { &found.outside };
    match route.verdict {
        VERDICT_FORWARD => {}
        VERDICT_DROP => return Opened(DROP_POLICY),
        _ => return Opened::REFUSE,
    }
    if hold::is_held() {
        return Opened(DROP_HELD);
    }
    let pick = if found.flags & FRONTEND_HASHED != 0 {
        scratch.packet.tuple.client_hash()
    } else {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_get_prandom_u32() }
    };
    let Some(endpoint) = endpoint::choose_by(route.pool, client, pick) else {
        return Opened::REFUSE;
    };
    let meets_itself = endpoint.flags & ENDPOINT_HERE != 0 && endpoint.address.is(client);
    let hides = match route.masquerade {
        MASQUERADE_ALWAYS => true,
        MASQUERADE_UNLESS_POD => !is_pod,
        _ => false,
    };
    let is_direct = hides
        && !(is_pod || meets_itself || sender == Sender::Node)
        && is_direct(&scratch.packet, &endpoint);
    scratch.hides = (hides || meets_itself) && !is_direct;
    let tells = is_direct && endpoint.flags & ENDPOINT_HERE == 0;
    scratch.to = Tuple {
        destination: endpoint.address,
        destination_port_be: endpoint.port_be,
        ..scratch.packet.tuple
    };
    scratch.flow = Flow {
        to: scratch.packet.tuple.reversed(),
        last_seen_ns: flow::now(),
        pool: route.pool,
        frontend: found.number,
        role: FLOW_FROM_ENDPOINT,
        state: if tells { STATE_TELLS } else { 0 },
        ..Flow::default()
    };
    Opened::TRANSLATE
}

/// Whether the endpoint can answer a client outside who keeps its address.
#[inline(always)]
fn is_direct(packet: &Packet, endpoint: &Endpoint) -> bool {
    let is_udp = packet.tuple.protocol == PROTOCOL_UDP;
    let setting = if is_udp { SETTING_DIRECT_UDP } else { SETTING_DIRECT };
    SETTINGS.get(0).is_some_and(|settings| settings.flags & setting != 0)
        && endpoint.flags & ENDPOINT_STRANGER == 0
        && !frontend::is_address(&packet.tuple.destination, ADDRESS_CLUSTER_IP)
        && tell::fits(packet)
}

/// Whether a source is a pod, as far as the settings allow to tell.
#[inline(always)]
fn is_pod(skb: *mut __sk_buff, source: &Address) -> bool {
    let Some(settings) = SETTINGS.get(0) else { return false };
    if settings.flags & SETTING_KNOWS_PODS == 0 {
        return false;
    }
    if settings.flags & SETTING_PODS_BY_INTERFACE == 0 {
        return POD_RANGES.get(&Key::new(128, RangeKey { address: *source })).is_some();
    }
    // SAFETY: a field of the context; the map is not preallocated.
    let interface = unsafe { INTERFACES.get((*skb).ifindex) };
    interface.is_some_and(|interface| interface.flags & INTERFACE_PODS != 0)
}

/// Enters the translations of a connection that arrives. All that it needs is in `scratch`, so that the verifier
/// meets it in one state only.
#[inline(never)]
pub fn connect(scratch: &mut Scratch) -> Opened {
    filter::know(&scratch.packet.tuple.source, false);
    if !claim_answers(&FLOWS_OUT, scratch) {
        return Opened(DROP_NO_PORT);
    }
    let has_other_port = scratch.to.source_port_be != scratch.packet.tuple.source_port_be;
    if scratch.flow.state & STATE_TELLS != 0 && has_other_port {
        // The endpoint's node would not know which port the client itself has.
        scratch.flow.state = 0;
        scratch.hides = true;
        if !flow::enter(&FLOWS_OUT, &scratch.opposite, &scratch.flow) {
            return Opened(DROP_FAILED);
        }
    }
    scratch.flow.to.set(&scratch.to);
    if scratch.hides {
        scratch.flow.role = FLOW_MASQUERADE_SOON;
        if !flow::enter(&FLOWS_OUT, &scratch.to, &scratch.flow) {
            return Opened(DROP_FAILED);
        }
    }
    scratch.flow.role = FLOW_TO_ENDPOINT;
    if flow::enter(&FLOWS_IN, &scratch.packet.tuple, &scratch.flow) {
        Opened::TRANSLATE
    } else {
        Opened(DROP_FAILED)
    }
}

/// Enters the translation of the answers. The endpoint may know the client's port already, by a connection
/// through another address of the Service: then this connection gets another port.
#[inline(always)]
pub fn claim_answers(flows: &'static Flows, scratch: &mut Scratch) -> bool {
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            scratch.to.source_port_be = random_port().to_be();
        }
        scratch.opposite = scratch.to.reversed();
        if flow::claim(flows, scratch, Reuse::Over) {
            return true;
        }
    }
    false
}

/// Counts what was decided on the packet's frontend, if it has one.
#[inline(always)]
pub fn count(scratch: &Scratch, opened: Opened) {
    if opened == Opened::PASS || scratch.flow.frontend == 0 {
        return;
    }
    counters::count(scratch.flow.frontend, |counters| {
        if opened == Opened::TRANSLATE {
            counters.connections += 1;
        } else {
            counters.refused += 1;
        }
    });
}
