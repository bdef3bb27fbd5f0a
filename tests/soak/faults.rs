//! What goes wrong in a round.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use keelson_tests::node::Node;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Debian's library that gives one process another clock (package libfaketime).
const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

/// Small and seeded by the clock, or by `KEELSON_SOAK_SEED` for the same rounds again.
pub(crate) struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    pub(crate) fn new() -> Random {
        let given = std::env::var("KEELSON_SOAK_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.subsec_nanos());
        let seed: u64 = given.unwrap_or_else(|| u64::from(clock()) << 20 | 1);
        Random { seed, state: seed }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % limit
    }
}

/// The clock that the node's own processes see.
pub(crate) struct Clock {
    folder: tempfile::TempDir,
}

impl Clock {
    pub(crate) fn new() -> Result<Clock> {
        if !Path::new(LIBRARY).exists() {
            bail!("{LIBRARY} is missing (Debian: libfaketime)");
        }
        let clock = Clock { folder: tempfile::tempdir()? };
        clock.set("+0")?;
        Ok(clock)
    }

    pub(crate) fn environment(&self) -> Vec<(&'static str, OsString)> {
        vec![
            ("LD_PRELOAD", LIBRARY.into()),
            ("FAKETIME_TIMESTAMP_FILE", self.file().into()),
            ("FAKETIME_CACHE_DURATION", "1".into()),
            // A step of the clock moves no clock that only goes forward.
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
        ]
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("clock")
    }

    fn set(&self, offset: &str) -> Result<()> {
        let new = self.folder.path().join("new");
        fs::write(&new, offset)?;
        Ok(fs::rename(new, self.file())?)
    }
}

/// Does the harm and counts it.
pub(crate) struct Faults {
    clock: Clock,
    done: BTreeMap<&'static str, u32>,
}

impl Faults {
    pub(crate) fn new(clock: Clock) -> Faults {
        Faults { clock, done: BTreeMap::new() }
    }

    /// One fault by chance; gives its name.
    pub(crate) fn one(&mut self, node: &mut Node, random: &mut Random) -> Result<String> {
        let mut detail = String::new();
        let name = match random.below(16) {
            0..=6 => {
                node.end_keelson(Signal::SIGKILL)?;
                node.launch()?;
                "keelson killed"
            }
            7 => {
                node.end_keelson(Signal::SIGTERM)?;
                node.launch()?;
                "keelson stopped"
            }
            8 | 9 => {
                kill_named(node, &["logd"])?;
                "logd killed"
            }
            10 | 11 => {
                let pid = fs::read_to_string(node.run_dir().join("containerd/containerd.pid"))?;
                // It may be between two lives already.
                kill(Pid::from_raw(pid.trim().parse()?), Signal::SIGKILL).ok();
                "containerd killed"
            }
            12 => {
                kill_shim_of_victim(node)?;
                "shim killed"
            }
            13 => {
                self.full_disk(node, random)?;
                "disk full"
            }
            _ => {
                let offsets = ["+0", "+2h", "-2h", "+1d", "-1d"];
                let index = usize::try_from(random.below(5))?;
                detail = format!(" to {}", offsets.get(index).copied().unwrap_or("+0"));
                self.clock.set(detail.trim_start_matches(" to "))?;
                "clock stepped"
            }
        };
        *self.done.entry(name).or_default() += 1;
        Ok(format!("{name}{detail}"))
    }

    /// Fills the disk for a moment; keelson is killed and started on it in half of the cases.
    fn full_disk(&mut self, node: &mut Node, random: &mut Random) -> Result<()> {
        let file = ballast(node);
        fill(&file)?;
        std::thread::sleep(Duration::from_millis(random.below(1500)));
        if random.below(2) == 0 {
            node.end_keelson(Signal::SIGKILL)?;
            let started = node.launch();
            fs::remove_file(&file)?;
            // A start that a full disk makes impossible is tried again, as systemd does.
            if started.is_err() {
                drop(node.end_keelson(Signal::SIGKILL));
                return node.launch();
            }
        }
        if file.exists() {
            fs::remove_file(&file)?;
        }
        Ok(())
    }

    /// The node's disk and clock are good again.
    pub(crate) fn undo(&self, node: &Node) -> Result<()> {
        drop(fs::remove_file(ballast(node)));
        self.clock.set("+0")
    }

    /// How often each fault was done.
    pub(crate) fn summary(&self) -> String {
        let parts: Vec<String> =
            self.done.iter().map(|(name, count)| format!("{count} x {name}")).collect();
        parts.join(", ")
    }
}

/// Writes `file` until nothing more fits.
fn fill(file: &Path) -> Result<()> {
    let mut ballast = fs::File::create(file)?;
    let block = vec![0; 1 << 20];
    let mut size = block.len();
    while size > 0 {
        match ballast.write(block.get(..size).unwrap_or_default()) {
            Ok(1..) => {}
            _ => size /= 2,
        }
    }
    Ok(())
}

fn ballast(node: &Node) -> PathBuf {
    node.state_dir().join("ballast")
}

/// Kills the node's process that has all of `words` in its command line.
fn kill_named(node: &Node, words: &[&str]) -> Result<()> {
    for pid in processes(node, words) {
        kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
    }
    Ok(())
}

/// The shim of a container of the Deployment `victim`.
fn kill_shim_of_victim(node: &Node) -> Result<()> {
    let ids = node.kubectl(&[
        "get",
        "pods",
        "-l",
        "app=victim",
        "-o",
        "jsonpath={.items[*].status.containerStatuses[0].containerID}",
    ]);
    let ids = ids.unwrap_or_default();
    let Some(id) = ids.split(' ').next().and_then(|id| id.strip_prefix("containerd://")) else {
        return Ok(());
    };
    kill_named(node, &["containerd-shim", id]).context("cannot kill a shim")
}

fn processes(node: &Node, words: &[&str]) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line);
        if line.contains(node.name()) && words.iter().all(|word| line.contains(word)) {
            found.extend(entry.file_name().to_string_lossy().parse::<i32>());
        }
    }
    found
}
