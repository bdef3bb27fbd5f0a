//! Removes images that nobody uses, as the rules of [`garbage`](crate::image::garbage) say.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use tracing::{debug, info, warn};

use super::describe;
use crate::config::{AgentConfig, ImageGc};
use crate::events::{EventRecorder, Severity};
use crate::image::garbage::{History, Unused, for_space, insufficient, too_old};
use crate::runtime::Runtime;

/// Between two looks, as in the kubelet.
const PERIOD: Duration = Duration::from_secs(300);

/// Looks after the images of one node.
pub(super) struct ImageCollector {
    runtime: Runtime,
    events: EventRecorder,
    node: Node,
    rules: ImageGc,
    history: History,
    began: Timestamp,
    failed_before: bool,
}

impl ImageCollector {
    pub(super) fn new(config: &AgentConfig, runtime: Runtime, events: EventRecorder) -> Self {
        let mut node = Node::default();
        node.metadata.name = Some(config.node_name.clone());
        Self {
            runtime,
            events,
            node,
            rules: config.image_gc,
            history: History::default(),
            began: Timestamp::now(),
            failed_before: false,
        }
    }

    /// Works for ever; returns at once where the rules switch it off.
    pub(super) async fn run(mut self) {
        while !self.rules.is_off() {
            let mut again = None;
            let result = self.pass(&mut again).await;
            self.tell(result.as_ref().err());
            let now = Timestamp::now();
            let until = again.and_then(|at| Duration::try_from(at.duration_since(now)).ok());
            tokio::time::sleep(until.unwrap_or(PERIOD).min(PERIOD)).await;
        }
    }

    /// One look; `again` says when a further one is of use before its time.
    async fn pass(&mut self, again: &mut Option<Timestamp>) -> Result<(), String> {
        let now = Timestamp::now();
        let present = self.runtime.present_images().await.map_err(|error| describe(&error))?;
        let mut unused = self.history.note(&present, now);
        let old = too_old(&unused, &self.rules, self.began, now);
        unused.retain(|image| !old.contains(image));
        self.remove(&old).await.1?;
        let disk = self.runtime.image_disk().await.map_err(|error| describe(&error))?;
        if disk.capacity == 0 {
            let text = "invalid capacity 0 on image filesystem";
            self.warn("InvalidDiskCapacity", text);
            return Err(text.to_owned());
        }
        let Some(squeeze) = for_space(&unused, disk, &self.rules, now) else { return Ok(()) };
        info!(
            used_percent = disk.used_percent(),
            to_free = squeeze.to_free,
            images = squeeze.remove.len(),
            "The images' file system is too full"
        );
        *again = squeeze.again;
        let (freed, removed) = self.remove(&squeeze.remove).await;
        removed?;
        if freed < squeeze.to_free {
            let text = insufficient(disk, freed);
            self.warn("FreeDiskSpaceFailed", &text);
            return Err(text);
        }
        Ok(())
    }

    /// Removes what it can; returns the bytes that this freed, and why something stayed.
    async fn remove(&self, images: &[Unused]) -> (u64, Result<(), String>) {
        let (mut freed, mut failed) = (0, Vec::new());
        for image in images {
            match self.runtime.remove_image(&image.id).await {
                Ok(names) => {
                    info!(image = image.id, ?names, size = image.size, "Removed an unused image");
                    freed += image.size;
                }
                Err(error) => failed.push(describe(&error)),
            }
        }
        if failed.is_empty() { (freed, Ok(())) } else { (freed, Err(failed.join("; "))) }
    }

    /// Only what fails twice in a row is worth an event.
    fn tell(&mut self, error: Option<&String>) {
        match error {
            None => debug!("Image garbage collection succeeded"),
            Some(error) => {
                warn!(error, "Image garbage collection failed");
                if self.failed_before {
                    self.warn("ImageGCFailed", error);
                }
            }
        }
        self.failed_before = error.is_some();
    }

    fn warn(&self, reason: &str, text: &str) {
        self.events.node(&self.node, Severity::Warning, reason, text);
    }
}
