//! rtnetlink: links, addresses, routes and neighbours of one network namespace.
//!
//! Calls that make something are idempotent where their name says `ensure`; deleting what is not there is a success and
//! answers `false`. Requests can also be built as [`Message`]s and sent together with [`Rtnl::perform_all`], which costs
//! one round trip for all of them.

mod address;
mod classifier;
mod event;
mod link;
mod neighbour;
mod removal;
mod rule;
mod table;

use std::time::Duration;

pub use address::{Address, address_message};
pub use classifier::{Classifier, Direction};
pub use event::{Event, Group, Monitor};
pub use link::{
    InetSetting, Link, LinkChange, LinkRef, Mac, VethEnd, VethPair, link_change_message,
    veth_message,
};
pub use neighbour::{Neighbour, neighbour_message};
pub use rule::{RoutingRule, RuleAction};
pub use table::{Route, RouteKind, Scope, new_route_message, route_message};

use crate::message::Message;
use crate::netns::{Netns, NetnsError};
use crate::socket::{NetlinkError, Protocol, Socket};

/// An rtnetlink socket of one network namespace.
#[derive(Debug)]
pub struct Rtnl {
    socket: Socket,
    /// The namespace if it is not the one of the thread that uses this.
    home: Option<Netns>,
}

/// Why a namespace's rtnetlink could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The socket could not be made.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

impl Rtnl {
    /// A socket in the calling thread's namespace.
    ///
    /// # Errors
    /// When no socket can be made.
    pub fn open() -> Result<Self, NetlinkError> {
        let mut socket = Socket::open(Protocol::Route)?;
        socket.set_strict()?;
        Ok(Self { socket, home: None })
    }

    /// A socket in `netns`; the calling thread stays where it is.
    ///
    /// # Errors
    /// When the namespace cannot be entered or no socket can be made.
    pub fn open_in(netns: &Netns) -> Result<Self, OpenError> {
        let rtnl = netns.run(Self::open)??;
        Ok(Self { home: Some(netns.try_clone()?), ..rtnl })
    }

    /// Sends one request and waits for the answer.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn perform(&mut self, message: Message) -> Result<(), NetlinkError> {
        self.socket.request(message)
    }

    /// Sends requests back to back. All are tried; see [`Socket::request_all`].
    ///
    /// # Errors
    /// The first refusal, with its position.
    pub fn perform_all(&mut self, messages: Vec<Message>) -> Result<(), NetlinkError> {
        self.socket.request_all(messages)
    }

    /// Waits until `probe` finds what it looks for, asking again after each event of `groups`.
    /// `None` when it did not appear in time.
    ///
    /// # Errors
    /// The probe's error, or a failing socket.
    pub fn wait_for<T>(
        &mut self,
        groups: &[Group],
        timeout: Duration,
        mut probe: impl FnMut(&mut Self) -> Result<Option<T>, NetlinkError>,
    ) -> Result<Option<T>, OpenError> {
        // Subscribe before the first look, or a change between the two would be missed.
        let mut monitor = match &self.home {
            Some(netns) => netns.run(|| Monitor::open(groups))??,
            None => Monitor::open(groups)?,
        };
        let deadline = std::time::Instant::now() + timeout;
        loop {
            if let Some(found) = probe(self)? {
                return Ok(Some(found));
            }
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() || !monitor.wait(left)? {
                return Ok(probe(self)?);
            }
        }
    }
}

/// Turns "not there" into `false`.
fn existed(result: Result<(), NetlinkError>) -> Result<bool, NetlinkError> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.is_absent() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Turns "exists already" into `false`.
fn created(result: Result<(), NetlinkError>) -> Result<bool, NetlinkError> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.is_exists() => Ok(false),
        Err(error) => Err(error),
    }
}

/// An address's bytes and family.
fn octets(address: std::net::IpAddr) -> (u8, Vec<u8>) {
    match address {
        std::net::IpAddr::V4(v4) => (AF_INET, v4.octets().to_vec()),
        std::net::IpAddr::V6(v6) => (AF_INET6, v6.octets().to_vec()),
    }
}

fn ip(bytes: &[u8]) -> Option<std::net::IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(Into::into)
}

/// Family numbers as the one byte that netlink headers hold.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The family of an address.
fn family(address: std::net::IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}
