//! Which images go when space is short, or when nobody had a use for them for long: the kubelet's rules. Pure.

use std::collections::HashMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::config::ImageGc;

/// An image that is here, under whatever names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    pub id: String,
    pub size: u64,
    /// A container exists that was made from it.
    pub in_use: bool,
    /// Somebody said that it shall stay.
    pub pinned: bool,
}

/// An image that may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unused {
    pub id: String,
    pub size: u64,
    first_seen: Timestamp,
    last_used: Option<Timestamp>,
}

/// When images were seen and used, since the agent started.
#[derive(Debug, Default)]
pub struct History(HashMap<String, Seen>);

#[derive(Debug, Clone, Copy)]
struct Seen {
    first: Timestamp,
    last_used: Option<Timestamp>,
}

impl History {
    /// Takes note of all images that are here and returns those that may go: the least recently used first, among those
    /// that were never used the oldest first.
    pub fn note(&mut self, present: &[Present], now: Timestamp) -> Vec<Unused> {
        self.0.retain(|id, _| present.iter().any(|image| image.id == *id));
        let mut unused = Vec::new();
        for image in present {
            let fresh = Seen { first: now, last_used: None };
            let seen = self.0.entry(image.id.clone()).or_insert(fresh);
            if image.in_use {
                seen.last_used = Some(now);
            } else if !image.pinned {
                let (first_seen, last_used) = (seen.first, seen.last_used);
                unused.push(Unused {
                    id: image.id.clone(),
                    size: image.size,
                    first_seen,
                    last_used,
                });
            }
        }
        unused.sort_by(|a, b| {
            let age = |image: &Unused| (image.last_used, image.first_seen);
            age(a).cmp(&age(b)).then_with(|| a.id.cmp(&b.id))
        });
        unused
    }
}

/// Those that nobody had a use for longer than `imageMaximumGCAge`; nobody knows before the agent has run for as long.
pub fn too_old(
    unused: &[Unused],
    rules: &ImageGc,
    began: Timestamp,
    now: Timestamp,
) -> Vec<Unused> {
    let Some(limit) = rules.maximum_age else { return Vec::new() };
    let over = |since: Timestamp| now.duration_since(since) > signed(limit);
    if !over(began) {
        return Vec::new();
    }
    // The kubelet takes one that was never used for infinitely old, even if it came a moment ago.
    unused
        .iter()
        .filter(|image| over(image.last_used.unwrap_or(image.first_seen)))
        .cloned()
        .collect()
}

/// The file system that images are on, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    pub capacity: u64,
    pub available: u64,
}

impl Disk {
    /// How much of it is in use, rounded up.
    pub fn used_percent(self) -> u8 {
        let available = u128::from(self.available.min(self.capacity));
        let free = (available * 100).checked_div(self.capacity.into()).unwrap_or(100);
        100 - u8::try_from(free).unwrap_or(100)
    }

    fn to_free(self, down_to_percent: u8) -> u64 {
        let wanted = u128::from(self.capacity) * u128::from(100 - down_to_percent.min(100)) / 100;
        u64::try_from(wanted).unwrap_or(u64::MAX).saturating_sub(self.available)
    }
}

/// What to do about a disk that is too full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Squeeze {
    /// In this order.
    pub remove: Vec<Unused>,
    /// How many bytes there should be more.
    pub to_free: u64,
    /// When to look again, where only the age of images stands in the way.
    pub again: Option<Timestamp>,
}

/// Which of the images that may go are removed for the sake of space; `None` while there is enough.
pub fn for_space(
    unused: &[Unused],
    disk: Disk,
    rules: &ImageGc,
    now: Timestamp,
) -> Option<Squeeze> {
    if disk.used_percent() < rules.high_threshold_percent {
        return None;
    }
    let to_free = disk.to_free(rules.low_threshold_percent);
    let mut squeeze = Squeeze { remove: Vec::new(), to_free, again: None };
    let mut freed = 0_u64;
    for image in unused {
        if freed >= to_free {
            break;
        }
        let ripe =
            image.first_seen.checked_add(signed(rules.minimum_age)).unwrap_or(Timestamp::MAX);
        if ripe > now {
            squeeze.again = Some(squeeze.again.map_or(ripe, |at| at.min(ripe)));
            continue;
        }
        freed = freed.saturating_add(image.size);
        squeeze.remove.push(image.clone());
    }
    squeeze.again = squeeze.again.filter(|_| freed < to_free);
    Some(squeeze)
}

/// The kubelet's words for a disk that stays too full.
pub fn insufficient(disk: Disk, freed: u64) -> String {
    format!(
        "Insufficient free disk space on the node's image filesystem ({}% of {} used). Failed to free sufficient space \
         by deleting unused images (freed {freed} bytes). Investigate disk usage, as it could be used by active images, \
         logs, volumes, or other data.",
        disk.used_percent(),
        format_size(disk.capacity)
    )
}

/// Bytes for people: `1.5 GiB`.
#[allow(clippy::cast_precision_loss, reason = "one digit after the point is all that is shown")]
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut size = bytes as f64 / 1024.0;
    if size < 1.0 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    format!("{size:.1} {}", UNITS[unit])
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(secs: i64) -> Timestamp {
        Timestamp::from_second(secs).unwrap()
    }

    /// `name`, `name!` (in use) or `name^` (pinned), 10 bytes each.
    fn images(names: &str) -> Vec<Present> {
        let image = |name: &str| Present {
            id: name.trim_end_matches(['!', '^']).to_owned(),
            size: 10,
            in_use: name.ends_with('!'),
            pinned: name.ends_with('^'),
        };
        names.split(' ').filter(|name| !name.is_empty()).map(image).collect()
    }

    fn ids(images: &[Unused]) -> String {
        images.iter().map(|image| image.id.as_str()).collect::<Vec<_>>().join(" ")
    }

    /// The images that were seen at these times, last at 1000.
    fn unused(rounds: &[(i64, &str)]) -> Vec<Unused> {
        let mut history = History::default();
        let mut unused = Vec::new();
        for (when, names) in rounds {
            unused = history.note(&images(names), at(*when));
        }
        unused
    }

    #[test]
    fn the_least_recently_used_go_first_and_the_used_and_pinned_never() {
        for (rounds, want) in [
            (&[(0, "a! b! c"), (100, "a! b c"), (200, "a b c")][..], "c b a"),
            (&[(0, "new"), (5, "new older!"), (6, "new older")], "new older"),
            (&[(0, "b"), (1, "b a"), (2, "b a c")], "b a c"),
            (&[(0, "a! b^ c")], "c"),
            // One that went and came back is new.
            (&[(0, "a b"), (1, "b"), (2, "b a")], "b a"),
            (&[], ""),
        ] {
            assert_eq!(ids(&unused(rounds)), want, "{rounds:?}");
        }
    }

    #[test]
    fn just_enough_goes_and_only_what_is_ripe() {
        let rules = ImageGc::default();
        let disk = |available| Disk { capacity: 100, available };
        let all = unused(&[(0, "a"), (10, "a b"), (20, "a b c"), (950, "a b c young")]);
        let plan = |available| for_space(&all, disk(available), &rules, at(1000));
        for (available, remove, to_free, again) in
            [(15, "a", 5, None), (10, "a", 10, None), (9, "a b", 11, None), (0, "a b", 20, None)]
        {
            let squeeze = plan(available).unwrap();
            assert_eq!((ids(&squeeze.remove).as_str(), squeeze.to_free), (remove, to_free));
            assert_eq!(squeeze.again, again);
        }
        assert_eq!(plan(16), None);
        let low = ImageGc { low_threshold_percent: 10, ..rules };
        let squeeze = for_space(&all, disk(15), &low, at(1000)).unwrap();
        assert_eq!((ids(&squeeze.remove).as_str(), squeeze.to_free), ("a b c", 75));
        assert_eq!(squeeze.again, Some(at(950 + 120)));
    }

    #[test]
    fn what_nobody_used_for_long_goes_when_the_agent_knows_for_as_long() {
        let rules = ImageGc { maximum_age: Some(Duration::from_secs(300)), ..ImageGc::default() };
        let all = unused(&[(0, "never used!"), (650, "never used"), (900, "never used late")]);
        for (began, now, want) in [
            (0, 1000, "never used"),
            (0, 301, "never used"),
            (0, 300, ""),
            (800, 1000, ""),
            (0, 1201, "never late used"),
        ] {
            let gone = too_old(&all, &rules, at(began), at(now));
            assert_eq!(ids(&gone), want, "{began} {now}");
        }
        assert!(too_old(&all, &ImageGc::default(), at(0), at(1000)).is_empty());
    }

    #[test]
    fn the_words_for_a_disk_that_stays_full() {
        let disk = Disk { capacity: 100 << 30, available: 10 << 30 };
        let text = insufficient(disk, 42);
        assert!(
            text.contains("(90% of 100.0 GiB used)") && text.contains("(freed 42 bytes)"),
            "{text}"
        );
        for (bytes, want) in
            [(5, "5 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (2 << 40, "2.0 TiB")]
        {
            assert_eq!(format_size(bytes), want);
        }
    }

    proptest! {
        #[test]
        fn no_more_goes_than_is_needed(
            capacity in 1_u64..10_000, available in 0_u64..10_000, sizes in prop::collection::vec(1_u64..500, 0..20),
        ) {
            let present: Vec<Present> = sizes.iter().enumerate().map(|(id, size)| Present {
                id: id.to_string(), size: *size, in_use: false, pinned: false,
            }).collect();
            let all = History::default().note(&present, at(0));
            let disk = Disk { capacity, available };
            if let Some(squeeze) = for_space(&all, disk, &ImageGc::default(), at(1000)) {
                let freed: u64 = squeeze.remove.iter().map(|image| image.size).sum();
                let last = squeeze.remove.last().map_or(0, |image| image.size);
                prop_assert!(freed >= squeeze.to_free || squeeze.remove.len() == present.len());
                prop_assert!(squeeze.remove.is_empty() || freed - last < squeeze.to_free);
            } else {
                prop_assert!(disk.used_percent() < 85);
            }
        }
    }
}
