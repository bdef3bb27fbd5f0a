//! Removes somebody's chains: ours, or kube-proxy's.

use super::names::{Chain, Table};
use super::program::{Programs, Variant};
use super::restore::{Hooks, script};
use super::ruleset::Dirty;
use super::saved::Saved;
use super::{IptablesError, ProgramError};

/// Whose chains go.
#[derive(Clone, Copy, Debug)]
pub struct Leftovers {
    /// Tells by its name whether a chain goes.
    pub is_chain: fn(&str) -> bool,
}

/// Removes such chains, and the rules that lead to them, from the tables nat, filter and mangle of the
/// calling thread's network namespace; says how many chains that were. A variant that is not installed
/// has nothing.
pub fn remove(variant: Variant, leftovers: &Leftovers) -> Result<usize, IptablesError> {
    let programs = Programs::new(variant)?;
    match programs.check() {
        Err(ProgramError::Missing(_)) => Ok(0),
        checked => {
            checked?;
            remove_with(&programs, leftovers)
        }
    }
}

/// How many such chains there are.
pub fn count(variant: Variant, leftovers: &Leftovers) -> Result<usize, IptablesError> {
    let programs = Programs::new(variant)?;
    if programs.check().is_err() {
        return Ok(0);
    }
    let mut count = 0;
    for family in programs.families().into_iter().filter(|family| programs.is_in_use(*family)) {
        let text = programs.save(family, None)?;
        count += Saved::parse_of(&text, leftovers.is_chain).chains.len();
    }
    Ok(count)
}

pub(super) fn remove_with(
    programs: &Programs,
    leftovers: &Leftovers,
) -> Result<usize, IptablesError> {
    let mut removed = 0;
    for family in programs.families() {
        if !programs.is_in_use(family) {
            continue;
        }
        let text = programs.save(family, None)?;
        let saved = Saved::parse_of(&text, leftovers.is_chain);
        let hooks: Hooks = saved
            .jumps
            .iter()
            .map(|(table, chain, rule)| (*table, format!("-D {chain} {rule}")))
            .collect();
        let chains = || saved.chains.keys().map(|(table, name)| Chain::new(family, *table, *name));
        let limit = programs.chains_per_transaction();
        // No chain can be removed while a rule leads to it, and these may refer to each other in any
        // order: so all are emptied first.
        let emptied: Dirty = chains().map(|chain| (chain, Some(Vec::new()))).collect();
        let gone: Dirty = chains().map(|chain| (chain, None)).collect();
        for (dirty, hooks) in [(emptied, &hooks), (gone, &Hooks::new())] {
            let script = script(family, &dirty, hooks, limit, Table::Nat);
            if script.blocks > 0 {
                programs.restore(family, &script, &mut Vec::new())?;
            }
        }
        removed += saved.chains.len();
    }
    Ok(removed)
}
