//! Which connections are open, and which gives way when there are too many.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// How many connections a server holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections whose caller is not known yet.
    pub pending: usize,
    /// Of these, connections of one peer: an IPv4 address, or the /64 of an IPv6 address.
    pub pending_of_peer: usize,
    /// Connections of callers that are known.
    pub established: usize,
}

/// There are as many established connections as the server may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server has all the {0} connections that it may have")]
pub struct Full(usize);

/// The place of one connection among those of its server. It is free again when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Slot(Arc<Place>);

#[derive(Debug)]
struct Place {
    pool: Pool,
    number: u64,
    evicted: CancellationToken,
}

#[derive(Debug, Clone)]
pub(crate) struct Pool {
    limits: Limits,
    open: Arc<Mutex<Open>>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// By number, so that the first is the oldest.
    pending: BTreeMap<u64, (IpAddr, CancellationToken)>,
    of_peer: HashMap<IpAddr, BTreeSet<u64>>,
    established: BTreeSet<u64>,
}

impl Pool {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, open: Arc::default() }
    }

    /// A place for a new connection of `peer`, and how many older connections gave way to it.
    pub(crate) fn admit(&self, peer: IpAddr) -> (Slot, usize) {
        let peer = group(peer);
        let mut open = self.lock();
        let mut gone = 0;
        while open.of_peer.get(&peer).map_or(0, BTreeSet::len) >= self.limits.pending_of_peer.max(1)
        {
            let oldest = open.of_peer.get(&peer).and_then(|numbers| numbers.first().copied());
            gone += usize::from(oldest.is_some_and(|number| open.evict(number)));
        }
        while open.pending.len() >= self.limits.pending.max(1) {
            let oldest = open.pending.first_key_value().map(|(number, _)| *number);
            gone += usize::from(oldest.is_some_and(|number| open.evict(number)));
        }
        let number = open.next;
        open.next += 1;
        let evicted = CancellationToken::new();
        open.pending.insert(number, (peer, evicted.clone()));
        open.of_peer.entry(peer).or_default().insert(number);
        drop(open);
        (Slot(Arc::new(Place { pool: self.clone(), number, evicted })), gone)
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Ends a pending connection.
    fn evict(&mut self, number: u64) -> bool {
        match self.forget_pending(number) {
            Some(token) => {
                token.cancel();
                true
            }
            None => false,
        }
    }

    fn forget_pending(&mut self, number: u64) -> Option<CancellationToken> {
        let (peer, token) = self.pending.remove(&number)?;
        if let Some(numbers) = self.of_peer.get_mut(&peer) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.of_peer.remove(&peer);
            }
        }
        Some(token)
    }
}

impl Slot {
    /// The caller of this connection is known: newer connections do not end it any more. May be called again.
    ///
    /// # Errors
    /// When the server has all the established connections that it may have. The connection stays pending.
    pub fn establish(&self) -> Result<(), Full> {
        let mut open = self.0.pool.lock();
        let number = self.0.number;
        if !open.pending.contains_key(&number) {
            return Ok(());
        }
        let limit = self.0.pool.limits.established;
        if open.established.len() >= limit {
            return Err(Full(limit));
        }
        open.forget_pending(number);
        open.established.insert(number);
        Ok(())
    }

    /// Runs the work of this connection; `None` when the connection had to give way to a newer one.
    pub async fn run<F: Future>(&self, work: F) -> Option<F::Output> {
        self.0.evicted.run_until_cancelled(work).await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.pool.lock();
        open.forget_pending(self.number);
        open.established.remove(&self.number);
    }
}

/// The addresses that one peer has at no cost count as one: a host is given a whole /64 of IPv6.
#[must_use]
pub fn group(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)))
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { pending: 4, pending_of_peer: 2, established: 2 };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn alive(slot: &Slot) -> bool {
        !slot.0.evicted.is_cancelled()
    }

    #[test]
    fn the_oldest_silent_connection_of_a_peer_gives_way_to_its_newest() {
        let pool = Pool::new(LIMITS);
        let other = pool.admit(ip("192.0.2.9")).0;
        let slots: Vec<Slot> = (0..3).map(|_| pool.admit(ip("192.0.2.1")).0).collect();
        assert_eq!(slots.iter().map(alive).collect::<Vec<_>>(), [false, true, true]);
        assert!(alive(&other), "another peer is not touched");
    }

    #[test]
    fn many_peers_together_stay_below_the_limit_of_all() {
        let pool = Pool::new(LIMITS);
        let slots: Vec<Slot> = (1..=6).map(|n| pool.admit(ip(&format!("192.0.2.{n}"))).0).collect();
        assert_eq!(slots.iter().filter(|slot| alive(slot)).count(), LIMITS.pending);
        assert!(!alive(&slots[0]) && alive(&slots[5]));
    }

    #[test]
    fn an_established_connection_survives_any_number_of_silent_ones() {
        let pool = Pool::new(LIMITS);
        let known = pool.admit(ip("192.0.2.1")).0;
        known.establish().unwrap();
        for _ in 0..1000 {
            drop(pool.admit(ip("192.0.2.1")));
        }
        let held: Vec<Slot> = (0..100).map(|_| pool.admit(ip("192.0.2.1")).0).collect();
        assert!(alive(&known));
        assert_eq!(held.iter().filter(|slot| alive(slot)).count(), LIMITS.pending_of_peer);
    }

    #[test]
    fn established_connections_have_a_limit_and_free_their_places() {
        let pool = Pool::new(LIMITS);
        let slots: Vec<Slot> = (1..=3).map(|n| pool.admit(ip(&format!("192.0.2.{n}"))).0).collect();
        assert_eq!(slots[0].establish(), Ok(()));
        assert_eq!(slots[1].establish(), Ok(()));
        assert_eq!(slots[1].establish(), Ok(()), "twice is once");
        assert_eq!(slots[2].establish(), Err(Full(2)));
        drop(slots);
        let open = pool.lock();
        assert!(open.pending.is_empty() && open.of_peer.is_empty() && open.established.is_empty());
    }

    #[test]
    fn the_addresses_of_one_ipv6_host_are_one_peer() {
        assert_eq!(group(ip("2001:db8::1")), group(ip("2001:db8::ffff:1")));
        assert_ne!(group(ip("2001:db8::1")), group(ip("2001:db8:0:1::1")));
        assert_eq!(group(ip("::ffff:192.0.2.1")), ip("192.0.2.1"));
    }
}
