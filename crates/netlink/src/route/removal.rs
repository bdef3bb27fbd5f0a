//! Deleting a link without waiting for the memory that it leaves behind.
//!
//! A request to delete a link takes some 20 ms, but the link is gone after less than one: names, addresses and routes have
//! ended and everybody has been told. For the rest of the time the kernel waits until no CPU can still look at the old
//! structures (`netdev_run_todo` in net/core/dev.c, `rcu_barrier`). Another process does that waiting here; nothing that
//! it still does depends on its life, because a request that has been sent is carried out to its end.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, RawFd};

use libc::RTM_DELLINK;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::ForkResult;

use super::link::header;
use super::{Event, Group, Monitor, OpenError, Rtnl};
use crate::message::Message;
use crate::socket::{NLM_F_REQUEST, NetlinkError, Protocol, Socket};

impl Rtnl {
    /// Deletes a link (a veth takes its other end along) and returns as soon as it is gone. Answers whether it was there.
    ///
    /// Leaves a child behind for some 20 ms, which keeps nothing open: for programs that end soon. In others it stays a
    /// zombie until somebody waits for it; [`Rtnl::delete_link`] has no child.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn delete_link_at_once(&mut self, index: u32) -> Result<bool, OpenError> {
        // Subscribed before the request, or the announcement would be missed.
        let (mut monitor, requests) = match &self.home {
            Some(netns) => netns.run(sockets)??,
            None => sockets()?,
        };
        let message = Message::new(RTM_DELLINK, 0, &header(index, 0, 0)).finish(1, NLM_F_REQUEST);
        let gone = match hand_over(&requests, &message) {
            Ok(child_ended) => announced(&mut monitor, &child_ended, index)?,
            // No process to be had: do it here.
            Err(_) => false,
        };
        // A child that ended before the announcement was killed or refused: the answer here says which.
        if gone { Ok(true) } else { Ok(self.delete_link(index)?) }
    }
}

fn sockets() -> Result<(Monitor, Socket), NetlinkError> {
    Ok((Monitor::open(&[Group::Link])?, Socket::open(Protocol::Route)?))
}

/// Starts a child that sends `message` over `requests` and ends. The pipe closes when it has.
#[allow(
    unsafe_code,
    reason = "fork(2): a thread would keep the whole process until the kernel is done"
)]
fn hand_over(requests: &Socket, message: &[u8]) -> io::Result<PipeReader> {
    let (reader, writer) = io::pipe()?;
    let socket = requests.as_fd().as_raw_fd();
    // SAFETY: the child makes nothing but system calls, all of them safe in a child of a process with threads.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { .. } => Ok(reader),
        ForkResult::Child => send_and_end(socket, &writer, message),
    }
}

/// In the child: lets go of everything but the socket and the pipe first. Whoever reads our output waits for its end,
/// and a lock file that is open here stays locked.
#[allow(unsafe_code, reason = "system calls without memory of their own, as a forked child must")]
fn send_and_end(socket: RawFd, writer: &PipeWriter, message: &[u8]) -> ! {
    // SAFETY: the numbers are descriptors of this process that nothing uses afterwards; `message` outlives the call.
    unsafe {
        // Above both, so that neither overwrites the other.
        let socket = libc::fcntl(socket, libc::F_DUPFD, 16);
        let writer = libc::fcntl(writer.as_raw_fd(), libc::F_DUPFD, 16);
        libc::dup2(socket, 0);
        libc::dup2(writer, 1);
        libc::syscall(libc::SYS_close_range, 2, libc::c_uint::MAX, 0);
        libc::send(0, message.as_ptr().cast(), message.len(), 0);
        libc::_exit(0)
    }
}

/// Waits until the link's end is announced (true) or the child has ended without that.
fn announced(
    monitor: &mut Monitor,
    child_ended: &PipeReader,
    index: u32,
) -> Result<bool, NetlinkError> {
    loop {
        let mut polled = [
            PollFd::new(monitor.as_fd(), PollFlags::POLLIN),
            PollFd::new(child_ended.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(NetlinkError::Socket { step: "wait for", source: errno.into() });
            }
        }
        let told = |polled: &PollFd<'_>| polled.revents().is_some_and(|events| !events.is_empty());
        let (event, ended) = (told(&polled[0]), told(&polled[1]));
        if !event {
            if ended {
                return Ok(false);
            }
            continue;
        }
        match monitor.events(None) {
            Ok(events) if events.iter().any(|event| is_end_of(event, index)) => return Ok(true),
            Ok(_) => {}
            // The announcement may be among what was lost; asking again is harmless.
            Err(NetlinkError::Overrun) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

fn is_end_of(event: &Event, index: u32) -> bool {
    matches!(event, Event::Link { link, present: false } if link.index == index)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test")]
mod tests {
    use super::super::{VethEnd, VethPair};
    use super::*;
    use crate::netns::Netns;

    #[test]
    fn a_deleted_link_is_gone_on_return_and_a_second_time_was_not_there() {
        // Needs root.
        let Ok(netns) = Netns::anonymous() else { return };
        netns
            .run(|| {
                let mut rtnl = Rtnl::open().unwrap();
                let end = |name| VethEnd { name, mac: None, netns: None };
                for _ in 0..20 {
                    let pair = VethPair { near: end("near"), far: end("far"), mtu: None };
                    rtnl.create_veth(&pair).unwrap();
                    let index = rtnl.link("near").unwrap().unwrap().index;
                    assert!(rtnl.delete_link_at_once(index).unwrap());
                    assert!(rtnl.link("near").unwrap().is_none());
                    assert!(rtnl.link("far").unwrap().is_none());
                    assert!(!rtnl.delete_link_at_once(index).unwrap());
                }
            })
            .unwrap();
    }
}
