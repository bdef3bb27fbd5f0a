//! An alarm before a map is full that cannot become larger. Pure.

use std::collections::HashSet;

use crate::backend::MapFill;

/// The maps that an alarm was raised for.
#[derive(Debug, Default)]
pub(crate) struct Alarms(HashSet<&'static str>);

impl Alarms {
    /// Takes in how full maps are, and says for which of them an alarm is raised now. It ends some way below, so that
    /// it does not come and go.
    pub(crate) fn raise(&mut self, fills: &[MapFill]) -> Vec<MapFill> {
        let mut raised = Vec::new();
        for fill in fills {
            let percent = u64::from(fill.entries) * 100 / u64::from(fill.max_entries.max(1));
            if fill.may_grow || percent < 80 {
                self.0.remove(fill.map);
            } else if percent >= 90 && self.0.insert(fill.map) {
                raised.push(*fill);
            }
        }
        raised
    }
}

/// What to tell people.
pub(crate) fn note(fill: &MapFill) -> String {
    let MapFill { map, entries, max_entries, .. } = fill;
    format!(
        "the BPF map {map} is nearly full: {entries} of {max_entries} entries are used, and it may not become larger"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(entries: u32, may_grow: bool) -> MapFill {
        MapFill { map: "slots", entries, max_entries: 1000, may_grow }
    }

    #[test]
    fn an_alarm_is_raised_once_and_again_only_after_it_was_over() {
        let mut alarms = Alarms::default();
        for (entries, raised) in
            [(899, 0), (900, 1), (950, 0), (850, 0), (920, 0), (799, 0), (899, 0), (1000, 1)]
        {
            assert_eq!(alarms.raise(&[fill(entries, false)]).len(), raised, "{entries}");
        }
    }

    #[test]
    fn a_map_that_grows_raises_none() {
        let mut alarms = Alarms::default();
        assert_eq!(alarms.raise(&[fill(1000, true)]), []);
        assert_eq!(alarms.raise(&[fill(1000, false)]).len(), 1);
        // Other limits were configured.
        assert_eq!(alarms.raise(&[fill(1000, true)]), []);
        assert_eq!(alarms.raise(&[fill(1000, false)]).len(), 1);
        let none = MapFill { max_entries: 0, ..fill(0, false) };
        assert_eq!(alarms.raise(&[none]), []);
    }
}
