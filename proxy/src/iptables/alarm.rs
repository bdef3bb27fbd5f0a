//! Notices when somebody else changes our rules.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use keelson_netlink::nft::{Announcement, Monitor, Nft};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::IptablesError;
use super::fixed::HOOKS;
use super::names::{PREFIX, Table};
use super::program::{Programs, Variant};
use super::sizes::{Sizes, TableSizes};

/// Scripts with more rules than this are not watched by our own monitor: the kernel would have to
/// describe every rule to it.
const ANNOUNCED_OPERATIONS: usize = 500;
/// How often the sizes of the old interface's tables are looked at, in milliseconds.
const PERIOD: u16 = 500;

/// Watches the rules of one variant.
pub(crate) enum Alarm {
    /// nf_tables tells of every change.
    Announced { monitor: Monitor, nft: Nft, suspicious: bool },
    /// The old interface tells nothing, but the sizes of its tables are cheap to read.
    Measured { sizes: Sizes, known: Option<TableSizes>, bell: Arc<EventFd>, canary: Option<Canary> },
}

impl Alarm {
    /// Starts to watch in the programs' network namespace.
    pub(crate) fn open(programs: &Programs) -> Result<Self, IptablesError> {
        programs.within(|| match programs.variant {
            Variant::Nft => Ok(Alarm::Announced {
                monitor: Monitor::open().map_err(IptablesError::Watch)?,
                nft: Nft::open().map_err(IptablesError::Watch)?,
                suspicious: false,
            }),
            Variant::Legacy => {
                let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
                let bell = EventFd::from_value_and_flags(0, flags).map_err(IptablesError::Alarm)?;
                let sizes = Sizes::open(&programs.families()).map_err(IptablesError::Sizes)?;
                Ok(Alarm::Measured { sizes, known: None, bell: Arc::new(bell), canary: None })
            }
        })?
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Alarm::Announced { monitor, .. } => monitor.as_fd(),
            Alarm::Measured { bell, .. } => bell.as_fd(),
        }
    }

    /// Runs scripts of our own, which shall not raise the alarm. `work` returns the process ids of what
    /// it ran.
    pub(crate) fn during<T>(
        &mut self,
        operations: usize,
        blocks: u32,
        work: impl FnOnce(&mut Vec<u32>) -> T,
    ) -> Result<T, IptablesError> {
        let mut pids = Vec::new();
        match self {
            Alarm::Announced { monitor, nft, suspicious } => {
                // What came before we did anything is not ours.
                *suspicious |= read(monitor, &[])?;
                if operations <= ANNOUNCED_OPERATIONS {
                    let result = work(&mut pids);
                    *suspicious |= read(monitor, &pids)?;
                    return Ok(result);
                }
                let before = nft.generation().map_err(IptablesError::Watch)?;
                monitor.pause().map_err(IptablesError::Watch)?;
                let result = work(&mut pids);
                monitor.resume().map_err(IptablesError::Watch)?;
                let after = nft.generation().map_err(IptablesError::Watch)?;
                *suspicious |= after != before.wrapping_add(blocks);
                Ok(result)
            }
            Alarm::Measured { sizes, known, bell, canary } => {
                // Ends the thread, so that it does not take our change for somebody else's.
                *canary = None;
                let before = sizes.read().map_err(IptablesError::Sizes)?;
                if known.as_ref().is_some_and(|known| *known != before) {
                    bell.write(1).map_err(IptablesError::Alarm)?;
                }
                let result = work(&mut pids);
                let now = sizes.read().map_err(IptablesError::Sizes)?;
                *canary = Some(Canary::start(sizes.clone(), now.clone(), Arc::clone(bell)));
                *known = Some(now);
                Ok(result)
            }
        }
    }

    /// What happened until now is known: the rules are about to be read.
    pub(crate) fn acknowledge(&mut self) -> Result<(), IptablesError> {
        self.read()?;
        if let Alarm::Measured { sizes, known, canary, .. } = self {
            *canary = None;
            *known = Some(sizes.read().map_err(IptablesError::Sizes)?);
        }
        Ok(())
    }

    /// True when our rules may have been changed by others since the last call.
    pub(crate) fn read(&mut self) -> Result<bool, IptablesError> {
        match self {
            Alarm::Announced { monitor, suspicious, .. } => {
                let seen = read(monitor, &[])?;
                Ok(std::mem::take(suspicious) || seen)
            }
            Alarm::Measured { sizes, known, bell, .. } => {
                let rang = match bell.read() {
                    Ok(_) => true,
                    Err(nix::errno::Errno::EAGAIN) => false,
                    Err(error) => return Err(IptablesError::Alarm(error)),
                };
                let now = sizes.read().map_err(IptablesError::Sizes)?;
                Ok(rang || known.as_ref().is_some_and(|known| *known != now))
            }
        }
    }
}

fn read(monitor: &mut Monitor, own: &[u32]) -> Result<bool, IptablesError> {
    let seen = monitor.read_each(|announcement| concerns_us(announcement, own));
    Ok(seen.map_err(IptablesError::Watch)?.table_changed)
}

/// Others may do what they like in their chains, and add rules to built-in ones.
fn concerns_us(announcement: &Announcement<'_>, own: &[u32]) -> bool {
    const IPV4: u8 = 2;
    const IPV6: u8 = 10;
    if !matches!(announcement.family, IPV4 | IPV6) || own.contains(&announcement.port) {
        return false;
    }
    let Some(table) = Table::parse(announcement.table) else { return false };
    match announcement.chain {
        Some(chain) if chain.starts_with(PREFIX) => true,
        Some(chain) => {
            announcement.removed && HOOKS.iter().any(|(of, hook, _)| (*of, *hook) == (table, chain))
        }
        None => announcement.removed,
    }
}

/// A thread that rings the bell when the size of a table changes.
#[derive(Debug)]
pub(crate) struct Canary {
    stop: Arc<EventFd>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Canary {
    fn start(sizes: Sizes, known: TableSizes, bell: Arc<EventFd>) -> Canary {
        let stop = match EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC) {
            Ok(stop) => Arc::new(stop),
            Err(error) => {
                tracing::warn!(%error, "Cannot watch the rules: foreign changes stay unnoticed");
                return Canary { stop: bell, thread: None };
            }
        };
        let stopped = Arc::clone(&stop);
        let watch = move || {
            let mut waiting = [PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
            while matches!(poll(&mut waiting, PollTimeout::from(PERIOD)), Ok(0)) {
                if sizes.read().is_ok_and(|now| now != known) {
                    if let Err(error) = bell.write(1) {
                        tracing::warn!(%error, "Cannot tell that the rules were changed");
                    }
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("rule-canary".to_owned()).spawn(watch);
        if let Err(error) = &thread {
            tracing::warn!(%error, "Cannot watch the rules: foreign changes stay unnoticed");
        }
        Canary { stop, thread: thread.ok() }
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if self.stop.write(1).is_ok() && thread.join().is_err() {
            tracing::warn!("The thread that watches the rules panicked");
        }
    }
}
