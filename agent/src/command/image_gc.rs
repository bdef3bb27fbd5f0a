//! Flags about images that nobody uses, under the kubelet's names.

use clap::Args;

use crate::config::{BadValue, ImageGc, duration};

#[derive(Debug, Default, Args)]
pub(super) struct ImageGcArgs {
    /// From this percentage of their disk in use on, unused images are removed; 100 is never
    #[arg(long, value_name = "PERCENT")]
    image_gc_high_threshold: Option<u8>,
    /// Unused images are removed until no more than this percentage is in use
    #[arg(long, value_name = "PERCENT")]
    image_gc_low_threshold: Option<u8>,
    /// How long an image stays that nobody uses yet (such as 2m)
    #[arg(long, value_name = "DURATION")]
    minimum_image_ttl_duration: Option<String>,
}

impl ImageGcArgs {
    /// Applies the flags to `rules`.
    ///
    /// # Errors
    /// When a value cannot be.
    pub(super) fn apply(&self, rules: &mut ImageGc) -> Result<(), BadValue> {
        if let Some(percent) = self.image_gc_high_threshold {
            rules.high_threshold_percent = percent;
        }
        if let Some(percent) = self.image_gc_low_threshold {
            rules.low_threshold_percent = percent;
        }
        if let Some(text) = &self.minimum_image_ttl_duration {
            let bad = || {
                let (flag, found) = ("--minimum-image-ttl-duration", format!("{text:?}"));
                BadValue::new(flag, found, duration::EXPECTED)
            };
            rules.minimum_age = duration::parse(text).ok_or_else(bad)?;
        }
        rules.check()
    }
}
