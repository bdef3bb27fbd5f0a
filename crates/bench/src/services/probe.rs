//! Asks a Service until it answers: the only proof that its rule is in force is a connection.
//!
//! ```text
//!   node: connect to 10.96.x.y ── not translated yet ──> outside: refused by a reset, at once
//!                              ── translated ─────────> outside: 198.18.0.1, where the backend listens
//! ```

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use keelson_tests::node::read;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use crate::cluster::{Ground, OUTSIDE_ADDRESS, enter};
use crate::stats::Samples;

/// Between two attempts. A fraction of the shortest time that is worth reporting.
const PAUSE: Duration = Duration::from_micros(500);

/// An attempt that is neither accepted nor refused is lost: a proxy that knows the range of service addresses drops what
/// goes to one that nobody has yet. It may not hold up the next for long.
const ATTEMPT: Duration = Duration::from_millis(2);

/// A connection that is measured for its own sake.
const PATIENCE: Duration = Duration::from_secs(5);

/// Of each kind, in the comparison of connections.
const CONNECTIONS: u32 = 10_000;

/// What is outside answers everything for the service addresses with a reset.
///
/// # Errors
/// When the rule cannot be made.
pub(super) fn prepare(ground: &Ground<'_>) -> Result<()> {
    let rules = "table inet bench { chain in { type filter hook prerouting priority -300; \
                 ip daddr 10.96.0.0/16 meta l4proto tcp reject with tcp reset; }; }";
    let mut command = inside(&ground.outside_netns(), "nft");
    read(command.arg(rules)).map(drop)?;
    let range = "net.ipv4.ip_local_port_range=1024 65535";
    read(inside(&ground.netns(), "sysctl").args(["-qw", range])).map(drop)
}

/// Removes all rules of the node, as after a reboot.
///
/// # Errors
/// When nft fails.
pub(super) fn forget_rules(ground: &Ground<'_>) -> Result<()> {
    read(inside(&ground.netns(), "nft").args(["flush", "ruleset"])).map(drop)?;
    // The old interface's tables exist only where somebody used them.
    for (names, program) in [
        ("/proc/net/ip_tables_names", "iptables-legacy-restore"),
        ("/proc/net/ip6_tables_names", "ip6tables-legacy-restore"),
    ] {
        let used = read(inside(&ground.netns(), "cat").arg(names)).unwrap_or_default();
        let script: String = used.lines().map(|table| format!("*{table}\nCOMMIT\n")).collect();
        if !script.is_empty() {
            let mut command = inside(&ground.netns(), program);
            let mut child = command.stdin(std::process::Stdio::piped()).spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                std::io::Write::write_all(&mut stdin, script.as_bytes())?;
            }
            child.wait()?;
        }
    }
    Ok(())
}

fn inside(netns: &std::path::Path, program: &str) -> Command {
    crate::process::in_netns(netns, program.as_ref())
}

/// Listeners outside: what the measured Services lead to, and one for direct connections. Those need a port of their own:
/// the two kinds would get into each other's way in connection tracking.
pub(super) struct Backend {
    address: SocketAddr,
    direct: SocketAddr,
}

impl Backend {
    /// # Errors
    /// When the namespace is not there.
    pub(super) fn listen(ground: &Ground<'_>) -> Result<Backend> {
        let netns = ground.outside_netns();
        let [service, direct] = std::thread::scope(|scope| {
            let thread = scope.spawn(move || -> Result<[TcpListener; 2]> {
                enter(&netns)?;
                let bind = || TcpListener::bind((OUTSIDE_ADDRESS, 0));
                Ok([bind().context("cannot listen outside")?, bind()?])
            });
            thread.join().unwrap_or_else(|_| bail!("the listener's thread panicked"))
        })?;
        let backend = Backend { address: service.local_addr()?, direct: direct.local_addr()? };
        for listener in [service, direct] {
            std::thread::spawn(move || listener.incoming().flatten().for_each(hold));
        }
        Ok(backend)
    }

    /// Where the one for direct connections listens.
    pub(super) fn direct(&self) -> SocketAddr {
        self.direct
    }

    pub(super) fn endpoint(&self) -> (IpAddr, u16) {
        (self.address.ip(), self.address.port())
    }
}

/// Waits for the client to end an accepted connection: it is the client's to choose how.
fn hold(mut connection: TcpStream) {
    if connection.set_read_timeout(Some(PATIENCE)).is_ok() {
        // Its end or a reset, both are one.
        std::io::copy(&mut connection, &mut std::io::sink()).ok();
    }
}

/// How many times as long connections to `service` take as those to `direct`, which it leads to. The two take turns,
/// and medians of single connections are compared: whatever else the machine does makes some of them ten times as long.
///
/// # Errors
/// When a connection is not accepted.
pub(super) async fn lookups(service: SocketAddr, direct: SocketAddr) -> Result<f64> {
    let rounds = move || {
        let (mut through, mut straight) = (Samples::default(), Samples::default());
        for _ in 0..CONNECTIONS {
            through.push(connect(service)?.as_secs_f64());
            straight.push(connect(direct)?.as_secs_f64());
        }
        let medians = through.median().zip(straight.median());
        let (through, straight) = medians.context("no connection was measured")?;
        Ok(through / straight)
    };
    tokio::task::spawn_blocking(rounds).await?
}

fn connect(address: SocketAddr) -> Result<Duration> {
    let began = Instant::now();
    let connection = TcpStream::connect_timeout(&address, PATIENCE)
        .with_context(|| format!("cannot connect to {address}"))?;
    let took = began.elapsed();
    // By a reset: no end of a connection may wait for packets that come late, thousands of times.
    let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&connection, sockopt::Linger, &at_once)?;
    Ok(took)
}

/// Waits until a connection to `address` is accepted (`wanted`), or no longer is; the moment before the attempt that
/// showed it.
///
/// # Errors
/// When that does not happen within `limit`.
pub(super) async fn until(address: SocketAddr, wanted: bool, limit: Duration) -> Result<Instant> {
    tokio::task::spawn_blocking(move || wait(address, wanted, limit)).await?
}

/// Those that do not answer although they should, or the other way round.
///
/// # Errors
/// None today.
pub(super) async fn wrong(states: Vec<(SocketAddr, bool)>) -> Result<Vec<SocketAddr>> {
    /// One that is half right answers now and then.
    const ATTEMPTS: u32 = 3;
    let ask = move || {
        let answers = |at| TcpStream::connect_timeout(&at, ATTEMPT).is_ok();
        // Of those that are right, one connection in some thousand may be late.
        let is = |at, on| (0..ATTEMPTS).all(|_| answers(at) == on || answers(at) == on);
        states.into_iter().filter(|(at, on)| !is(*at, *on)).map(|(at, _)| at).collect()
    };
    Ok(tokio::task::spawn_blocking(ask).await?)
}

fn wait(address: SocketAddr, wanted: bool, limit: Duration) -> Result<Instant> {
    let deadline = Instant::now() + limit;
    loop {
        let before = Instant::now();
        let answered = TcpStream::connect_timeout(&address, ATTEMPT).is_ok();
        if answered == wanted {
            return Ok(before);
        }
        if before > deadline {
            let state = if wanted { "is not in force" } else { "is still in force" };
            bail!("{address} {state} after {limit:?}");
        }
        std::thread::park_timeout(PAUSE);
    }
}
