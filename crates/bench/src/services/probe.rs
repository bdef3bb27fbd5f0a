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

use crate::cluster::{Ground, OUTSIDE_ADDRESS, enter};

/// Between two attempts. A fraction of the shortest time that is worth reporting.
const PAUSE: Duration = Duration::from_micros(500);

/// An attempt that is neither accepted nor refused is lost; it may not hold up the next for long.
const ATTEMPT: Duration = Duration::from_millis(200);

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

/// A listener outside: what the measured Services lead to.
pub(super) struct Backend {
    address: SocketAddr,
    _listener: TcpListener,
}

impl Backend {
    /// # Errors
    /// When the namespace is not there.
    pub(super) fn listen(ground: &Ground<'_>) -> Result<Backend> {
        let netns = ground.outside_netns();
        let listener = std::thread::scope(|scope| {
            let thread = scope.spawn(move || -> Result<TcpListener> {
                enter(&netns)?;
                TcpListener::bind((OUTSIDE_ADDRESS, 0)).context("cannot listen outside")
            });
            thread.join().unwrap_or_else(|_| bail!("the listener's thread panicked"))
        })?;
        let address = listener.local_addr()?;
        // Accepted and closed at once: only the connection counts.
        let accepting = listener.try_clone()?;
        std::thread::spawn(move || accepting.incoming().for_each(drop));
        Ok(Backend { address, _listener: listener })
    }

    pub(super) fn endpoint(&self) -> (IpAddr, u16) {
        (self.address.ip(), self.address.port())
    }
}

/// Waits until a connection to `address` is accepted (`wanted`), or no longer is; the moment before the attempt that
/// showed it.
///
/// # Errors
/// When that does not happen within `limit`.
pub(super) async fn until(address: SocketAddr, wanted: bool, limit: Duration) -> Result<Instant> {
    tokio::task::spawn_blocking(move || wait(address, wanted, limit)).await?
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
