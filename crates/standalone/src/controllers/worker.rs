//! The shell that every controller shares: a queue of keys, and a task that works on them.

use std::fmt::{Debug, Display};
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::cluster::Change;
use super::queue::{Next, Outcome, Queue};
use crate::ApiError;

/// How many keys of one controller are worked on side by side.
const PARALLEL: usize = 8;
/// Failures in a row from which on a key is worth an operator's look.
const WORTH_A_WARNING: u32 = 8;

/// A level-triggered controller: told which keys a change concerns, and then to make each as it should be.
pub(crate) trait Controller: Send + Sync + 'static {
    /// Its name in logs.
    const NAME: &'static str;
    /// What it is asked to look at.
    type Key: Clone + Debug + Display + Eq + Hash + Ord + Send + Sync;

    /// Calls `add` with each key that the change concerns. Must be quick and must not wait.
    fn affected(&self, change: &Change, add: &mut dyn FnMut(Self::Key));

    /// Makes the state of `key` as it should be, or brings it a step closer.
    fn reconcile(&self, key: &Self::Key) -> impl Future<Output = Result<Outcome, ApiError>> + Send;
}

/// Whoever wants to hear of every change.
pub(crate) trait Observer: Send + Sync {
    /// Must be quick and must not wait: it runs between the store and all other controllers.
    fn observe(&self, change: &Change);
}

/// A controller with its queue.
pub(crate) struct Worker<C: Controller> {
    controller: C,
    queue: Mutex<Queue<C::Key>>,
    wake: Notify,
}

impl<C: Controller> Observer for Worker<C> {
    fn observe(&self, change: &Change) {
        let mut added = false;
        self.controller.affected(change, &mut |key| {
            self.lock().add(key);
            added = true;
        });
        if added {
            self.wake.notify_one();
        }
    }
}

impl<C: Controller> Worker<C> {
    pub(crate) fn new(controller: C) -> Arc<Self> {
        Arc::new(Self { controller, queue: Mutex::new(Queue::new()), wake: Notify::new() })
    }

    /// What the worker works with.
    pub(crate) fn controller(&self) -> &C {
        &self.controller
    }

    /// Asks for a look at `key`.
    pub(crate) fn add(&self, key: C::Key) {
        self.lock().add(key);
        self.wake.notify_one();
    }

    /// Works until cancelled; what is being worked on then is given up, which is safe because the next start looks at
    /// every key again.
    pub(crate) async fn run(self: Arc<Self>, cancel: CancellationToken) {
        let mut running = FuturesUnordered::new();
        loop {
            let next = if running.len() < PARALLEL {
                self.lock().next(Instant::now())
            } else {
                Next::Idle
            };
            let due = match next {
                Next::Run(key) => {
                    running.push(self.look_at(key));
                    continue;
                }
                Next::WaitUntil(due) => Some(due),
                Next::Idle => None,
            };
            let timer = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            // Every arm is cancellation-safe: `Notify` keeps a permit, the set keeps its futures.
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                Some(()) = running.next() => {}
                () = self.wake.notified() => {}
                () = timer => {}
            }
        }
    }

    async fn look_at(&self, key: C::Key) {
        let reconciled = keelson_supervise::caught(C::NAME, self.controller.reconcile(&key)).await;
        let result = reconciled.unwrap_or_else(|panic| Err(ApiError::internal(panic.to_string())));
        let outcome = match &result {
            Ok(outcome) => *outcome,
            Err(_) => Outcome::Failed,
        };
        let failures = self.lock().finish(&key, outcome, Instant::now());
        if let Err(error) = result {
            // Somebody else being faster is the normal way of optimistic concurrency.
            if error.is_conflict() || failures < WORTH_A_WARNING {
                debug!(controller = C::NAME, object = %key, attempt = failures, %error, "Will try again");
            } else {
                warn!(controller = C::NAME, object = %key, attempt = failures, %error, "Keeps failing");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue<C::Key>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
