//! How many images are fetched at the same time: in all, and from one registry.
//!
//! A registry that answers as slowly as its limits allow must not hold up the pulls from all others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The node's places for pulls.
#[derive(Debug)]
pub(super) struct PullSlots {
    all: Arc<Semaphore>,
    /// One registry never has more than these.
    share: usize,
    hosts: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// A place, free again when this is dropped.
#[derive(Debug)]
pub(super) struct PullSlot(#[allow(dead_code, reason = "held")] [Option<OwnedSemaphorePermit>; 2]);

impl PullSlots {
    /// Half of the places, but at least one, is what one registry may have.
    pub(super) fn new(places: u32) -> Self {
        let places = usize::try_from(places.max(1)).unwrap_or(1);
        let all = Arc::new(Semaphore::new(places));
        Self { all, share: places.div_ceil(2), hosts: Mutex::default() }
    }

    /// Waits for a place for a pull from `host`.
    pub(super) async fn take(&self, host: &str) -> PullSlot {
        let own = self.of(host);
        // The registry's own place first: a pull that waits for it takes none of the others. The semaphores are never
        // closed, so that there is always a permit.
        let own = own.acquire_owned().await.ok();
        PullSlot([own, self.all.clone().acquire_owned().await.ok()])
    }

    fn of(&self, host: &str) -> Arc<Semaphore> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        // Registries that nothing is fetched from are forgotten.
        hosts.retain(|_, own| Arc::strong_count(own) > 1);
        let new = || Arc::new(Semaphore::new(self.share));
        hosts.entry(host.to_owned()).or_insert_with(new).clone()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn one_registry_leaves_places_for_the_others() {
        let slots = PullSlots::new(8);
        let mut held = Vec::new();
        while let Some(slot) = slots.take("slow.example").now_or_never() {
            held.push(slot);
        }
        assert_eq!(held.len(), 4);
        assert!(slots.take("other.example").now_or_never().is_some());
        held.pop();
        assert!(slots.take("slow.example").now_or_never().is_some());
        drop(held);
        drop(slots.take("other.example").await);
        assert_eq!(slots.hosts.lock().unwrap().len(), 1, "registries without pulls are forgotten");
    }

    #[tokio::test]
    async fn one_place_is_enough_for_every_registry() {
        let slots = PullSlots::new(1);
        let one = slots.take("a.example").await;
        assert!(slots.take("b.example").now_or_never().is_none());
        drop(one);
        assert!(slots.take("b.example").now_or_never().is_some());
    }
}
