//! Notifications about changes of links, addresses, routes and neighbours.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use libc::{RTM_DELADDR, RTM_DELNEIGH, RTM_DELROUTE, RTM_NEWADDR, RTM_NEWNEIGH, RTM_NEWROUTE};

use super::{Address, Link, Neighbour, Route};
use crate::message::{Replies, Reply};
use crate::socket::{NetlinkError, Protocol, Socket};

/// What to be told about (`RTNLGRP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Group {
    /// Links appear, change, go.
    Link = 1,
    /// Neighbours.
    Neighbour = 3,
    /// IPv4 addresses.
    Ipv4Address = 5,
    /// IPv4 routes.
    Ipv4Route = 7,
    /// IPv4 routing rules; they come as no [`Event`] of their own.
    Ipv4Rule = 8,
    /// IPv6 addresses.
    Ipv6Address = 9,
    /// IPv6 routes.
    Ipv6Route = 11,
    /// IPv6 routing rules; they come as no [`Event`] of their own.
    Ipv6Rule = 19,
}

/// A change; `present` is false when the thing went away.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the thing and whether it is there now")]
pub enum Event {
    Link { link: Link, present: bool },
    Address { address: Address, present: bool },
    Route { route: Route, present: bool },
    Neighbour { neighbour: Neighbour, present: bool },
}

impl Event {
    pub(crate) fn parse(reply: &Reply<'_>) -> Option<Self> {
        if let Some((link, present)) = Link::from_event(reply) {
            return Some(Self::Link { link, present });
        }
        match reply.kind {
            RTM_NEWADDR | RTM_DELADDR => Some(Self::Address {
                address: Address::parse(reply)?,
                present: reply.kind == RTM_NEWADDR,
            }),
            RTM_NEWROUTE | RTM_DELROUTE => Some(Self::Route {
                route: Route::parse(reply)?,
                present: reply.kind == RTM_NEWROUTE,
            }),
            RTM_NEWNEIGH | RTM_DELNEIGH => Some(Self::Neighbour {
                neighbour: Neighbour::parse(reply)?,
                present: reply.kind == RTM_NEWNEIGH,
            }),
            _ => None,
        }
    }
}

/// A subscription in the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
}

impl Monitor {
    /// Subscribes.
    ///
    /// # Errors
    /// When no socket can be made.
    pub fn open(groups: &[Group]) -> Result<Self, NetlinkError> {
        let mut socket = Socket::open(Protocol::Route)?;
        for group in groups {
            socket.join(*group as u32)?;
        }
        Ok(Self { socket })
    }

    /// The next events, or none when `timeout` passed (`None` waits for ever).
    ///
    /// # Errors
    /// [`NetlinkError::Overrun`] when events were lost: read the tables again and go on.
    pub fn events(&mut self, timeout: Option<Duration>) -> Result<Vec<Event>, NetlinkError> {
        // A timeout of zero would mean for ever to the kernel.
        self.socket.set_timeout(timeout.map(|t| t.max(Duration::from_millis(1))))?;
        match self.socket.receive_bytes() {
            Ok(bytes) => Ok(Replies::new(bytes).filter_map(|reply| Event::parse(&reply)).collect()),
            Err(NetlinkError::Socket { source, .. })
                if source.kind() == io::ErrorKind::WouldBlock =>
            {
                Ok(Vec::new())
            }
            Err(error) => Err(error),
        }
    }

    /// Takes everything that was told until now, without waiting; true when there was anything. Lost events count as
    /// told: for who reads the tables anew anyhow.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn drain(&mut self) -> Result<bool, NetlinkError> {
        let mut told = false;
        loop {
            match self.socket.receive_waiting_bytes() {
                Ok(_) | Err(NetlinkError::Overrun) => told = true,
                Err(NetlinkError::Socket { source, .. })
                    if source.kind() == io::ErrorKind::WouldBlock =>
                {
                    return Ok(told);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether anything happened within `timeout`; lost events count as something.
    pub(super) fn wait(&mut self, timeout: Duration) -> Result<bool, NetlinkError> {
        match self.events(Some(timeout)) {
            Ok(events) => Ok(!events.is_empty()),
            Err(NetlinkError::Overrun) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
