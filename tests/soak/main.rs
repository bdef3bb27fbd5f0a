//! `cargo xtask soak`: a node whose processes are killed, whose disk fills and whose clock steps, round after round, while
//! Services are in use. Prints what was lost; nothing may be.
#![allow(clippy::unwrap_used, reason = "a run ends where something that it needs does not hold")]
#![allow(clippy::print_stdout, reason = "the figures are the result")]

mod faults;
mod world;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use keelson_tests::node::{Node, Setup};

use crate::faults::{Faults, Random};
use crate::world::{Lost, World};

/// The modes in which the service proxy runs, each on a node of its own.
const MODES: [(&str, &[&str]); 3] = [
    ("nftables", &["--proxy-mode", "nftables"]),
    ("iptables", &["--proxy-mode", "iptables"]),
    ("ebpf", &["--proxy-mode", "ebpf"]),
];
/// Room for the image, the snapshots and the store, above the 1 GiB below which a node has DiskPressure.
const DISK: u64 = 1400 << 20;

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(lost) => {
            println!("{lost} things were lost");
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<u64> {
    let rounds = rounds()?;
    let mut random = Random::new();
    println!("{rounds} rounds, seed {}", random.seed());
    let mut total = 0;
    println!(
        "{:<10} {:>7} {:>7}  {:>20} {:>20} {:>20}  {:>9} {:>7}  faults",
        "proxy",
        "rounds",
        "time",
        "node port (new)",
        "node port (kept)",
        "ClusterIP (new)",
        "restarts",
        "leaks"
    );
    for (number, (mode, flags)) in MODES.iter().enumerate() {
        let share = rounds / 3 + u32::from(number < (rounds % 3) as usize);
        if share > 0 {
            total += soak(mode, flags, share, &mut random)?;
        }
    }
    Ok(total)
}

/// `--rounds N`.
fn rounds() -> Result<u32> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => Ok(200),
        ["--rounds", number] => Ok(number.parse()?),
        _ => bail!("usage: soak [--rounds N]"),
    }
}

fn soak(
    mode: &str,
    flags: &'static [&'static str],
    rounds: u32,
    random: &mut Random,
) -> Result<u64> {
    let began = Instant::now();
    let clock = faults::Clock::new()?;
    let setup = Setup { flags, env: clock.environment(), disk: Some(DISK) };
    let mut node = Node::start_with_setup(setup)?;
    let world = World::start(&node)?;
    let mut faults = Faults::new(clock);
    let mut seen = 0;
    for round in 0..rounds {
        world.change(&node, random)?;
        // Any moment from before the first action to after the last.
        std::thread::sleep(Duration::from_millis(random.below(400)));
        let fault = faults.one(&mut node, random);
        let fault = fault.with_context(|| format!("{mode}, round {round}"))?;
        if world.lost_outside() > seen {
            seen = world.lost_outside();
            println!("{mode}, round {round}: {fault}: {seen} lost; the node said:\n{}", node.log());
        }
    }
    faults.undo(&node)?;
    let log = node.log();
    let lost = world.end(&node)?;
    if lost.sum() > seen {
        println!("{mode}, at the end; the node said:\n{log}\n{}", node.log());
    }
    let leaks = match node.stop() {
        Ok(()) => 0,
        Err(error) => {
            println!("{error:#}");
            1
        }
    };
    report(mode, rounds, began.elapsed(), &lost, leaks, &faults);
    Ok(lost.sum() + leaks)
}

fn report(mode: &str, rounds: u32, time: Duration, lost: &Lost, leaks: u64, faults: &Faults) {
    let of = |counts: &keelson_tests::probe::Counts| {
        format!("{} lost of {}", counts.lost, counts.answered + counts.lost)
    };
    println!(
        "{mode:<10} {rounds:>7} {:>6}s  {:>20} {:>20} {:>20}  {:>9} {:>7}  {}",
        time.as_secs(),
        of(&lost.new),
        of(&lost.kept),
        of(&lost.cluster_ip),
        lost.restarts,
        leaks + lost.leaks,
        faults.summary()
    );
}
