//! Says to the programs that somebody watches, as long as that is so.
//!
//! Who watches holds a lock on the folder of maps: there is one ring buffer, and whoever reads takes away. The lock goes
//! with its process, so the proxy can tell when one died without saying so.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use keelson_ebpf_abi::{WATCH_ALL, WATCH_FAILURES, WATCH_NOTHING};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::ebpf::error::EbpfError;
use crate::ebpf::table::{PerCpu, Table};

pub(super) struct Watching {
    watched: Table<u32, u32>,
    lost: PerCpu<u32, u64>,
    /// Until now, also before this process.
    lost_before: u64,
    wants: u32,
    _lock: Flock<File>,
}

impl Watching {
    pub(super) fn start(maps: &Path, only_failures: bool) -> anyhow::Result<Self> {
        let _lock = match lock_in_time(maps) {
            Ok(lock) => lock,
            Err(Errno::EWOULDBLOCK) => bail!("another monitor is running"),
            Err(error) => return Err(error).context("cannot lock the folder of maps"),
        };
        let lost: PerCpu<u32, u64> = PerCpu::open(maps, "events_lost")?;
        let watching = Watching {
            watched: Table::open(maps, "watched")?,
            lost_before: lost.get(&0)?,
            lost,
            wants: if only_failures { WATCH_FAILURES } else { WATCH_ALL },
            _lock,
        };
        watching.go_on()?;
        Ok(watching)
    }

    pub(super) fn go_on(&self) -> Result<(), EbpfError> {
        self.watched.put(&0, &self.wants)
    }

    /// How many events found no room since it was last asked.
    pub(super) fn lost(&mut self) -> Result<u64, EbpfError> {
        let lost = self.lost.get(&0)?;
        Ok(lost.wrapping_sub(std::mem::replace(&mut self.lost_before, lost)))
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        if let Err(error) = self.watched.put(&0, &WATCH_NOTHING) {
            tracing::warn!(%error, "The programs still write events");
        }
    }
}

/// As [`lock`]. The proxy has it for a moment when it looks whether a monitor has died.
fn lock_in_time(maps: &Path) -> Result<Flock<File>, Errno> {
    const ATTEMPTS: u32 = 20;
    const PAUSE: Duration = Duration::from_millis(10);
    for _ in 1..ATTEMPTS {
        match lock(maps) {
            Err(Errno::EWOULDBLOCK) => std::thread::park_timeout(PAUSE),
            taken => return taken,
        }
    }
    lock(maps)
}

fn lock(maps: &Path) -> Result<Flock<File>, Errno> {
    let folder = File::open(maps)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    Flock::lock(folder, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)
}

/// Has the programs stop writing events when who wanted them was killed.
pub(in crate::ebpf) fn forget_the_dead(
    watched: &Table<u32, u32>,
    maps: &Path,
) -> Result<(), EbpfError> {
    let is_watched = watched.get(&0)?.is_some_and(|wants| wants != WATCH_NOTHING);
    if is_watched && let Ok(_lock) = lock(maps) {
        watched.put(&0, &WATCH_NOTHING)?;
    }
    Ok(())
}
