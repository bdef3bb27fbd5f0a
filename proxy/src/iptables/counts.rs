//! How many rules there are, by table, for the metrics. Pure.

use std::collections::{BTreeMap, HashMap};

use super::names::{Chain, Table};
use super::ruleset::Dirty;
use crate::backend::{Figures, TableRules};
use crate::model::Family;

/// Rules by chain and by table.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    chains: HashMap<Chain, i64>,
    tables: BTreeMap<(Family, Table), i64>,
}

impl Counts {
    /// Those of all chains that there shall be.
    pub(crate) fn of(all: &Dirty) -> Self {
        let mut counts = Counts::default();
        counts.change(all);
        counts
    }

    /// Chains are written and removed; costs as much as those.
    pub(crate) fn change(&mut self, dirty: &Dirty) {
        for (chain, lines) in dirty {
            let (before, after) = match lines {
                Some(lines) => {
                    let count = count(lines);
                    (self.chains.insert(chain.clone(), count), count)
                }
                None => (self.chains.remove(chain), 0),
            };
            let total = self.tables.entry((chain.family, chain.table)).or_default();
            *total += after - before.unwrap_or(0);
        }
    }

    /// The table to change first. Where a Service loses its last endpoint, its clients shall be refused before
    /// nobody translates their connections any more; where it gets one, not refused after that. What is translated
    /// passes the refusals by, so that they may be there too early, and too long.
    pub(crate) fn first_to_change(&self, dirty: &Dirty) -> Table {
        let refusals = dirty.iter().filter(|(chain, _)| chain.table == Table::Filter);
        let growth = refusals.map(|(chain, lines)| {
            let before = self.chains.get(chain).copied().unwrap_or(0);
            lines.as_deref().map_or(0, count) - before
        });
        if growth.sum::<i64>() > 0 { Table::Filter } else { Table::Nat }
    }

    /// Says how many there are, and how many of them the last change wrote.
    pub(crate) fn tell(&self, families: &[Family], written: &Dirty, figures: &mut Figures) {
        for family in families {
            let rules = Table::OURS.map(|table| {
                let of_table = |chain: &Chain| (chain.family, chain.table) == (*family, table);
                let written = written.iter().filter(|(chain, _)| of_table(chain));
                TableRules {
                    table: table.name(),
                    all: self.tables.get(&(*family, table)).copied().unwrap_or(0),
                    written: written.filter_map(|(_, lines)| lines.as_deref()).map(count).sum(),
                }
            });
            figures.of_mut(*family).rules = rules.into();
        }
    }
}

fn count(lines: &[String]) -> i64 {
    i64::try_from(lines.len()).unwrap_or(i64::MAX)
}
