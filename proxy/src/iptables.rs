//! The iptables backend: chains of our own in the tables nat and filter, written by `iptables-restore`.
//!
//! ```text
//! nat     PREROUTING, OUTPUT ─► SERVICES ─ 4 bits of the address ─► SERVICES-A ─ 4 more ─► SERVICES-A5
//!                                  │                                     frontend ─┬─► SVC-hash, SVL-hash   endpoints
//!                                  └ (last) a node address ─► NODEPORTS ─► ...    ├─► EXT-hash   masquerade, policy
//!                                                                                 └─► FW-hash    source ranges
//!         POSTROUTING ─► POSTROUTING ─ mark bit, or a pod that meets itself (HAIRPIN) ─► masquerade
//! filter  INPUT, FORWARD, OUTPUT ─ new connections ─► UNSERVED ─ as above ─► reject or drop what nat left alone
//! ```
//!
//! All names start with `KEELSON-`. A connection's first packet passes some 16 + 16 rules and one leaf,
//! not one rule per Service. An endpoint is one rule (two with session affinity), never a chain:
//! `iptables-nft-restore` keeps the chains that a transaction names in a sorted list and walks through it
//! for every rule, so that chains times rules per transaction is what makes it slow. For the same reason
//! large changes are cut into several transactions, in an order in which each of them leaves working rules.
//!
//! Invariant: the kernel's chains are a function of the plans and the configuration, as text. A restart
//! reads them back, compares, and touches only what differs.

mod alarm;
mod counts;
mod fixed;
mod isolate;
mod leftovers;
mod names;
mod program;
mod restore;
mod rules;
pub(crate) mod ruleset;
pub(crate) mod saved;
mod sizes;
#[cfg(test)]
mod tests;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use keelson_netlink::nft::NftError;

use crate::backend::{Applied, Backend, BackendConfig, BackendError, Difference, Figures};
use crate::diff::{Change, Plans};
use crate::model::Family;
use alarm::Alarm;
use counts::Counts;
use fixed::HOOKS;
pub use leftovers::{Leftovers, count as count_leftovers, remove as remove_leftovers};
use names::{Chain, Table};
use program::Programs;
pub use program::{ProgramError, Variant};
use restore::{Hooks, Script, script};
use ruleset::{Dirty, Ruleset, Update};
use saved::Saved;

const OURS: Leftovers = Leftovers { is_chain: |name| name.starts_with(names::PREFIX) };
/// Somebody may change the rules while they are being repaired.
const ATTEMPTS: u32 = 3;

/// An error of the iptables backend.
#[derive(Debug, thiserror::Error)]
pub enum IptablesError {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error("cannot watch the rules")]
    Watch(#[source] NftError),
    #[error("cannot set up the alarm for changes of the rules")]
    Alarm(#[source] nix::errno::Errno),
    #[error("cannot read the sizes of the tables nat and filter")]
    Sizes(#[source] std::io::Error),
}

/// The backend. Lives in the network namespace in which it was opened.
pub struct Iptables {
    programs: Programs,
    families: Vec<Family>,
    config: BackendConfig,
    ruleset: Ruleset,
    alarm: Alarm,
    counts: Counts,
    figures: Figures,
}

impl Iptables {
    /// The variant that the rest of the node uses.
    pub fn usual_variant() -> Result<Variant, IptablesError> {
        Ok(program::chosen_by_node()?)
    }

    /// Whether the programs are there and the kernel has all matches and targets.
    pub fn probe(variant: Variant) -> Result<(), IptablesError> {
        let programs = Programs::new(variant)?;
        programs.check()?;
        for family in programs.families() {
            programs.test(family, &needs(family))?;
        }
        Ok(())
    }

    /// Opens the backend in the network namespace of the calling thread. Changes nothing yet.
    pub fn open(variant: Variant, config: BackendConfig) -> Result<Self, IptablesError> {
        let programs = Programs::new(variant)?;
        let families = programs.families();
        let alarm = Alarm::open(&programs)?;
        let ruleset = Ruleset::new(config.clone(), &families);
        let (counts, figures) = (Counts::default(), Figures::default());
        Ok(Iptables { programs, families, config, ruleset, alarm, counts, figures })
    }

    /// Removes everything that the backend ever made with a variant of iptables, without opening it.
    pub fn remove(variant: Variant) -> Result<(), IptablesError> {
        remove_leftovers(variant, &OURS).map(drop)
    }

    fn adopt_once(&mut self, plans: &Plans) -> Result<Applied, IptablesError> {
        crate::localhost::arrange(&self.programs.netns, self.config.localhost_node_ports);
        self.alarm.acknowledge()?;
        let (ruleset, all) = self.wanted(plans);
        let counts = Counts::of(&all);
        let (dirty, hooks) = self.compare(all)?;
        let operations = self.write(&dirty, &hooks, Table::Nat)?;
        (self.ruleset, self.counts) = (ruleset, counts);
        self.counts.tell(&self.families, &dirty, &mut self.figures);
        Ok(Applied { operations, refused: Vec::new() })
    }

    /// Everything that shall be in force.
    fn wanted(&self, plans: &Plans) -> (Ruleset, Dirty) {
        let mut ruleset = Ruleset::new(self.config.clone(), &self.families);
        let updates = plans.iter().map(|(service, plan)| (service.clone(), Some(Arc::clone(plan))));
        let updates: Vec<Update> = updates.collect();
        let mut all = ruleset.take(&updates);
        all.extend(ruleset.fixed());
        (ruleset, all)
    }

    /// What has to change so that exactly `all` is in force.
    fn compare(&self, all: Dirty) -> Result<(Dirty, Vec<(Family, Hooks)>), IptablesError> {
        let (mut dirty, mut stale, mut hooks) = (all, Dirty::new(), Vec::new());
        for family in &self.families {
            let text = self.programs.save(*family, None)?;
            let saved = Saved::parse(&text);
            for (table, name) in saved.chains.keys() {
                let chain = Chain::new(*family, *table, *name);
                if !dirty.contains_key(&chain) {
                    stale.insert(chain, None);
                }
            }
            dirty.retain(|chain, lines| {
                let found = saved.chains.get(&(chain.table, &*chain.name));
                let same = matches!((found, lines), (Some(found), Some(lines)) if found == lines);
                chain.family != *family || !same
            });
            hooks.push((*family, hook_changes(&saved)));
        }
        dirty.extend(stale);
        Ok((dirty, hooks))
    }

    /// Puts changes in force and says how many rules and chains that were.
    fn write(
        &mut self,
        dirty: &Dirty,
        hooks: &[(Family, Hooks)],
        first: Table,
    ) -> Result<usize, IptablesError> {
        let (limit, none) = (self.programs.chains_per_transaction(), Hooks::new());
        let scripts: Vec<(Family, Script)> = self
            .families
            .iter()
            .map(|family| {
                let hooks = hooks.iter().find(|(of, _)| of == family).map_or(&none, |(_, h)| h);
                (*family, script(*family, dirty, hooks, limit, first))
            })
            .filter(|(_, script)| script.blocks > 0)
            .collect();
        let operations = scripts.iter().map(|(_, script)| script.operations).sum();
        let blocks = scripts.iter().map(|(_, script)| script.blocks).sum();
        let (programs, figures) = (&self.programs, &mut self.figures);
        self.alarm.during(operations, blocks, |pids| {
            for (family, script) in &scripts {
                programs
                    .restore(*family, script, pids)
                    .inspect_err(|_| figures.of_mut(*family).failures += 1)?;
            }
            Ok::<_, IptablesError>(())
        })??;
        Ok(operations)
    }

    fn apply_known(&mut self, changes: &[Change]) -> Result<Applied, IptablesError> {
        let updates: Vec<Update> =
            changes.iter().map(|change| (change.service.clone(), change.plan.clone())).collect();
        let operations = self.update(&updates)?;
        Ok(Applied { operations, refused: Vec::new() })
    }

    /// Takes plans over and puts them in force, or neither.
    fn update(&mut self, updates: &[Update]) -> Result<usize, IptablesError> {
        let undo: Vec<Update> = updates
            .iter()
            .rev()
            .map(|(service, _)| (service.clone(), self.ruleset.plan(service).cloned()))
            .collect();
        let dirty = self.ruleset.take(updates);
        if dirty.is_empty() {
            return Ok(0);
        }
        let first = self.counts.first_to_change(&dirty);
        let operations = self.write(&dirty, &[], first).inspect_err(|_| {
            self.ruleset.take(&undo);
        })?;
        self.counts.change(&dirty);
        self.counts.tell(&self.families, &dirty, &mut self.figures);
        Ok(operations)
    }

    /// A change of these families failed since `before`.
    fn note_partial_failures(&mut self, before: &Figures) {
        for family in Family::BOTH {
            let failed = self.figures.of(family).failures > before.of(family).failures;
            self.figures.of_mut(family).partial_failures += u64::from(failed);
        }
    }
}

/// Which rules of built-in chains have to come or go.
fn hook_changes(saved: &Saved<'_>) -> Hooks {
    let mut changes = Hooks::new();
    let mut found = [0u32; HOOKS.len()];
    for (table, chain, rule) in &saved.jumps {
        let ours = HOOKS.iter().position(|(of, hook, to)| {
            (of, hook) == (table, chain) && rule.strip_prefix("-j ") == Some(to)
        });
        match ours {
            Some(index) if found[index] == 0 => found[index] = 1,
            // Once too often, or from an older version.
            _ => changes.push((*table, format!("-D {chain} {rule}"))),
        }
    }
    for ((table, hook, to), _) in HOOKS.iter().zip(found).filter(|(_, count)| *count == 0) {
        // First, as kube-proxy does: whoever accepts everything comes later.
        changes.push((*table, format!("-I {hook} -j {to}")));
    }
    changes
}

/// One rule with each match and target that is used, to find out whether the kernel has them.
fn needs(family: Family) -> Script {
    let (range, icmp) = match family {
        Family::V4 => ("192.0.2.0/24", "icmp-port-unreachable"),
        Family::V6 => ("2001:db8::/64", "icmp6-port-unreachable"),
    };
    let rules = [
        "*nat".to_owned(),
        ":KEELSON-PROBE - [0:0]".to_owned(),
        "-A KEELSON-PROBE -p tcp -m statistic --mode random --probability 0.5 -j DNAT --to-destination :1".to_owned(),
        "-A KEELSON-PROBE -m recent --update --seconds 1 --reap --name KEELSON-PROBE --rsource -j RETURN".to_owned(),
        format!("-A KEELSON-PROBE -s {range} -m addrtype --dst-type LOCAL -m comment --comment a -j RETURN"),
        "-A KEELSON-PROBE -p sctp -m sctp --dport 1 -m conntrack --ctstate DNAT -j MARK --set-xmark 1/1".to_owned(),
        "-A KEELSON-PROBE -p udp -m udp --dport 1 -m mark --mark 1/1 -j MASQUERADE --random-fully".to_owned(),
        "COMMIT".to_owned(),
        "*filter".to_owned(),
        ":KEELSON-PROBE - [0:0]".to_owned(),
        "-A KEELSON-PROBE -p tcp -j REJECT --reject-with tcp-reset".to_owned(),
        format!("-A KEELSON-PROBE -j REJECT --reject-with {icmp}"),
        "COMMIT\n".to_owned(),
    ];
    Script { text: rules.join("\n"), blocks: 2, operations: 0 }
}

impl Backend for Iptables {
    fn adopt(&mut self, plans: &Plans) -> Result<Applied, BackendError> {
        for attempt in 1.. {
            match self.adopt_once(plans) {
                Err(IptablesError::Program(ProgramError::Failed { complaint, .. }))
                    if attempt < ATTEMPTS =>
                {
                    tracing::debug!(complaint, "Reading the rules again");
                }
                Err(IptablesError::Program(error @ ProgramError::Failed { .. })) => {
                    tracing::warn!(%error, "Looking for the Service that the kernel refuses");
                    return Ok(self.adopt_isolating(plans)?);
                }
                result => return Ok(result?),
            }
        }
        Ok(Applied::default())
    }

    fn apply(&mut self, changes: &[Change], plans: &Plans) -> Result<Applied, BackendError> {
        let before = self.figures.clone();
        match self.apply_known(changes) {
            Ok(applied) => Ok(applied),
            Err(error) => {
                tracing::warn!(%error, "Reading the rules again after a refused change");
                self.note_partial_failures(&before);
                self.adopt(plans)
            }
        }
    }

    fn configure(&mut self, config: BackendConfig) -> bool {
        let changed = self.config != config;
        self.config = config;
        changed
    }

    fn verify(&mut self, plans: &Plans) -> Result<Vec<Difference>, BackendError> {
        let (ruleset, all) = self.wanted(plans);
        let (dirty, hooks) = self.compare(all)?;
        let mut owners = std::collections::HashMap::new();
        for service in plans.keys() {
            owners
                .extend(ruleset.own_chains(service).into_iter().map(|(chain, _)| (chain, service)));
        }
        let mut differences: Vec<Difference> = dirty
            .iter()
            .map(|(chain, lines)| Difference {
                service: owners.get(chain).map(|service| (*service).clone()),
                what: match lines {
                    Some(_) => format!("{chain} is missing or has other rules"),
                    None => format!("{chain} belongs to no Service"),
                },
            })
            .collect();
        for (family, changes) in hooks {
            differences.extend(changes.into_iter().map(|(table, change)| Difference {
                service: None,
                what: format!("{family:?} table {}: needs {change}", table.name()),
            }));
        }
        Ok(differences)
    }

    fn alarm(&self) -> BorrowedFd<'_> {
        self.alarm.fd()
    }

    fn disturbed(&mut self) -> Result<bool, BackendError> {
        Ok(self.alarm.read()?)
    }

    fn cleanup(&mut self) -> Result<(), BackendError> {
        let programs = &self.programs;
        // How many transactions that takes does not matter: nothing of ours is left to worry about.
        self.alarm.during(usize::MAX, 0, |_| leftovers::remove_with(programs, &OURS))??;
        self.ruleset = Ruleset::new(self.config.clone(), &self.families);
        self.counts = Counts::default();
        Ok(())
    }

    fn take_figures(&mut self) -> Figures {
        std::mem::take(&mut self.figures)
    }
}
