//! IPVS: virtual servers of this network namespace and the real servers behind them.
//!
//! IPVS announces nothing and keeps no private bytes for anybody; but a virtual server without persistence has a timeout
//! that means nothing and that the kernel gives back, so a caller can mark its own (see [`Virtual::mark`]).

mod error;
pub(crate) mod wire;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::socket::{Protocol, Socket};

pub use error::IpvsError;
pub use wire::Command;

/// What a virtual server is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Where clients send to.
    pub address: IpAddr,
    /// Transport protocol number.
    pub protocol: u8,
    /// Port.
    pub port: u16,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = match self.protocol {
            6 => "tcp",
            17 => "udp",
            132 => "sctp",
            _ => "protocol",
        };
        write!(f, "{}/{protocol}", SocketAddr::new(self.address, self.port))
    }
}

/// A virtual server. Those that are known by a packet mark are none of our business.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Virtual {
    /// Address, protocol and port.
    pub key: Key,
    /// Who chooses among the real servers: `rr`, `wlc`, ...
    pub scheduler: String,
    /// Clients stick to their real server: then `mark` is for how many seconds.
    pub persistent: bool,
    /// A number of the caller's, of at most 16 bits: the kernel counts it in ticks, which must not overflow.
    pub mark: u32,
}

/// A real server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Real {
    /// Where packets are sent to.
    pub at: SocketAddr,
    /// Its share; with 0 it gets no new connections and keeps those that it has.
    pub weight: u32,
}

/// A real server as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RealFound {
    /// Address and weight.
    pub real: Real,
    /// Packets are translated: no tunnel, no direct routing.
    pub translated: bool,
    /// Connections: established ones and all others that are remembered.
    pub connections: u64,
}

/// How long silent connections are remembered, in seconds; 0 leaves one as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// Established TCP connections.
    pub tcp: u32,
    /// TCP connections of which one side has closed.
    pub tcp_fin: u32,
    /// UDP flows.
    pub udp: u32,
}

/// A connection to the IPVS of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Ipvs {
    socket: Socket,
    family: u16,
}

impl Ipvs {
    /// Connects. The kernel loads the module ip_vs if it has it.
    ///
    /// # Errors
    /// [`IpvsError::Absent`] when it has none.
    pub fn open() -> Result<Self, IpvsError> {
        let mut socket = Socket::open(Protocol::Generic).map_err(IpvsError::Open)?;
        let family = crate::genl::family(&mut socket, wire::FAMILY).map_err(IpvsError::Open)?;
        let family = family.ok_or(IpvsError::Absent)?;
        Ok(Self { socket, family })
    }

    /// Whether the kernel has IPVS without loading it for that.
    #[must_use]
    pub fn is_loaded() -> bool {
        std::path::Path::new("/proc/thread-self/net/ip_vs").exists()
    }

    /// All virtual servers that are known by address.
    ///
    /// The kernel goes on from part to part by position, counting those of all namespaces, and says nothing when they
    /// move meanwhile: so it is asked until two answers are alike. Where others never rest one may still be missed,
    /// which [`Ipvs::find`] never does.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn virtuals(&mut self) -> Result<Vec<Virtual>, IpvsError> {
        const ATTEMPTS: usize = 5;
        let mut found = self.list_once()?;
        for _ in 1..ATTEMPTS {
            let again = self.list_once()?;
            if again == found {
                break;
            }
            found = again;
        }
        Ok(found.into_values().collect())
    }

    fn list_once(&mut self) -> Result<BTreeMap<Key, Virtual>, IpvsError> {
        let refused = |source| IpvsError::refused("list virtual servers".to_owned(), source);
        let replies = self.socket.dump(&wire::list_virtuals(self.family)).map_err(refused)?;
        let found = replies.iter().filter_map(wire::read_virtual);
        Ok(found.map(|found| (found.key, found)).collect())
    }

    /// One virtual server.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn find(&mut self, key: Key) -> Result<Option<Virtual>, IpvsError> {
        match self.socket.ask(wire::ask_virtual(self.family, key)) {
            Ok(reply) => Ok(wire::read_virtual(&reply)),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(IpvsError::refused(format!("show virtual server {key}"), error)),
        }
    }

    /// The real servers of a virtual one; none when there is no such virtual server.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn reals(&mut self, key: Key) -> Result<Vec<RealFound>, IpvsError> {
        let refused =
            |source| IpvsError::refused(format!("list the real servers of {key}"), source);
        let replies = self.socket.dump(&wire::list_reals(self.family, key)).map_err(refused)?;
        Ok(replies.iter().filter_map(|reply| wire::read_real(reply, key)).collect())
    }

    /// Carries out commands, one after the other. All are tried; the first refusal comes back.
    ///
    /// # Errors
    /// The first refusal, with what was asked for.
    pub fn perform(&mut self, commands: &[Command]) -> Result<(), IpvsError> {
        let messages = commands.iter().map(|command| command.message(self.family)).collect();
        self.socket.request_all(messages).map_err(|source| {
            let index = match &source {
                crate::socket::NetlinkError::Refused { index, .. } => *index,
                _ => 0,
            };
            let action = commands.get(index).map_or_else(String::new, Command::to_string);
            IpvsError::refused(action, source)
        })
    }
}
