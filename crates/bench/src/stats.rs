//! What a row of samples comes down to.

/// Measurements of the same work, in whatever unit.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

impl From<&[f64]> for Samples {
    fn from(samples: &[f64]) -> Samples {
        Samples(samples.to_vec())
    }
}

impl Samples {
    pub(crate) fn push(&mut self, sample: f64) {
        self.0.push(sample);
    }

    /// In the order in which they were taken: a drift stays visible in the JSON.
    pub(crate) fn as_slice(&self) -> &[f64] {
        &self.0
    }

    /// The smallest sample that at least `percent` of all do not exceed (nearest rank: always a value that was
    /// really seen). None without samples.
    pub(crate) fn percentile(&self, percent: u8) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * usize::from(percent)).div_ceil(100).max(1);
        sorted.get(rank - 1).or(sorted.last()).copied()
    }

    pub(crate) fn median(&self) -> Option<f64> {
        self.percentile(50)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        Samples(values.to_vec())
    }

    #[test]
    fn percentiles_are_values_that_were_seen() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let cases: &[(&[f64], u8, Option<f64>)] = &[
            (&[], 50, None),
            (&[7.0], 50, Some(7.0)),
            (&[7.0], 90, Some(7.0)),
            (&[3.0, 1.0, 2.0], 50, Some(2.0)),
            (&[4.0, 1.0, 2.0, 3.0], 50, Some(2.0)),
            (&[4.0, 1.0, 2.0, 3.0], 100, Some(4.0)),
            (&hundred, 50, Some(50.0)),
            (&hundred, 90, Some(90.0)),
        ];
        for (values, percent, want) in cases {
            assert_eq!(samples(values).percentile(*percent), *want, "{percent} of {values:?}");
        }
    }
}
