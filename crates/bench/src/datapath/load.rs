//! The work: connections, round trips, bulk; in slices, in turn.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use keelson_netlink::netns::Netns;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Pid;

use super::objects;
use super::tally::{Kind, Sample, Tally};
use super::world::{Spot, World};

/// Everybody works there.
const CPU: usize = 1;
/// What a connection asks for with its first byte.
const ONCE: u8 = b'o';
const AGAIN: u8 = b'a';
const SWALLOW: u8 = b's';
const STOP: u8 = b'!';
/// Of one slice.
const CONNECTIONS: u32 = 2_000;
const ROUND_TRIPS: u32 = 1_000;
const BLOCKS: u32 = 400;
static BLOCK: [u8; 65_536] = [0; 65_536];
const PATIENCE: Duration = Duration::from_secs(5);

/// What listens in a pod.
pub(super) struct Server {
    netns: Netns,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Server {
    /// # Errors
    /// When the ports are taken.
    pub(super) fn start(netns: Netns) -> Result<Server> {
        let mut threads = Vec::new();
        for at in objects::listening() {
            let bind = || -> Result<_> { Ok((TcpListener::bind(at)?, UdpSocket::bind(at)?)) };
            let (streams, datagrams) = netns.run(bind)??;
            threads.push(std::thread::spawn(move || pin().and_then(|()| serve(&streams))));
            threads.push(std::thread::spawn(move || pin().and_then(|()| echo(&datagrams))));
        }
        Ok(Server { netns, threads })
    }

    /// # Errors
    /// When it had failed before.
    pub(super) fn stop(self) -> Result<()> {
        self.netns.run(|| -> Result<()> {
            for at in objects::listening() {
                TcpStream::connect(at)?.write_all(&[STOP])?;
                UdpSocket::bind(("0.0.0.0", 0))?.send_to(&[STOP], at)?;
            }
            Ok(())
        })??;
        let end = |thread: JoinHandle<Result<()>>| match thread.join() {
            Ok(result) => result,
            Err(_) => bail!("the server panicked"),
        };
        self.threads.into_iter().try_for_each(end)
    }
}

fn serve(listener: &TcpListener) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept()?;
        let mut wish = [0];
        match stream.read_exact(&mut wish).map(|()| wish[0]) {
            Ok(STOP) => return Ok(()),
            Ok(ONCE) => {
                stream.write_all(&wish)?;
                // The client closes first.
                stream.read_exact(&mut wish).ok();
            }
            Ok(_) => drop(std::thread::spawn(move || entertain(stream, wish[0]))),
            // Somebody who only looks whether we are there.
            Err(_) => {}
        }
    }
}

/// Until the client goes.
fn entertain(mut stream: TcpStream, wish: u8) {
    let mut buffer = vec![0; BLOCK.len()];
    stream.set_nodelay(true).ok();
    loop {
        let answered = match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(_) if wish == SWALLOW => Ok(()),
            Ok(length) => stream.write_all(&buffer[..length]),
        };
        if answered.is_err() {
            return;
        }
    }
}

fn echo(socket: &UdpSocket) -> Result<()> {
    let mut byte = [0];
    loop {
        let (_, from) = socket.recv_from(&mut byte)?;
        if byte == [STOP] {
            return Ok(());
        }
        match socket.send_to(&byte, from) {
            // The answer to a datagram of ours that came too late.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            sent => drop(sent?),
        }
    }
}

/// All kinds of work in all worlds, `rounds` times; what a slice cost goes into `tally`.
///
/// # Errors
/// When a connection fails.
pub(super) async fn run(worlds: &[World], rounds: u32, tally: &mut Tally) -> Result<()> {
    pin()?;
    let mut talks = Vec::new();
    for world in worlds {
        let service = match world.has_services() {
            true => objects::service(),
            false => objects::direct(),
        };
        talks.push([Talk::begin(world, service)?, Talk::begin(world, objects::direct())?]);
    }
    let mut kinds = Kind::ALL;
    // The first round is for caches.
    for round in 0..=rounds {
        // Who comes first is at a disadvantage.
        kinds.reverse();
        for (world, talks) in worlds.iter().zip(&mut talks) {
            let possible = |kind: &Kind| world.has_services() || !kind.needs_service();
            for kind in kinds.into_iter().filter(possible) {
                // Somebody may want to end this.
                tokio::task::yield_now().await;
                let sample = perform(world, talks, kind)
                    .with_context(|| format!("{}, {kind:?}", world.label));
                match sample {
                    Ok(sample) if round > 0 => tally.push(&world.label, kind, sample),
                    Ok(_) => {}
                    Err(error) => tally.fail(&world.label, &error)?,
                }
            }
        }
    }
    Ok(())
}

fn perform(world: &World, [service, direct]: &mut [Talk; 2], kind: Kind) -> Result<Sample> {
    let connect = |spot, to| world.run(spot, || slice(CONNECTIONS, || exchange(to)));
    match kind {
        Kind::Connect => connect(Spot::Pod, objects::service()),
        Kind::ConnectDirect | Kind::ConnectDirectAgain => connect(Spot::Pod, objects::direct()),
        Kind::NodePort => connect(Spot::Outside, objects::node_port(world.node)),
        Kind::Tcp => service.round_trips(),
        Kind::TcpDirect => direct.round_trips(),
        Kind::Udp => service.datagrams(),
        Kind::UdpDirect => direct.datagrams(),
        Kind::Bulk => service.bulk(),
        Kind::BulkDirect => direct.bulk(),
    }
}

/// Sockets of the client pod that stay open.
struct Talk {
    to: SocketAddr,
    stream: TcpStream,
    bulk: TcpStream,
    /// Not connected, as those of resolvers.
    datagrams: UdpSocket,
}

impl Talk {
    fn begin(world: &World, to: SocketAddr) -> Result<Talk> {
        let open = |wish: u8| -> Result<TcpStream> {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(&[wish])?;
            Ok(stream)
        };
        let all = || -> Result<Talk> {
            let datagrams = UdpSocket::bind(("0.0.0.0", 0))?;
            datagrams.set_read_timeout(Some(PATIENCE))?;
            Ok(Talk { to, stream: open(AGAIN)?, bulk: open(SWALLOW)?, datagrams })
        };
        world.run(Spot::Pod, all).with_context(|| format!("{}: cannot talk to {to}", world.label))
    }

    fn round_trips(&mut self) -> Result<Sample> {
        slice(ROUND_TRIPS, || {
            self.stream.write_all(&[1])?;
            Ok(self.stream.read_exact(&mut [0])?)
        })
    }

    fn datagrams(&mut self) -> Result<Sample> {
        slice(ROUND_TRIPS, || {
            self.datagrams.send_to(&[1], self.to)?;
            let (_, from) = self.datagrams.recv_from(&mut [0])?;
            if from == self.to { Ok(()) } else { bail!("{from} answers for {}", self.to) }
        })
    }

    fn bulk(&mut self) -> Result<Sample> {
        slice(BLOCKS, || Ok(self.bulk.write_all(&BLOCK)?))
    }
}

fn exchange(to: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))?;
    stream.write_all(&[ONCE])?;
    Ok(stream.read_exact(&mut [0])?)
}

/// What one of `count` costs.
fn slice(count: u32, mut work: impl FnMut() -> Result<()>) -> Result<Sample> {
    let (began, before) = (Instant::now(), process_time()?);
    (0..count).try_for_each(|_| work())?;
    let each = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(count);
    Ok(Sample { wall: each(began.elapsed()), cpu: each(process_time()? - before) })
}

/// Of client and server, with what the kernel did in their name: without IRQ time accounting also the soft interrupts.
fn process_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = |time: TimeVal| Duration::from_micros(time.num_microseconds().cast_unsigned());
    Ok(micros(usage.user_time()) + micros(usage.system_time()))
}

fn pin() -> Result<()> {
    let mut cpus = CpuSet::new();
    let last = std::thread::available_parallelism().map_or(0, |count| count.get() - 1);
    cpus.set(CPU.min(last))?;
    Ok(sched_setaffinity(Pid::from_raw(0), &cpus)?)
}
