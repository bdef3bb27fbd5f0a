//! Wakes the engine: IPVS tells of no change, so a clock says when to look. Tables, routing rules and addresses are
//! announced.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use keelson_netlink::route::{Group, Monitor};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::IpvsError;

/// How often to look, in milliseconds.
const PERIOD: u16 = 1000;

/// One file descriptor for everything that may mean a change.
pub(crate) struct Alarm {
    all: Epoll,
    routing: Monitor,
    bell: Arc<EventFd>,
    clock: Option<Clock>,
}

impl Alarm {
    /// Listens in the calling thread's namespace, and to `others`.
    pub(crate) fn open(others: &[BorrowedFd<'_>]) -> Result<Alarm, IpvsError> {
        let all = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(IpvsError::Alarm)?;
        let groups = [Group::Ipv4Address, Group::Ipv6Address, Group::Ipv4Rule, Group::Ipv6Rule];
        let routing = Monitor::open(&groups).map_err(IpvsError::Routing)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = Arc::new(EventFd::from_value_and_flags(0, flags).map_err(IpvsError::Alarm)?);
        for source in others.iter().copied().chain([routing.as_fd(), bell.as_fd()]) {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
            all.add(source, event).map_err(IpvsError::Alarm)?;
        }
        Ok(Alarm { all, routing, bell, clock: None })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.all.0.as_fd()
    }

    /// From now on it rings regularly, or not any more.
    pub(crate) fn set_clock(&mut self, wanted: bool) {
        match (wanted, &self.clock) {
            (true, None) => self.clock = Clock::start(Arc::clone(&self.bell)),
            (false, Some(_)) => self.clock = None,
            _ => {}
        }
    }

    /// Silences the bell.
    pub(crate) fn acknowledge(&self) -> Result<(), IpvsError> {
        match self.bell.read() {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(error) => Err(IpvsError::Alarm(error)),
        }
    }

    /// True when addresses or routing rules may have changed since the last call.
    pub(crate) fn routing_changed(&mut self) -> Result<bool, IpvsError> {
        let mut changed = false;
        while is_readable(self.routing.as_fd())? {
            changed = true;
            match self.routing.events(Some(Duration::ZERO)) {
                // Lost ones count as seen: what there is is read anew anyhow.
                Ok(_) | Err(keelson_netlink::socket::NetlinkError::Overrun) => {}
                Err(error) => return Err(IpvsError::Routing(error)),
            }
        }
        Ok(changed)
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> Result<bool, IpvsError> {
    let mut waiting = [PollFd::new(fd, PollFlags::POLLIN)];
    match poll(&mut waiting, PollTimeout::ZERO) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(IpvsError::Alarm(error)),
    }
}

/// A thread that rings the bell again and again, until dropped.
struct Clock {
    stop: Arc<EventFd>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Clock {
    fn start(bell: Arc<EventFd>) -> Option<Clock> {
        let unnoticed = "Cannot look at IPVS regularly: foreign changes stay unnoticed";
        let stop = match EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC) {
            Ok(stop) => Arc::new(stop),
            Err(error) => {
                tracing::warn!(%error, unnoticed);
                return None;
            }
        };
        let stopped = Arc::clone(&stop);
        let tick = move || {
            let mut waiting = [PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
            while matches!(poll(&mut waiting, PollTimeout::from(PERIOD)), Ok(0) | Err(Errno::EINTR))
            {
                if let Err(error) = bell.write(1) {
                    tracing::debug!(%error, "Cannot ring");
                }
            }
        };
        let thread = std::thread::Builder::new().name("proxy-ipvs-clock".to_owned()).spawn(tick);
        match thread {
            Ok(thread) => Some(Clock { stop, thread: Some(thread) }),
            Err(error) => {
                tracing::warn!(%error, unnoticed);
                None
            }
        }
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if self.stop.write(1).is_ok() && thread.join().is_err() {
            tracing::warn!("The clock of the IPVS mode panicked");
        }
    }
}
