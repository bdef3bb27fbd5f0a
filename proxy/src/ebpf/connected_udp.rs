//! Connected UDP sockets whose endpoint is gone.
//!
//! The socket layer chooses an endpoint when a socket connects, and the kernel asks nobody again: such a
//! socket would speak to a dead address for ever. It is ended, so that its program connects anew. The map
//! `connected_udp` holds what went through a Service, so sockets that were connected to the pod's address
//! itself stay as they are; and it is cheap to look at: namespaces are gone through only when there is
//! something to end.

use std::collections::HashMap;
use std::net::SocketAddr;

use keelson_ebpf_abi::{Address, Endpoint, MemberKey, Peer};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::OpenError;
use keelson_netlink::sock_diag::{SockDiag, UdpSocket};
use keelson_netlink::socket::NetlinkError;

/// Why the sockets of a namespace could not be ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndError {
    #[error("cannot look for sockets in the network namespace {namespace}")]
    Open {
        namespace: String,
        #[source]
        source: OpenError,
    },
    #[error("cannot list the UDP sockets of the network namespace {namespace}")]
    List {
        namespace: String,
        #[source]
        source: NetlinkError,
    },
    #[error("cannot end the UDP socket {local} of the network namespace {namespace}")]
    End {
        local: SocketAddr,
        namespace: String,
        #[source]
        source: NetlinkError,
    },
}

/// Sockets that rest on a membership that there is no more, by their cookie.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Orphans(HashMap<u64, Peer>);

/// What became of orphans.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    /// Those that were found and ended.
    pub(crate) count: usize,
    /// What is to be [`Peer::ended`] in `connected_udp` if it is still that: a socket may be connected
    /// again meanwhile.
    pub(crate) settled: Vec<(u64, Peer)>,
    pub(crate) troubles: Vec<EndError>,
}

impl Orphans {
    /// Out of all entries of `connected_udp`.
    pub(crate) fn among(
        connected: impl IntoIterator<Item = (u64, Peer)>,
        is_member: impl Fn(&MemberKey) -> bool,
    ) -> Self {
        let is_orphan = |peer: &Peer| peer.pool != 0 && !is_member(&peer.rests_on());
        Orphans(connected.into_iter().filter(|(_, peer)| is_orphan(peer)).collect())
    }

    /// Looks for them in one namespace after the other until all are found.
    pub(crate) fn end(mut self, namespaces: impl IntoIterator<Item = Netns>) -> Ended {
        let mut ended = Ended::default();
        let mut namespaces = namespaces.into_iter();
        while !self.0.is_empty()
            && let Some(netns) = namespaces.next()
        {
            if let Err(trouble) = self.end_in(&netns, &mut ended) {
                ended.troubles.push(trouble);
            }
        }
        if ended.troubles.is_empty() {
            // Not to be found anywhere: closed while nobody kept book, or disconnected.
            ended.settled.extend(self.0);
        }
        ended
    }

    fn end_in(&mut self, netns: &Netns, ended: &mut Ended) -> Result<(), EndError> {
        let namespace = || netns.path().display().to_string();
        let mut kernel = SockDiag::open_in(netns)
            .map_err(|source| EndError::Open { namespace: namespace(), source })?;
        let sockets = kernel
            .connected_udp()
            .map_err(|source| EndError::List { namespace: namespace(), source })?;
        for socket in sockets {
            let Some(peer) = self.take(&socket) else { continue };
            let was_there = kernel.end(&socket).map_err(|source| {
                let local = socket.local;
                EndError::End { local, namespace: namespace(), source }
            })?;
            ended.count += usize::from(was_there);
            ended.settled.push((socket.cookie, peer));
        }
        Ok(())
    }

    /// An orphan that is still connected to the endpoint that it lost.
    fn take(&mut self, socket: &UdpSocket) -> Option<Peer> {
        let peer = self.0.get(&socket.cookie)?;
        if !is_at(socket.remote, &peer.endpoint) {
            return None;
        }
        self.0.remove(&socket.cookie)
    }
}

fn is_at(remote: SocketAddr, endpoint: &Endpoint) -> bool {
    Address::from(remote.ip().to_canonical()) == endpoint.address
        && remote.port().to_be() == endpoint.port_be
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(endpoint: &str) -> Peer {
        let at: SocketAddr = endpoint.parse().unwrap();
        let (address, port_be) = (at.ip().into(), at.port().to_be());
        Peer { pool: 7, endpoint: Endpoint { address, port_be, flags: 0 }, ..Peer::default() }
    }

    #[test]
    fn who_lost_its_endpoint_is_an_orphan() {
        let (gone, there) = (peer("10.66.0.2:53"), peer("10.66.0.3:53"));
        let connected = [(1, gone), (2, there), (3, gone)];
        let orphans = Orphans::among(connected, |member| *member == there.rests_on());
        assert_eq!(orphans, Orphans([(1, gone), (3, gone)].into()));
    }

    #[test]
    fn who_was_ended_is_none_any_more() {
        let gone = peer("10.66.0.2:53").ended();
        assert_eq!(Orphans::among([(1, gone)], |_| false), Orphans::default());
    }

    #[test]
    fn the_same_endpoint_of_another_pool_is_another_membership() {
        let mine = peer("10.66.0.2:53");
        let other = MemberKey { pool: 8, ..mine.rests_on() };
        assert_ne!(Orphans::among([(1, mine)], |member| *member == other), Orphans::default());
    }

    #[test]
    fn ipv6_sockets_that_speak_ipv4_are_compared_as_such() {
        let check =
            |remote: &str, endpoint| is_at(remote.parse().unwrap(), &peer(endpoint).endpoint);
        assert!(check("10.66.0.2:53", "10.66.0.2:53"));
        assert!(check("[::ffff:10.66.0.2]:53", "10.66.0.2:53"));
        assert!(check("[fd00::2]:53", "[fd00::2]:53"));
        assert!(!check("10.66.0.2:54", "10.66.0.2:53"));
        assert!(!check("10.66.0.3:53", "10.66.0.2:53"));
    }

    #[test]
    fn nothing_to_end_looks_nowhere() {
        let mut looked = 0;
        let namespaces = std::iter::from_fn(|| {
            looked += 1;
            None
        });
        let ended = Orphans::default().end(namespaces);
        assert_eq!((ended.count, ended.settled, looked), (0, vec![], 0));
    }

    #[test]
    fn who_is_nowhere_is_settled() {
        let gone = peer("10.66.0.2:53");
        let ended = Orphans::among([(1, gone)], |_| false).end([]);
        assert_eq!((ended.count, ended.settled), (0, vec![(1, gone)]));
    }
}
