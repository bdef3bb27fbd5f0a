//! The work queue of one controller: keys that need a look, each at most once at a time, failures later and later.
//!
//! ```text
//!  add ──► ready ──next──► running ──finish──► (gone)
//!           ▲                 │ add while running: again once it is finished
//!           └──── delayed ◄───┘ failed (back-off) or asked for later
//! ```

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt::Debug;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// First delay after a failure; doubled for each further one (client-go's rate limiter starts at 5 ms as well).
const FIRST_DELAY: Duration = Duration::from_millis(5);
/// The longest that a failing key waits.
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// What the owner of the queue should do now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next<K> {
    /// Work on this key and call [`Queue::finish`] afterwards.
    Run(K),
    /// Nothing is due before this time.
    WaitUntil(Instant),
    /// Nothing is due at all until something is added.
    Idle,
}

/// How the work on a key ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All is as wanted.
    Done,
    /// All is as wanted for now; look again after this time.
    Later(Duration),
    /// Something went wrong; try again with back-off.
    Failed,
}

/// See the module's documentation. Pure: the time is passed in.
#[derive(Debug)]
pub(crate) struct Queue<K> {
    ready: VecDeque<K>,
    waiting: HashSet<K>,
    running: HashSet<K>,
    again: HashSet<K>,
    delayed: BTreeSet<(Instant, K)>,
    due: HashMap<K, Instant>,
    failures: HashMap<K, u32>,
}

impl<K: Clone + Eq + Hash + Ord + Debug> Queue<K> {
    pub(crate) fn new() -> Self {
        Self {
            ready: VecDeque::new(),
            waiting: HashSet::new(),
            running: HashSet::new(),
            again: HashSet::new(),
            delayed: BTreeSet::new(),
            due: HashMap::new(),
            failures: HashMap::new(),
        }
    }

    /// Asks for a look at `key`, now or as soon as the present look at it has ended.
    pub(crate) fn add(&mut self, key: K) {
        if self.running.contains(&key) {
            self.again.insert(key);
        } else if self.waiting.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    /// Asks for a look at `key` at `at`, or before if one was already asked for.
    pub(crate) fn add_at(&mut self, key: K, at: Instant) {
        match self.due.get(&key) {
            Some(due) if *due <= at => return,
            Some(due) => {
                self.delayed.remove(&(*due, key.clone()));
            }
            None => {}
        }
        self.due.insert(key.clone(), at);
        self.delayed.insert((at, key));
    }

    /// What to do now.
    pub(crate) fn next(&mut self, now: Instant) -> Next<K> {
        while let Some((at, _)) = self.delayed.first()
            && *at <= now
        {
            if let Some((_, key)) = self.delayed.pop_first() {
                self.due.remove(&key);
                self.add(key);
            }
        }
        if let Some(key) = self.ready.pop_front() {
            self.waiting.remove(&key);
            self.running.insert(key.clone());
            return Next::Run(key);
        }
        self.delayed.first().map_or(Next::Idle, |(at, _)| Next::WaitUntil(*at))
    }

    /// Ends the work on `key`. Returns how often it has now failed in a row.
    pub(crate) fn finish(&mut self, key: &K, outcome: Outcome, now: Instant) -> u32 {
        self.running.remove(key);
        let failures = match outcome {
            Outcome::Failed => {
                let failures = self.failures.entry(key.clone()).or_default();
                *failures += 1;
                let failures = *failures;
                self.add_at(key.clone(), now + delay(failures));
                failures
            }
            Outcome::Later(wait) => {
                self.failures.remove(key);
                self.add_at(key.clone(), now + wait);
                0
            }
            Outcome::Done => {
                self.failures.remove(key);
                0
            }
        };
        if self.again.remove(key) {
            self.add(key.clone());
        }
        failures
    }
}

/// The wait after the n-th failure in a row.
fn delay(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(20);
    FIRST_DELAY.saturating_mul(1 << doublings).min(LONGEST_DELAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_never_runs_twice_at_once_and_is_looked_at_again_when_it_changed_meanwhile() {
        let now = Instant::now();
        let mut queue = Queue::new();
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.next(now), Next::Run("a"));
        queue.add("a");
        assert_eq!(queue.next(now), Next::Idle);
        queue.finish(&"a", Outcome::Done, now);
        assert_eq!(queue.next(now), Next::Run("a"));
        queue.finish(&"a", Outcome::Done, now);
        assert_eq!(queue.next(now), Next::Idle);
    }

    #[test]
    fn failures_wait_longer_each_time_and_a_success_forgets_them() {
        let now = Instant::now();
        let mut queue = Queue::new();
        let mut waits = Vec::new();
        queue.add("a");
        let mut clock = now;
        for _ in 0..4 {
            assert_eq!(queue.next(clock), Next::Run("a"));
            queue.finish(&"a", Outcome::Failed, clock);
            let Next::WaitUntil(at) = queue.next(clock) else { panic!("must wait") };
            waits.push((at - clock).as_millis());
            clock = at;
        }
        assert_eq!(waits, [5, 10, 20, 40]);
        assert_eq!(queue.next(clock), Next::Run("a"));
        queue.finish(&"a", Outcome::Done, clock);
        assert_eq!(queue.next(clock), Next::Idle);
        assert_eq!(delay(100), LONGEST_DELAY);
    }

    #[test]
    fn the_earlier_of_two_times_counts() {
        let now = Instant::now();
        let mut queue = Queue::new();
        queue.add_at("a", now + Duration::from_secs(9));
        queue.add_at("a", now + Duration::from_secs(3));
        queue.add_at("a", now + Duration::from_secs(6));
        assert_eq!(queue.next(now), Next::WaitUntil(now + Duration::from_secs(3)));
        assert_eq!(queue.next(now + Duration::from_secs(3)), Next::Run("a"));
        queue.finish(&"a", Outcome::Done, now);
        assert_eq!(queue.next(now + Duration::from_secs(9)), Next::Idle);
    }

    proptest::proptest! {
        /// Whatever is added is looked at after its last addition, and never by two at once.
        #[test]
        fn nothing_is_lost(steps in proptest::collection::vec((0_u8..4, 0_u8..3), 1..200)) {
            let now = Instant::now();
            let mut queue = Queue::new();
            let mut running: Vec<u8> = Vec::new();
            let mut owed: HashSet<u8> = HashSet::new();
            for (key, step) in steps {
                match step {
                    0 => { queue.add(key); owed.insert(key); }
                    1 => if let Next::Run(key) = queue.next(now) {
                        proptest::prop_assert!(!running.contains(&key));
                        running.push(key);
                        owed.remove(&key);
                    },
                    _ => if let Some(key) = running.pop() { queue.finish(&key, Outcome::Done, now); },
                }
            }
            for key in running.drain(..) { queue.finish(&key, Outcome::Done, now); }
            while let Next::Run(key) = queue.next(now) {
                owed.remove(&key);
                queue.finish(&key, Outcome::Done, now);
            }
            proptest::prop_assert!(owed.is_empty());
        }
    }
}
