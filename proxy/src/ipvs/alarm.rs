//! Wakes the engine: IPVS tells of no change, so a clock says when to look. Tables, routing rules and addresses are
//! announced.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use keelson_netlink::route::{Group, Monitor};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::IpvsError;

/// How often to look.
const PERIOD: Duration = Duration::from_secs(1);

/// One file descriptor for everything that may mean a change.
pub(crate) struct Alarm {
    all: Epoll,
    routing: Monitor,
    clock: TimerFd,
    ticks: bool,
}

impl Alarm {
    /// Listens in the calling thread's namespace, and to `others`.
    pub(crate) fn open(others: &[BorrowedFd<'_>]) -> Result<Alarm, IpvsError> {
        let all = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(IpvsError::Alarm)?;
        let groups = [Group::Ipv4Address, Group::Ipv6Address, Group::Ipv4Rule, Group::Ipv6Rule];
        let routing = Monitor::open(&groups).map_err(IpvsError::Routing)?;
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let clock = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(IpvsError::Alarm)?;
        for source in others.iter().copied().chain([routing.as_fd(), clock.as_fd()]) {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
            all.add(source, event).map_err(IpvsError::Alarm)?;
        }
        Ok(Alarm { all, routing, clock, ticks: false })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.all.0.as_fd()
    }

    /// From now on it rings regularly, or not any more.
    pub(crate) fn set_clock(&mut self, wanted: bool) -> Result<(), IpvsError> {
        if wanted != self.ticks {
            let again = Expiration::Interval(TimeSpec::from_duration(PERIOD));
            let set = match wanted {
                true => self.clock.set(again, TimerSetTimeFlags::empty()),
                false => self.clock.unset(),
            };
            set.map_err(IpvsError::Alarm)?;
            self.ticks = wanted;
        }
        Ok(())
    }

    /// Silences the clock.
    pub(crate) fn acknowledge(&self) -> Result<(), IpvsError> {
        match self.clock.wait() {
            Ok(()) | Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(error) => Err(IpvsError::Alarm(error)),
        }
    }

    /// True when addresses or routing rules may have changed since the last call.
    pub(crate) fn routing_changed(&mut self) -> Result<bool, IpvsError> {
        self.routing.drain().map_err(IpvsError::Routing)
    }
}
