//! One decision of the programs, for people and for machines. Pure.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use jiff::Timestamp;
use keelson_ebpf_abi::{
    Address, EVENT_CONNECTED, EVENT_DROPPED, EVENT_MASQUERADED, EVENT_REFUSED, Event, HOOK_CONNECT,
    HOOK_EGRESS, HOOK_INGRESS, HOOK_SEND, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP,
};
use nix::net::if_::if_indextoname;
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::ebpf::drops;

/// An event, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    /// `EVENT_*`.
    pub(super) what: u32,
    pub(super) protocol: u8,
    pub(super) from: From,
    pub(super) to: SocketAddr,
    /// The endpoint, or whom the endpoint hears.
    pub(super) changed: Option<SocketAddr>,
    /// `namespace/name:port`
    pub(super) service: Option<String>,
    reason: u32,
    hook: u8,
    interface: u32,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Address(SocketAddr),
    /// A socket of the node's own network namespace, which has no address yet.
    Node,
    /// A socket of a pod with that address.
    Pod(IpAddr),
    /// A socket of another network namespace, by its cookie.
    Namespace(u64),
}

impl From {
    /// Who sent a packet.
    pub(crate) fn address(event: &Event) -> From {
        From::Address(end(event.tuple.source, event.tuple.source_port_be))
    }
}

fn end(address: Address, port_be: u16) -> SocketAddr {
    SocketAddr::new(address.into(), u16::from_be(port_be))
}

pub(crate) fn of(event: &Event, service: Option<String>, from: From) -> Decision {
    let (tuple, to) = (&event.tuple, &event.to);
    Decision {
        what: event.what,
        protocol: tuple.protocol,
        from,
        to: end(tuple.destination, tuple.destination_port_be),
        changed: match event.what {
            EVENT_CONNECTED => Some(end(to.destination, to.destination_port_be)),
            EVENT_MASQUERADED => Some(end(to.source, to.source_port_be)),
            _ => None,
        },
        service,
        reason: event.reason.into(),
        hook: event.hook,
        interface: event.interface,
    }
}

impl Decision {
    /// Addresses that it is about; without a port where there is none yet.
    pub(crate) fn ends(&self) -> impl Iterator<Item = (IpAddr, Option<u16>)> {
        let from = match self.from {
            From::Address(from) => Some((from.ip(), Some(from.port()))),
            From::Pod(from) => Some((from, None)),
            From::Node | From::Namespace(_) => None,
        };
        let others = [self.to].into_iter().chain(self.changed);
        from.into_iter().chain(others.map(|end| (end.ip(), Some(end.port()))))
    }

    fn protocol_name(&self) -> String {
        match self.protocol {
            PROTOCOL_TCP => "tcp".to_owned(),
            PROTOCOL_UDP => "udp".to_owned(),
            PROTOCOL_SCTP => "sctp".to_owned(),
            number => format!("protocol {number}"),
        }
    }

    fn place(&self) -> &'static str {
        match self.hook {
            HOOK_INGRESS => "arriving",
            HOOK_EGRESS => "leaving",
            HOOK_CONNECT => "connect",
            HOOK_SEND => "send",
            _ => "somewhere",
        }
    }

    /// The interface's name, if there still is one with that number.
    fn interface_name(&self) -> Option<String> {
        if self.interface == 0 {
            return None;
        }
        let name = if_indextoname(self.interface).ok().and_then(|name| name.into_string().ok());
        Some(name.unwrap_or_else(|| self.interface.to_string()))
    }

    /// An object; what it does not have is left out.
    pub(crate) fn as_json(&self, time: &str) -> Value {
        let (event, changed) = match self.what {
            EVENT_CONNECTED => ("connected", "endpoint"),
            EVENT_MASQUERADED => ("masqueraded", "speaksFrom"),
            EVENT_REFUSED => ("refused", ""),
            EVENT_DROPPED => ("dropped", ""),
            _ => ("other", ""),
        };
        let mut line = json!({
            "time": time,
            "event": event,
            "protocol": self.protocol_name(),
            "destination": self.to,
            "at": self.place(),
        });
        match self.from {
            From::Address(from) => line["source"] = json!(from),
            From::Pod(from) => line["source"] = json!(from),
            From::Node => line["node"] = json!(true),
            From::Namespace(cookie) => line["netnsCookie"] = json!(cookie),
        }
        if let Some(to) = self.changed {
            line[changed] = json!(to);
        }
        if self.what == EVENT_DROPPED {
            line["reason"] = json!(drops::reason(self.reason).0);
        }
        if let Some(service) = &self.service {
            line["service"] = json!(service);
        }
        if let Some(interface) = self.interface_name() {
            line["interface"] = json!(interface);
        }
        line
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.protocol_name())?;
        match self.from {
            From::Address(from) => write!(f, "{from}")?,
            From::Pod(from) => write!(f, "{from}")?,
            From::Node => f.write_str("node")?,
            From::Namespace(cookie) => write!(f, "netns {cookie}")?,
        }
        write!(f, " -> {}", self.to)?;
        if let Some(service) = &self.service {
            write!(f, " [{service}]")?;
        }
        match (self.what, self.changed) {
            (EVENT_CONNECTED, Some(to)) => write!(f, " goes to {to}")?,
            (EVENT_MASQUERADED, Some(from)) => write!(f, " speaks from {from}")?,
            (EVENT_REFUSED, _) => f.write_str(" refused: nobody is there")?,
            (EVENT_DROPPED, _) => write!(f, " dropped: {}", drops::reason(self.reason).1)?,
            (number, _) => write!(f, " event {number}")?,
        }
        match self.interface_name() {
            Some(interface) => write!(f, " ({} at {interface})", self.place()),
            None => write!(f, " ({})", self.place()),
        }
    }
}

/// From the programs' clock to that of people.
pub(super) struct Clock {
    /// When the monotonic clock was 0.
    start: Timestamp,
}

impl Clock {
    pub(super) fn read() -> nix::Result<Self> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        let start = Timestamp::now().checked_sub(now).unwrap_or(Timestamp::UNIX_EPOCH);
        Ok(Clock { start })
    }

    fn at(&self, time_ns: u64) -> Timestamp {
        self.start.checked_add(Duration::from_nanos(time_ns)).unwrap_or(self.start)
    }

    /// In UTC.
    pub(super) fn time(&self, time_ns: u64) -> String {
        self.at(time_ns).strftime("%H:%M:%S%.6f").to_string()
    }

    pub(super) fn date(&self, time_ns: u64) -> String {
        format!("{:.6}", self.at(time_ns))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use expect_test::expect;
    use keelson_ebpf_abi::{Tuple, client_of_namespace};

    use super::*;

    pub(in super::super) fn event(what: u32) -> Event {
        let tuple = |from: &str, to: &str| {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            Tuple {
                source: from.ip().into(),
                destination: to.ip().into(),
                source_port_be: from.port().to_be(),
                destination_port_be: to.port().to_be(),
                protocol: PROTOCOL_TCP,
                ..Tuple::default()
            }
        };
        Event {
            tuple: tuple("192.0.2.1:4000", "192.0.2.2:30080"),
            to: tuple("192.0.2.1:4000", "10.0.0.2:8080"),
            what,
            hook: HOOK_INGRESS,
            interface: 1,
            ..Event::default()
        }
    }

    /// Of the socket layer.
    pub(in super::super) fn socket_event(what: u32) -> Event {
        let mut event = Event { hook: HOOK_CONNECT, interface: 0, ..event(what) };
        event.tuple.source = client_of_namespace(7);
        event.tuple.source_port_be = 0;
        event.tuple.destination = Address::from(std::net::IpAddr::from([10, 96, 0, 1]));
        event
    }

    #[test]
    fn a_line_tells_who_wanted_what_and_what_became_of_it() {
        let dropped = Event { reason: 1, ..event(EVENT_DROPPED) };
        let web = || Some("ns/web:http".to_owned());
        let packet = |event: &Event, service| of(event, service, From::address(event));
        let lines = [
            packet(&event(EVENT_CONNECTED), web()),
            packet(&event(EVENT_MASQUERADED), None),
            packet(&event(EVENT_REFUSED), web()),
            packet(&dropped, None),
            of(&socket_event(EVENT_CONNECTED), web(), From::Node),
            of(&socket_event(EVENT_CONNECTED), None, From::Pod([10, 0, 0, 9].into())),
            of(&socket_event(EVENT_REFUSED), web(), From::Namespace(7)),
        ];
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        expect![[r#"
            tcp 192.0.2.1:4000 -> 192.0.2.2:30080 [ns/web:http] goes to 10.0.0.2:8080 (arriving at lo)
            tcp 192.0.2.1:4000 -> 192.0.2.2:30080 speaks from 192.0.2.1:4000 (arriving at lo)
            tcp 192.0.2.1:4000 -> 192.0.2.2:30080 [ns/web:http] refused: nobody is there (arriving at lo)
            tcp 192.0.2.1:4000 -> 192.0.2.2:30080 dropped: loadBalancerSourceRanges keep the client out (arriving at lo)
            tcp node -> 10.96.0.1:30080 [ns/web:http] goes to 10.0.0.2:8080 (connect)
            tcp 10.0.0.9 -> 10.96.0.1:30080 goes to 10.0.0.2:8080 (connect)
            tcp netns 7 -> 10.96.0.1:30080 [ns/web:http] refused: nobody is there (connect)
        "#]].assert_eq(&text);
        let json: String = lines.iter().map(|line| format!("{}\n", line.as_json("now"))).collect();
        expect![[r#"
            {"at":"arriving","destination":"192.0.2.2:30080","endpoint":"10.0.0.2:8080","event":"connected","interface":"lo","protocol":"tcp","service":"ns/web:http","source":"192.0.2.1:4000","time":"now"}
            {"at":"arriving","destination":"192.0.2.2:30080","event":"masqueraded","interface":"lo","protocol":"tcp","source":"192.0.2.1:4000","speaksFrom":"192.0.2.1:4000","time":"now"}
            {"at":"arriving","destination":"192.0.2.2:30080","event":"refused","interface":"lo","protocol":"tcp","service":"ns/web:http","source":"192.0.2.1:4000","time":"now"}
            {"at":"arriving","destination":"192.0.2.2:30080","event":"dropped","interface":"lo","protocol":"tcp","reason":"source_ranges","source":"192.0.2.1:4000","time":"now"}
            {"at":"connect","destination":"10.96.0.1:30080","endpoint":"10.0.0.2:8080","event":"connected","node":true,"protocol":"tcp","service":"ns/web:http","time":"now"}
            {"at":"connect","destination":"10.96.0.1:30080","endpoint":"10.0.0.2:8080","event":"connected","protocol":"tcp","source":"10.0.0.9","time":"now"}
            {"at":"connect","destination":"10.96.0.1:30080","event":"refused","netnsCookie":7,"protocol":"tcp","service":"ns/web:http","time":"now"}
        "#]].assert_eq(&json);
    }

    #[test]
    fn times_are_those_of_people() {
        let clock = Clock { start: "2026-01-01T00:00:00Z".parse().unwrap() };
        assert_eq!(clock.time(1_500_000_000), "00:00:01.500000");
        assert_eq!(clock.date(1_500_000_000), "2026-01-01T00:00:01.500000Z");
    }
}
