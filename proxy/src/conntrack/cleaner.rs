//! Walks the connection table on a thread of its own: it may hold millions of entries, and rules must not
//! wait for it.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use keelson_netlink::conntrack::ConntrackError;

use super::{Checks, Cleaned, clean_family};
use crate::metrics::Metrics;
use crate::model::Family;
use crate::switch::with_sources;

/// How long a walk that failed or was cut short waits for the next attempt: the first time, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The engine's side.
pub(crate) struct Cleaner {
    jobs: Sender<Checks>,
}

impl Cleaner {
    /// Works in the network namespace of the calling thread, until dropped.
    pub(crate) fn start(metrics: Arc<Metrics>) -> std::io::Result<Self> {
        Cleaner::start_with(metrics, PAUSE, clean_family)
    }

    fn start_with(
        metrics: Arc<Metrics>,
        pause: (Duration, Duration),
        clean: impl FnMut(&Checks, Family) -> Result<Cleaned, ConntrackError> + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, inbox) = channel();
        let thread = std::thread::Builder::new().name("proxy-conntrack".to_owned());
        thread.spawn(move || work(&inbox, &metrics, pause, clean))?;
        Ok(Cleaner { jobs })
    }

    /// Returns at once.
    pub(crate) fn check(&self, checks: Checks) {
        if !checks.frontends.is_empty() && self.jobs.send(checks).is_err() {
            tracing::error!("The connection tracking thread is gone, stale flows stay");
        }
    }
}

fn work(
    inbox: &Receiver<Checks>,
    metrics: &Metrics,
    (first_pause, longest_pause): (Duration, Duration),
    mut clean: impl FnMut(&Checks, Family) -> Result<Cleaned, ConntrackError>,
) {
    let (mut left, mut pause) = (Checks::default(), first_pause);
    loop {
        let job = match left.frontends.is_empty() {
            true => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => inbox.recv_timeout(pause),
        };
        match job {
            Ok(later) => left.merge(later),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        while let Ok(later) = inbox.try_recv() {
            left.merge(later);
        }
        let unfinished = walk(&left, metrics, &mut clean);
        left.frontends.retain(|key, _| unfinished.contains(&key.at.family()));
        pause = match left.frontends.is_empty() {
            true => first_pause,
            false => (pause * 2).min(longest_pause),
        };
    }
}

/// Cleans the families that may have stale flows; returns those that have to be walked once more.
fn walk(
    checks: &Checks,
    metrics: &Metrics,
    clean: &mut impl FnMut(&Checks, Family) -> Result<Cleaned, ConntrackError>,
) -> Vec<Family> {
    let mut unfinished = Vec::new();
    for family in Family::BOTH.into_iter().filter(|family| checks.suspects(*family)) {
        let began = Instant::now();
        match clean(checks, family) {
            Ok(Cleaned { deleted, whole }) => {
                metrics.reconciled(family, began.elapsed(), deleted);
                if !whole {
                    tracing::debug!(?family, deleted, "The walk was cut short, repeating it");
                    unfinished.push(family);
                }
            }
            Err(error) => {
                let error = with_sources(&error);
                tracing::warn!(?family, error, "Cannot remove stale flows, retrying");
                unfinished.push(family);
            }
        }
    }
    unfinished
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::super::Check;
    use super::*;
    use crate::backend::Mode;
    use crate::model::{At, FrontendKey, Protocol};

    fn checks(ports: &[u16]) -> Checks {
        let gone = Check { suspect: true, ..Check::default() };
        let key = |port: &u16| FrontendKey {
            at: At::NodePort(Family::V4),
            protocol: Protocol::Udp,
            port: *port,
        };
        Checks { frontends: ports.iter().map(|port| (key(port), gone.clone())).collect() }
    }

    /// Case 48.
    #[test]
    fn a_walk_that_is_cut_short_is_repeated_and_nobody_waits_for_it() {
        let metrics = Arc::new(Metrics::new(Mode::Nftables));
        // A channel without room: the walk goes on when the test says so, and tells what it walks for.
        let (tell, told) = sync_channel(0);
        let (answer, answers) = sync_channel(0);
        let clean = move |checks: &Checks, family| {
            tell.send((checks.clone(), family)).unwrap();
            answers.recv().unwrap()
        };
        let pause = (Duration::ZERO, Duration::ZERO);
        let cleaner = Cleaner::start_with(Arc::clone(&metrics), pause, clean).unwrap();
        cleaner.check(checks(&[1]));
        assert_eq!(told.recv().unwrap(), (checks(&[1]), Family::V4));
        // The walk hangs. All that comes meanwhile returns at once and is done in the next one.
        cleaner.check(checks(&[2]));
        cleaner.check(checks(&[3]));
        answer.send(Ok(Cleaned { deleted: 1, whole: false })).unwrap();
        assert_eq!(told.recv().unwrap(), (checks(&[1, 2, 3]), Family::V4));
        let error = ConntrackError::Exchange(std::io::ErrorKind::OutOfMemory.into());
        answer.send(Err(error)).unwrap();
        assert_eq!(told.recv().unwrap(), (checks(&[1, 2, 3]), Family::V4));
        answer.send(Ok(Cleaned { deleted: 2, whole: true })).unwrap();
        // Now it is done: the next walk is only for what comes next.
        cleaner.check(checks(&[4]));
        assert_eq!(told.recv().unwrap(), (checks(&[4]), Family::V4));
        answer.send(Ok(Cleaned { deleted: 0, whole: true })).unwrap();
        let text = metrics.text("");
        let deleted = "conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} 3";
        assert!(text.contains(deleted), "{text}");
        let walks = "conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv4\"}";
        assert!(text.contains(walks), "{text}");
    }
}
