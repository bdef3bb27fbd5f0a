//! Parts of the node that the kernel refuses: a full map, an interface or a cgroup that takes no program. Each is left out
//! and named once, all else is in force, and it is tried again: when something on the node changes, and after a pause.

use std::collections::BTreeMap;

use super::error::EbpfError;
use crate::switch::with_sources;

const SECOND_NS: u64 = 1_000_000_000;
/// The next attempt, when nothing on the node changes: the first time, and at most.
const PAUSE_NS: (u64, u64) = (5 * SECOND_NS, 300 * SECOND_NS);

/// What one attempt was refused.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    /// By a map's or pin's name: what is said of it.
    found: BTreeMap<String, String>,
    /// Not everything was tried.
    is_part: bool,
}

impl Refusals {
    /// Of an attempt at a part of everything.
    pub(crate) fn of_part() -> Self {
        Refusals { is_part: true, ..Refusals::default() }
    }

    /// `name` tells refusals apart, `what` tells people what is left out.
    pub(crate) fn add(&mut self, name: &str, what: &str, error: &EbpfError) {
        self.found.insert(name.to_owned(), format!("{what}: {}", with_sources(error)));
    }

    /// It cannot go on.
    pub(crate) fn give_up(&mut self, error: &EbpfError) {
        self.is_part = true;
        self.add("node", "interfaces and addresses", error);
    }
}

/// What is refused now.
#[derive(Debug, Default)]
pub(crate) struct Troubles {
    /// By name.
    known: BTreeMap<String, String>,
    untold: Vec<String>,
    pause_ns: u64,
    again_ns: u64,
}

impl Troubles {
    /// Takes in what an attempt was refused.
    pub(crate) fn note(&mut self, refusals: Refusals, now_ns: u64) {
        let Refusals { found, is_part } = refusals;
        for (name, what) in &found {
            if !self.known.contains_key(name) {
                self.untold.push(what.clone());
            }
        }
        if is_part {
            self.known.extend(found);
        } else {
            for name in self.known.keys().filter(|name| !found.contains_key(*name)) {
                tracing::info!(name, "The kernel takes now what it refused before");
            }
            self.known = found;
        }
        let (first, longest) = PAUSE_NS;
        self.pause_ns = match self.known.is_empty() {
            true => 0,
            false => (self.pause_ns * 2).clamp(first, longest),
        };
        self.again_ns = now_ns.saturating_add(self.pause_ns);
    }

    /// Whether something of that name is refused.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.known.contains_key(name)
    }

    /// Whether it is time for another attempt.
    pub(crate) fn is_due(&self, now_ns: u64) -> bool {
        !self.known.is_empty() && now_ns >= self.again_ns
    }

    /// What nobody was told of yet.
    pub(crate) fn take_untold(&mut self) -> Vec<String> {
        std::mem::take(&mut self.untold)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(names: &[&str]) -> Refusals {
        let mut refusals = Refusals::default();
        for name in names {
            let error = EbpfError::Full { name: "addresses", max_entries: 1 };
            refusals.add(name, "10.0.0.1", &error);
        }
        refusals
    }

    #[test]
    fn each_is_told_once_until_it_was_over() {
        let mut troubles = Troubles::default();
        for (names, told) in [
            (&["a"][..], 1),
            (&["a", "b"], 1),
            (&["a", "b"], 0),
            (&["b"], 0),
            (&["a", "b"], 1),
            (&[], 0),
            (&["b"], 1),
        ] {
            troubles.note(refused(names), 0);
            assert_eq!(troubles.take_untold().len(), told, "{names:?}");
            assert!(names.iter().all(|name| troubles.has(name)));
        }
        assert!(!troubles.has("a"));
        let mut cut_short = Refusals::default();
        cut_short.give_up(&EbpfError::Full { name: "addresses", max_entries: 1 });
        troubles.note(cut_short, 0);
        assert!(troubles.has("b"), "nobody has tried it again");
    }

    #[test]
    fn attempts_become_rarer_until_one_succeeds() {
        let mut troubles = Troubles::default();
        assert!(!troubles.is_due(u64::MAX));
        for secs in [5, 10, 20, 40, 80, 160, 300, 300] {
            troubles.note(refused(&["a"]), SECOND_NS);
            assert!(!troubles.is_due((secs + 1) * SECOND_NS - 1), "{secs}");
            assert!(troubles.is_due((secs + 1) * SECOND_NS), "{secs}");
        }
        troubles.note(refused(&[]), 0);
        assert!(!troubles.is_due(u64::MAX));
        troubles.note(refused(&["a"]), 0);
        assert!(troubles.is_due(5 * SECOND_NS));
    }
}
