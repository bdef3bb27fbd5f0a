//! `keelson-proxy monitor`: a live stream of what the packet programs decide, out of their ring buffer.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use aya::maps::{Map, MapData, RingBuf};
use keelson_ebpf_abi::{
    Address, DROP_FAILED, DROP_FRAGMENT, DROP_NO_ADDRESS, DROP_NO_PORT, DROP_NO_ROUTE,
    DROP_NO_SUCH_ADDRESS, DROP_POLICY, DROP_SOURCE, DROP_UNANSWERED, EVENT_CONNECTED,
    EVENT_DROPPED, EVENT_MASQUERADED, EVENT_REFUSED, Event, HOOK_INGRESS, PROTOCOL_SCTP,
    PROTOCOL_TCP, PROTOCOL_UDP, SETTING_EVENTS, Settings, Tuple,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::programs::Programs;
use super::table::Table;
use super::{EbpfConfig, EbpfError};

/// What to show.
#[derive(Debug, clap::Args)]
pub struct MonitorArgs {
    /// Only what did not reach an endpoint
    #[arg(long)]
    drops: bool,
    /// Only packets from, to, or sent on to this address
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,
    /// Only packets from, to, or sent on to this port
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Lines a second; what is left out is counted
    #[arg(long, value_name = "LINES", default_value_t = 1000)]
    rate: u32,
}

/// Says in `settings` that somebody listens, until dropped.
struct Listening {
    settings: Table<u32, Settings>,
}

impl Listening {
    fn start(settings: Table<u32, Settings>) -> Result<Self, EbpfError> {
        let listening = Listening { settings };
        listening.set(true)?;
        Ok(listening)
    }

    /// Again and again, since a proxy that starts writes the settings anew.
    fn set(&self, wanted: bool) -> Result<(), EbpfError> {
        let found = self.settings.get(&0)?.unwrap_or_default();
        let flags =
            if wanted { found.flags | SETTING_EVENTS } else { found.flags & !SETTING_EVENTS };
        if flags == found.flags {
            return Ok(());
        }
        self.settings.put(&0, &Settings { flags, ..found })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Err(error) = self.set(false) {
            tracing::warn!(%error, "The programs still write events");
        }
    }
}

/// Writes a line for each decision until `stop` says so.
///
/// # Errors
/// When the mode is not in force, or the output is closed.
pub fn monitor(
    config: &EbpfConfig,
    wanted: &MonitorArgs,
    out: &mut impl Write,
    mut stop: impl FnMut() -> bool,
) -> anyhow::Result<()> {
    let folder = Programs::maps_folder(&config.pins);
    let absent = "mode ebpf is not in force here";
    let settings = Table::open(&folder, "settings").context(absent)?;
    let events = MapData::from_pin(folder.join("events")).context(absent)?;
    let mut events = RingBuf::try_from(Map::RingBuf(events))?;
    let listening = Listening::start(settings)?;
    let mut rate = Rate::new(wanted.rate);
    while !stop() {
        listening.set(true)?;
        // A signal ends the wait, and so does a second without anything.
        let mut waiting = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, PollTimeout::from(1000u16)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        while let Some(item) = events.next() {
            let Some(event) = read(&item) else { continue };
            if !wanted.shows(&event) {
                continue;
            }
            if let Some(left_out) = rate.admit(Instant::now()) {
                if left_out > 0 {
                    writeln!(out, "... {left_out} more")?;
                }
                writeln!(out, "{}", line(&event))?;
            }
        }
        out.flush()?;
    }
    Ok(())
}

/// Lets so many through in each second.
struct Rate {
    limit: u32,
    since: Option<Instant>,
    admitted: u32,
    left_out: u64,
}

impl Rate {
    fn new(limit: u32) -> Self {
        Rate { limit, since: None, admitted: 0, left_out: 0 }
    }

    /// Nothing when this one is left out, else how many were since the last one.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let over = |since: Instant| now.saturating_duration_since(since) >= Duration::from_secs(1);
        if self.since.is_none_or(over) {
            (self.since, self.admitted) = (Some(now), 0);
        }
        if self.admitted >= self.limit {
            self.left_out += 1;
            return None;
        }
        self.admitted += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

impl MonitorArgs {
    fn shows(&self, event: &Event) -> bool {
        let ends = [ends(&event.tuple), ends(&event.to)].concat();
        (!self.drops || matches!(event.what, EVENT_DROPPED | EVENT_REFUSED))
            && self.address.is_none_or(|address| ends.iter().any(|end| end.ip() == address))
            && self.port.is_none_or(|port| ends.iter().any(|end| end.port() == port))
    }
}

fn ends(tuple: &Tuple) -> [SocketAddr; 2] {
    let end =
        |address: Address, port_be: u16| SocketAddr::new(address.into(), u16::from_be(port_be));
    [end(tuple.source, tuple.source_port_be), end(tuple.destination, tuple.destination_port_be)]
}

/// An event as it was written into the ring buffer.
fn read(bytes: &[u8]) -> Option<Event> {
    super::sys::read_event(bytes)
}

fn line(event: &Event) -> String {
    let protocol = match event.tuple.protocol {
        PROTOCOL_TCP => "tcp".to_owned(),
        PROTOCOL_UDP => "udp".to_owned(),
        PROTOCOL_SCTP => "sctp".to_owned(),
        number => format!("protocol {number}"),
    };
    let [from, to] = ends(&event.tuple);
    let way = if event.hook == HOOK_INGRESS { "arriving" } else { "leaving" };
    let what = match event.what {
        EVENT_CONNECTED => format!("goes to {}", ends(&event.to)[1]),
        EVENT_MASQUERADED => format!("speaks from {}", ends(&event.to)[0]),
        EVENT_REFUSED => "refused: nobody is there".to_owned(),
        EVENT_DROPPED => format!("dropped: {}", reason(event.reason)),
        number => format!("event {number}"),
    };
    format!("{protocol} {from} -> {to} {what} ({way} at interface {})", event.interface)
}

fn reason(number: u8) -> &'static str {
    match u32::from(number) {
        DROP_NO_SUCH_ADDRESS => "no Service has that address",
        DROP_SOURCE => "loadBalancerSourceRanges keep the client out",
        DROP_POLICY => "the traffic policy is Local and no endpoint is here",
        DROP_NO_ADDRESS => "the interface has no address to masquerade with",
        DROP_NO_PORT => "all ports to masquerade with are taken",
        DROP_FAILED => "the kernel refused to change or remember something",
        DROP_FRAGMENT => "a later piece of a packet whose first one did not come by",
        DROP_NO_ROUTE => "no route to the endpoint",
        DROP_UNANSWERED => "nobody is there, and the sender must not be told",
        _ => "for another reason",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(what: u32) -> Event {
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
            interface: 2,
            ..Event::default()
        }
    }

    #[test]
    fn a_line_tells_who_wanted_what_and_what_became_of_it() {
        let found = line(&event(EVENT_CONNECTED));
        let wanted =
            "tcp 192.0.2.1:4000 -> 192.0.2.2:30080 goes to 10.0.0.2:8080 (arriving at interface 2)";
        assert_eq!(found, wanted);
        let dropped = Event { reason: 1, ..event(EVENT_DROPPED) };
        assert!(line(&dropped).contains("dropped: loadBalancerSourceRanges keep the client out"));
    }

    #[test]
    fn filters_look_at_both_ends_and_the_endpoint() {
        let all = MonitorArgs { drops: false, address: None, port: None, rate: 1 };
        let connected = event(EVENT_CONNECTED);
        assert!(all.shows(&connected));
        for (port, shown) in [(8080, true), (30080, true), (4000, true), (80, false)] {
            assert_eq!(MonitorArgs { port: Some(port), ..all }.shows(&connected), shown);
        }
        let address = Some("10.0.0.2".parse().unwrap());
        assert!(MonitorArgs { address, ..all }.shows(&connected));
        assert!(!MonitorArgs { drops: true, ..all }.shows(&connected));
        assert!(MonitorArgs { drops: true, ..all }.shows(&event(EVENT_REFUSED)));
    }

    #[test]
    fn more_than_the_rate_is_counted() {
        let (mut rate, start) = (Rate::new(2), Instant::now());
        let admitted: Vec<_> = (0..4).map(|_| rate.admit(start)).collect();
        assert_eq!(admitted, [Some(0), Some(0), None, None]);
        assert_eq!(rate.admit(start + Duration::from_secs(1)), Some(2));
    }
}
