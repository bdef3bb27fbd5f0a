//! When images that nobody uses are removed.

use std::time::Duration;

use super::BadValue;

const HIGH: &str = "imageGCHighThresholdPercent (--image-gc-high-threshold)";
const LOW: &str = "imageGCLowThresholdPercent (--image-gc-low-threshold)";
const MAXIMUM_AGE: &str = "imageMaximumGCAge";

/// The kubelet's rules for removing images, with its defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageGc {
    /// From this share of their file system in use on, in percent, images are removed; 100 is never.
    pub high_threshold_percent: u8,
    /// Down to this share.
    pub low_threshold_percent: u8,
    /// What came more recently stays: a container is about to use it.
    pub minimum_age: Duration,
    /// What was of no use for longer goes, however much space there is.
    pub maximum_age: Option<Duration>,
}

impl Default for ImageGc {
    fn default() -> Self {
        Self {
            high_threshold_percent: 85,
            low_threshold_percent: 80,
            minimum_age: Duration::from_secs(120),
            maximum_age: None,
        }
    }
}

impl ImageGc {
    /// Whether the values fit together.
    ///
    /// # Errors
    /// Names the one that does not.
    pub fn check(&self) -> Result<(), BadValue> {
        let (high, low) = (self.high_threshold_percent, self.low_threshold_percent);
        if high > 100 {
            return Err(BadValue::new(HIGH, high, "a percentage (0 to 100)"));
        }
        if low >= high {
            let expected = "less than imageGCHighThresholdPercent (--image-gc-high-threshold)";
            return Err(BadValue::new(LOW, low, expected));
        }
        match self.maximum_age {
            Some(age) if age <= self.minimum_age => {
                let found = format!("{age:?}");
                Err(BadValue::new(MAXIMUM_AGE, found, "more than imageMinimumGCAge"))
            }
            _ => Ok(()),
        }
    }

    /// Nothing is ever removed.
    pub fn is_off(&self) -> bool {
        self.high_threshold_percent == 100 && self.maximum_age.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_and_ages_that_do_not_fit_are_named() {
        let text = |change: fn(&mut ImageGc)| {
            let mut rules = ImageGc::default();
            change(&mut rules);
            rules.check().map_err(|error| error.to_string())
        };
        assert_eq!(text(|_| ()), Ok(()));
        assert!(
            text(|r| r.high_threshold_percent = 101).unwrap_err().contains("101 is not a perc")
        );
        assert!(
            text(|r| r.low_threshold_percent = 85).unwrap_err().contains("85 is not less than")
        );
        let short = text(|r| r.maximum_age = Some(Duration::from_secs(60))).unwrap_err();
        assert_eq!(short, "imageMaximumGCAge: 60s is not more than imageMinimumGCAge");
        assert!(text(|r| r.maximum_age = Some(Duration::from_secs(121))).is_ok());
    }
}
