//! How often strangers may make this node ask the API server.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::answers::Lru;

/// Peers that are remembered; above it those that asked longest ago are forgotten.
const PEERS: usize = 1024;

/// A limit per peer and one for all together.
pub(super) struct Rate(Mutex<State>);

struct State {
    all: Bucket,
    peers: Lru<IpAddr, Bucket>,
}

impl Default for Rate {
    fn default() -> Self {
        let state = State { all: Bucket::new(25.0, 50.0), peers: Lru::new(PEERS) };
        Self(Mutex::new(state))
    }
}

impl Rate {
    /// Whether `peer` may ask now.
    pub(super) fn allows(&self, peer: IpAddr, now: Instant) -> bool {
        let peer = keelson_listener::group(peer);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let State { all, peers } = &mut *state;
        // The peer's own first, so that one which floods does not use up what is for all.
        let own = match peers.get(&peer) {
            Some(bucket) => bucket.take(now),
            None => {
                let mut bucket = Bucket::new(5.0, 10.0);
                let allowed = bucket.take(now);
                peers.put(peer, bucket);
                allowed
            }
        };
        own && all.take(now)
    }
}

/// Tokens that come back with time.
struct Bucket {
    per_second: f64,
    burst: f64,
    left: f64,
    seen: Option<Instant>,
}

impl Bucket {
    fn new(per_second: f64, burst: f64) -> Self {
        Self { per_second, burst, left: burst, seen: None }
    }

    fn take(&mut self, now: Instant) -> bool {
        let passed = self.seen.map_or(Duration::ZERO, |seen| now.saturating_duration_since(seen));
        self.seen = Some(now);
        self.left = (self.left + passed.as_secs_f64() * self.per_second).min(self.burst);
        let allowed = self.left >= 1.0;
        if allowed {
            self.left -= 1.0;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_flood_of_one_peer_leaves_the_others_their_share() {
        let (rate, now) = (Rate::default(), Instant::now());
        let peer = |n| IpAddr::from(Ipv4Addr::from_bits(n));
        let allowed = (0..1000).filter(|_| rate.allows(peer(1), now)).count();
        assert_eq!(allowed, 10);
        assert!(rate.allows(peer(2), now));
        let allowed =
            (0..1000).filter(|_| rate.allows(peer(1), now + Duration::from_secs(1))).count();
        assert_eq!(allowed, 5);
        let allowed = (10..9000).filter(|n| rate.allows(peer(*n), now)).count();
        assert!(allowed <= 50, "{allowed}");
    }
}
