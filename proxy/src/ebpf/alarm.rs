//! Wakes the engine: when interfaces, addresses, exempt namespaces or (if they matter) routes changed, and now and then,
//! since nobody tells when a link is removed.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use keelson_netlink::route::{Group, Monitor};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::EbpfError;
use super::config::EbpfConfig;
use super::exempt::Exempt;

/// Damage is noticed within that time.
const PERIOD: Duration = Duration::from_secs(1);

/// The clock that programs read, too.
pub(crate) fn monotonic_ns() -> Result<u64, EbpfError> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    let now = Duration::from(now.map_err(EbpfError::Alarm)?);
    Ok(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// One file descriptor for all of them.
pub(crate) struct Alarm {
    all: Epoll,
    monitor: Monitor,
    clock: TimerFd,
}

impl Alarm {
    /// Listens in the calling thread's network namespace.
    pub(crate) fn open(config: &EbpfConfig) -> Result<Alarm, EbpfError> {
        let mut groups = vec![Group::Link, Group::Ipv4Address, Group::Ipv6Address];
        if config.goes_by_routes() {
            groups.extend([Group::Ipv4Route, Group::Ipv6Route]);
        }
        let monitor = Monitor::open(&groups).map_err(EbpfError::Watch)?;
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let clock = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(EbpfError::Alarm)?;
        let all = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(EbpfError::Alarm)?;
        for source in [monitor.as_fd(), clock.as_fd()] {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
            all.add(source, event).map_err(EbpfError::Alarm)?;
        }
        Ok(Alarm { all, monitor, clock })
    }

    /// From now on it also rings regularly.
    pub(crate) fn start_clock(&self) -> Result<(), EbpfError> {
        let again = Expiration::Interval(TimeSpec::from_duration(PERIOD));
        self.clock.set(again, TimerSetTimeFlags::empty()).map_err(EbpfError::Alarm)
    }

    /// From now on it also rings when somebody changes the folder.
    pub(crate) fn follow(&self, exempt: &mut Exempt) -> Result<(), EbpfError> {
        let Some(changes) = exempt.open().map_err(EbpfError::Alarm)? else { return Ok(()) };
        let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        self.all.add(changes, event).map_err(EbpfError::Alarm)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.all.0.as_fd()
    }

    /// Silences it; true when interfaces, addresses or routes may have changed since the last call.
    pub(crate) fn acknowledge(&mut self) -> Result<bool, EbpfError> {
        match self.clock.wait() {
            Ok(()) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return Err(EbpfError::Alarm(error)),
        }
        self.monitor.drain().map_err(EbpfError::Watch)
    }
}
