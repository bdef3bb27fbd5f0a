//! How many lines are shown in a second.

use std::time::{Duration, Instant};

/// Lets so many through in each second.
pub(super) struct Rate {
    limit: u32,
    since: Option<Instant>,
    admitted: u32,
    left_out: u64,
}

impl Rate {
    pub(super) fn new(limit: u32) -> Self {
        Rate { limit, since: None, admitted: 0, left_out: 0 }
    }

    pub(super) fn admits(&mut self, now: Instant) -> bool {
        let over = |since: Instant| now.saturating_duration_since(since) >= Duration::from_secs(1);
        if self.since.is_none_or(over) {
            (self.since, self.admitted) = (Some(now), 0);
        }
        let admitted = self.admitted < self.limit;
        if admitted {
            self.admitted += 1;
        } else {
            self.left_out += 1;
        }
        admitted
    }

    /// How many were left out since it was last asked.
    pub(super) fn take_left_out(&mut self) -> u64 {
        std::mem::take(&mut self.left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_rate_is_counted() {
        let (mut rate, start) = (Rate::new(2), Instant::now());
        let admitted: Vec<_> = (0..4).map(|_| rate.admits(start)).collect();
        assert_eq!(admitted, [true, true, false, false]);
        assert!(rate.admits(start + Duration::from_secs(1)));
        assert_eq!((rate.take_left_out(), rate.take_left_out()), (2, 0));
    }
}
