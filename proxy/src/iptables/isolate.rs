//! When the kernel refuses a change: finds the Services that are to blame, and puts the others in force.

use std::sync::Arc;

use super::counts::Counts;
use super::names::{Chain, Table};
use super::ruleset::{Dirty, Ruleset, Update};
use super::saved::Saved;
use super::{Iptables, IptablesError};
use crate::backend::Applied;
use crate::diff::Plans;

impl Iptables {
    /// As [`Iptables::adopt_once`], Service by Service where it has to be.
    pub(super) fn adopt_isolating(&mut self, plans: &Plans) -> Result<Applied, IptablesError> {
        let (ruleset, _) = self.wanted(plans);
        let mut texts = Vec::new();
        for family in &self.families {
            texts.push((*family, self.programs.save(*family, None)?));
        }
        let saved: Vec<_> =
            texts.iter().map(|(family, text)| (*family, Saved::parse(text))).collect();
        let in_force = |chain: &Chain, lines: &Vec<String>| {
            let saved = saved.iter().find(|(family, _)| *family == chain.family);
            saved
                .and_then(|(_, saved)| saved.chains.get(&(chain.table, &*chain.name)))
                .is_some_and(|found| found == lines)
        };
        let update = |(service, plan): (&_, &Arc<_>)| -> Update {
            (Clone::clone(service), Some(Arc::clone(plan)))
        };
        let (known, unknown): (Vec<Update>, Vec<Update>) =
            plans.iter().map(update).partition(|(service, _)| {
                let chains = ruleset.own_chains(service);
                chains.iter().all(|(chain, lines)| in_force(chain, lines))
            });
        self.ruleset = Ruleset::new(self.config.clone(), &self.families);
        let mut known_chains = self.ruleset.take(&known);
        known_chains.extend(self.ruleset.fixed());
        self.counts = Counts::of(&known_chains);
        let (dirty, hooks) = self.compare(known_chains)?;
        // What is not known yet may still be wanted: leftovers go in the next attempt.
        let dirty: Dirty = dirty.into_iter().filter(|(_, lines)| lines.is_some()).collect();
        let mut applied =
            Applied { operations: self.write(&dirty, &hooks, Table::Nat)?, refused: Vec::new() };
        self.update_in_parts(&unknown, &mut applied);
        Ok(applied)
    }

    fn update_in_parts(&mut self, updates: &[Update], applied: &mut Applied) {
        match (self.update(updates), updates) {
            (Ok(operations), _) => applied.operations += operations,
            (Err(error), [(service, _)]) => {
                applied.refused.push((service.clone(), error.into()));
            }
            (Err(_), several) => {
                let (first, second) = several.split_at(several.len() / 2);
                self.update_in_parts(first, applied);
                self.update_in_parts(second, applied);
            }
        }
    }
}
