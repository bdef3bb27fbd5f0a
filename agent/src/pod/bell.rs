//! How everything wakes a pod's worker.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Rings are merged: the worker looks at everything anew whenever it wakes.
#[derive(Debug, Default)]
pub(super) struct Bell {
    notify: Notify,
    objects: AtomicBool,
}

impl Bell {
    /// Something may have changed.
    pub(super) fn ring(&self) {
        self.notify.notify_one();
    }

    /// A config map, secret or token that the pod uses has changed.
    pub(super) fn ring_objects(&self) {
        self.objects.store(true, Ordering::Release);
        self.notify.notify_one();
    }

    pub(super) async fn rung(&self) {
        self.notify.notified().await;
    }

    /// Whether objects have changed since this was last asked.
    pub(super) fn take_objects(&self) -> bool {
        self.objects.swap(false, Ordering::AcqRel)
    }
}
