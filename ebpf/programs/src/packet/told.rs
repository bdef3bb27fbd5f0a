//! At the node of an endpoint: what another node tells in a packet. The connection is remembered as if it had been
//! asked here, so that the answers find their way to the client by themselves.

use aya_ebpf::bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM};
use keelson_ebpf::maps::SETTINGS;
use keelson_ebpf::{filter, frontend, hold};
use keelson_ebpf_abi::{
    ADDRESS_NODE, Address, DROP_FAILED, DROP_HELD, DROP_NO_PORT, DROP_OWN_CLIENT,
    DROP_UNKNOWN_SERVICE, FLOW_FROM_ENDPOINT, FLOW_TO_ENDPOINT, Flow, SETTING_DIRECT, SIGN_START,
    STATE_TELLS, STATE_TOLD, TOLD4_LENGTH, TOLD6_LENGTH, Told4, Told6,
};

use crate::events;
use crate::flow::{self, Reuse};
use crate::maps::{FLOWS_IN, FLOWS_OUT, Scratch};
use crate::open::Opened;
use crate::parse::{Packet, load, parse_transport};
use crate::rewrite::{Refused, network_offset, store};
use crate::tell::{IPV4, IPV4_WORD, IPV6, IPV6_LENGTH, make_room, store_first4, words};
use crate::verdict::{PASS, dropped};

/// No verdict: nothing is told.
pub const NOTHING: i32 = i32::MIN;

/// What the packet whose IP header is at `at` tells: a Service's address, and a port.
#[inline(always)]
pub fn read(skb: *mut __sk_buff, packet: &Packet, at: u32) -> Option<(Address, u16)> {
    if !packet.may_tell {
        return None;
    }
    if packet.is_v4 {
        let told = load::<Told4>(skb, at + IPV4)?;
        told.is_one().then(|| (Address::v4(told.address_be), told.port_be))
    } else {
        let told = load::<Told6>(skb, at + IPV6)?;
        told.is_one().then_some((told.address, told.port_be))
    }
}

/// What a packet that tells something is: of a connection that was told before; or [`Opened`].
const KNOWN: Opened = Opened(0x200);

/// Decides on a packet in which another node may tell something.
#[inline(always)]
pub fn arriving(skb: *mut __sk_buff, scratch: &mut Scratch) -> i32 {
    if !scratch.packet.may_tell || !is_told(skb, scratch) {
        return NOTHING;
    }
    if !has_service(scratch) {
        return dropped(skb, scratch, DROP_UNKNOWN_SERVICE);
    }
    if frontend::is_address(&scratch.packet.tuple.source, ADDRESS_NODE) {
        return dropped(skb, scratch, DROP_OWN_CLIENT);
    }
    let mut told = known(scratch);
    if told == Opened::TRANSLATE {
        told = remember(scratch);
        events::tell_opened(skb, scratch, told);
    }
    match told {
        KNOWN | Opened::TRANSLATE => take_out(skb, scratch),
        Opened::PASS => PASS,
        Opened(reason) => dropped(skb, scratch, reason),
    }
}

/// Whether the packet at hand tells where it had come to. Then it carries `scratch.to`, and `scratch.packet` is as if it
/// had come here for the Service.
#[inline(never)]
fn is_told(skb: *mut __sk_buff, scratch: &mut Scratch) -> bool {
    let takes = SETTINGS.get(0).is_some_and(|s| s.flags & SETTING_DIRECT != 0);
    let packet = &mut scratch.packet;
    if !takes || !parse_transport(skb, packet) || packet.signs & SIGN_START == 0 {
        return false;
    }
    let Some((address, port_be)) = read(skb, packet, 0) else { return false };
    let tuple = &mut packet.tuple;
    let to_endpoint = frontend::find(&tuple.destination, tuple.destination_port_be, tuple.protocol);
    if !matches!(to_endpoint, frontend::Found::Nothing) {
        return false;
    }
    scratch.to.set(tuple);
    tuple.destination.set(&address);
    tuple.destination_port_be = port_be;
    true
}

/// Whether the Service is known here, too; then `scratch.flow` is of it.
#[inline(never)]
fn has_service(scratch: &mut Scratch) -> bool {
    let tuple = &scratch.packet.tuple;
    let port_be = tuple.destination_port_be;
    let Some(found) = frontend::find_anywhere(&tuple.destination, port_be, tuple.protocol) else {
        return false;
    };
    scratch.flow.pool = found.outside.pool;
    scratch.flow.frontend = found.number;
    true
}

/// What is known of the connection: nothing yet if it must be remembered.
#[inline(never)]
fn known(scratch: &mut Scratch) -> Opened {
    let Some(flow) = flow::find(&FLOWS_IN, &scratch.packet.tuple) else { return Opened::TRANSLATE };
    let now = flow::now();
    if !flow.to.is(&scratch.to) {
        return Opened::TRANSLATE;
    }
    if flow.state & STATE_TELLS != 0 {
        // It was told by this very node, at a port of the interface.
        return Opened::PASS;
    }
    if flow.is_over(now) {
        return Opened::TRANSLATE;
    }
    flow::note(flow, scratch, now, &FLOWS_OUT);
    KNOWN
}

/// Enters both translations.
#[inline(never)]
fn remember(scratch: &mut Scratch) -> Opened {
    if hold::is_held() {
        return Opened(DROP_HELD);
    }
    filter::know(&scratch.packet.tuple.source, false);
    scratch.flow = Flow {
        to: scratch.packet.tuple.reversed(),
        last_seen_ns: flow::now(),
        pool: scratch.flow.pool,
        frontend: scratch.flow.frontend,
        role: FLOW_FROM_ENDPOINT,
        state: STATE_TOLD,
        ..Flow::default()
    };
    scratch.opposite = scratch.to.reversed();
    // What comes after this packet cannot be told from packets of another connection with these ports.
    if !flow::claim(&FLOWS_OUT, scratch, Reuse::Over) {
        return Opened(DROP_NO_PORT);
    }
    scratch.flow.role = FLOW_TO_ENDPOINT;
    scratch.flow.to.set(&scratch.to);
    if flow::enter(&FLOWS_IN, &scratch.packet.tuple, &scratch.flow) {
        Opened::TRANSLATE
    } else {
        Opened(DROP_FAILED)
    }
}

/// Takes what was told out of the packet: nobody else shall see it, connection tracking included.
#[inline(never)]
fn take_out(skb: *mut __sk_buff, scratch: &Scratch) -> i32 {
    let network = network_offset(skb);
    let out = if scratch.packet.is_v4 { take_out4(skb, network) } else { take_out6(skb, network) };
    if out.is_ok() { PASS } else { dropped(skb, scratch, DROP_FAILED) }
}

#[inline(always)]
fn take_out4(skb: *mut __sk_buff, network: u32) -> Result<(), Refused> {
    let first = u32::from_be(load::<u32>(skb, 0).ok_or(Refused)?);
    let told = load::<Told4>(skb, IPV4).ok_or(Refused)?;
    if first & 0xffff < IPV4 + TOLD4_LENGTH {
        return Err(Refused);
    }
    let shorter = first - TOLD4_LENGTH / 4 * IPV4_WORD - TOLD4_LENGTH;
    make_room(skb, -(TOLD4_LENGTH as i32))?;
    store_first4(skb, network, words(first, &told), [shorter.to_be(), 0, 0])
}

#[inline(always)]
fn take_out6(skb: *mut __sk_buff, network: u32) -> Result<(), Refused> {
    let rest = u32::from_be(load::<u32>(skb, IPV6_LENGTH).ok_or(Refused)?);
    let told = load::<Told6>(skb, IPV6).ok_or(Refused)?;
    let Some(length) = (rest >> 16).checked_sub(TOLD6_LENGTH) else { return Err(Refused) };
    let rest = length << 16 | u32::from(told.next) << 8 | rest & 0xff;
    make_room(skb, -(TOLD6_LENGTH as i32))?;
    store(skb, network + IPV6_LENGTH, &rest.to_be(), BPF_F_RECOMPUTE_CSUM)
}
