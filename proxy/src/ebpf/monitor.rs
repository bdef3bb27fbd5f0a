//! `keelson-proxy monitor`: a live stream of what the programs decide, out of their ring buffer.
//!
//! ```text
//! programs ── events ──► decision ── filter ── rate ──► a line, as text or JSON
//!          ◄─ watched        └─ names: asked of the running proxy
//! ```

pub(crate) mod decision;
mod filter;
mod names;
mod rate;
mod sockets;
mod watching;

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::Context;
use aya::maps::{Map, MapData, RingBuf};
use keelson_ebpf_abi::{Event, Settings, namespace_of_client};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::EbpfConfig;
use super::programs::Programs;
use super::table::Table;
use crate::model::Protocol;
use decision::{Clock, From};
use filter::Filter;
use names::Known;
use rate::Rate;
use sockets::Sockets;
use watching::Watching;
pub(super) use watching::forget_the_dead;

/// Events that are read before the output is flushed and others get their turn.
const AT_ONCE: usize = 4096;

/// What to show.
#[derive(Debug, clap::Args)]
pub struct MonitorArgs {
    /// Only what did not reach an endpoint: refused, or dropped
    #[arg(long)]
    drops: bool,
    /// Only what concerns this Service, or this port of it
    #[arg(long, value_name = "NAMESPACE/NAME[:PORT]")]
    service: Option<String>,
    /// Only from, to, or sent on to this address
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,
    /// Only from, to, or sent on to this port
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Only tcp, udp or sctp
    #[arg(long, value_name = "PROTOCOL", value_parser = protocol)]
    protocol: Option<Protocol>,
    /// Lines a second; what is left out is counted
    #[arg(long, value_name = "LINES", default_value_t = 1000)]
    rate: u32,
    /// text, or json: an object on each line
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

fn protocol(text: &str) -> Result<Protocol, String> {
    let known = Protocol::parse(Some(&text.to_uppercase())).filter(|_| !text.is_empty());
    known.ok_or_else(|| "expected tcp, udp or sctp".to_owned())
}

/// Writes a line for each decision until `stop` says so. `proxy` is where the running proxy answers, which knows the
/// names of Services.
///
/// # Errors
/// When the mode is not in force, somebody else watches already, or the output is closed.
pub fn monitor(
    config: &EbpfConfig,
    proxy: Option<SocketAddr>,
    wanted: &MonitorArgs,
    out: &mut impl Write,
    mut stop: impl FnMut() -> bool,
) -> anyhow::Result<()> {
    let folder = Programs::maps_folder(&config.pins);
    let absent = "mode ebpf is not in force here";
    let settings: Table<u32, Settings> = Table::open(&folder, "settings").context(absent)?;
    let events = MapData::from_pin(folder.join("events")).context(absent)?;
    let mut stream = Stream {
        filter: Filter::new(wanted),
        known: Known::ask(proxy),
        clock: Clock::read()?,
        sockets: Sockets::of_node(
            settings.get(&0)?.unwrap_or_default().host_cookie,
            config.namespaces.clone(),
        ),
        rate: Rate::new(wanted.rate),
        format: wanted.output,
        out,
    };
    if wanted.service.is_some() && !stream.known.answers() {
        anyhow::bail!("--service: no proxy answers that could tell which Services there are");
    }
    let mut watching = Watching::start(&folder, wanted.drops)?;
    let mut events = RingBuf::try_from(Map::RingBuf(events))?;
    while !stop() {
        watching.go_on()?;
        wait(&events)?;
        for _ in 0..AT_ONCE {
            let Some(item) = events.next() else { break };
            let Some(event) = super::sys::read_event(&item) else { continue };
            stream.take(&event)?;
        }
        stream.tell("lost", watching.lost()?)?;
        stream.out.flush()?;
    }
    stream.tell_left_out()?;
    Ok(stream.out.flush()?)
}

/// Until something comes; a signal ends the wait, and so does a second without anything.
fn wait(events: &RingBuf<MapData>) -> anyhow::Result<()> {
    let mut waiting = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
    match poll(&mut waiting, PollTimeout::from(1000u16)) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// On its way from the programs to the reader.
struct Stream<'w, W> {
    filter: Filter<'w>,
    known: Known,
    clock: Clock,
    sockets: Sockets,
    rate: Rate,
    format: Output,
    out: &'w mut W,
}

impl<W: Write> Stream<'_, W> {
    fn take(&mut self, event: &Event) -> anyhow::Result<()> {
        let now = Instant::now();
        let service = self.known.name(event, now);
        let from = match namespace_of_client(&event.tuple.source) {
            Some(cookie) => self.sockets.owner(cookie, event.tuple.destination.is_v4(), now),
            None => From::address(event),
        };
        let decision = decision::of(event, service, from);
        if !self.filter.shows(&decision) || !self.rate.admits(now) {
            return Ok(());
        }
        self.tell_left_out()?;
        match self.format {
            Output::Text => writeln!(self.out, "{} {decision}", self.clock.time(event.time_ns))?,
            Output::Json => {
                let line = decision.as_json(&self.clock.date(event.time_ns));
                writeln!(self.out, "{line}")?;
            }
        }
        Ok(())
    }

    fn tell_left_out(&mut self) -> std::io::Result<()> {
        let left_out = self.rate.take_left_out();
        self.tell("left_out", left_out)
    }

    /// How much is missing between two lines.
    fn tell(&mut self, what: &'static str, count: u64) -> std::io::Result<()> {
        match (count, self.format) {
            (0, _) => Ok(()),
            (_, Output::Json) => writeln!(self.out, "{}", serde_json::json!({ what: count })),
            (_, Output::Text) => {
                let why = match what {
                    "lost" => "lost: they came faster than they could be read",
                    _ => "left out: more than --rate",
                };
                writeln!(self.out, "... {count} {why}")
            }
        }
    }
}
