//! Changes as text for `iptables-restore`. Pure.

use super::names::{Chain, Table};
use super::ruleset::Dirty;
use crate::model::Family;

/// What a change does to the built-in chains: `-I PREROUTING -j KEELSON-SERVICES` and the like.
pub(crate) type Hooks = Vec<(Table, String)>;

/// Text for one run of `iptables-restore --noflush`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Script {
    pub(crate) text: String,
    /// How many transactions the text consists of.
    pub(crate) blocks: u32,
    /// Rules written and chains removed.
    pub(crate) operations: usize,
}

/// One family's part of a change. No transaction names more than `limit` chains.
///
/// A change that fits into one transaction per table happens at one moment there. A bigger one goes
/// from what is referred to towards what refers to it, and removes in the opposite order, so that after
/// each transaction, wherever the process is killed, every rule leads to a chain that is filled.
///
/// `first` is the table that changes before the others.
pub(crate) fn script(
    family: Family,
    dirty: &Dirty,
    hooks: &Hooks,
    limit: usize,
    first: Table,
) -> Script {
    let mut script = Script::default();
    let others = Table::ALL.into_iter().filter(|table| *table != first);
    for table in std::iter::once(first).chain(others) {
        let ours = |(chain, _): &(&Chain, _)| (chain.family, chain.table) == (family, table);
        let mut changed: Vec<(&Chain, Option<&Vec<String>>)> =
            dirty.iter().map(|(chain, lines)| (chain, lines.as_ref())).filter(ours).collect();
        changed.sort_by_key(|(chain, lines)| match lines {
            Some(_) => (false, chain.rank()),
            None => (true, u8::MAX - chain.rank()),
        });
        let hooks: Vec<&str> =
            hooks.iter().filter(|(of, _)| *of == table).map(|(_, line)| &**line).collect();
        // The hooks come when all that they lead to is there, and before anything goes.
        let written = changed.partition_point(|(_, lines)| lines.is_some());
        if changed.len() <= limit {
            script.block(table, &changed, &hooks);
            continue;
        }
        let (write, remove) = changed.split_at(written);
        write.chunks(limit).for_each(|part| script.block(table, part, &[]));
        script.block(table, &[], &hooks);
        remove.chunks(limit).for_each(|part| script.block(table, part, &[]));
    }
    script
}

impl Script {
    fn block(&mut self, table: Table, chains: &[(&Chain, Option<&Vec<String>>)], hooks: &[&str]) {
        if chains.is_empty() && hooks.is_empty() {
            return;
        }
        self.blocks += 1;
        self.line(&["*", table.name()]);
        // Without --noflush this would only declare; with it, it makes the chain or empties it.
        for (chain, _) in chains {
            self.line(&[":", &chain.name, " - [0:0]"]);
        }
        for (chain, lines) in chains {
            for line in lines.iter().copied().flatten() {
                self.line(&["-A ", &chain.name, " ", line]);
                self.operations += 1;
            }
        }
        for hook in hooks {
            self.line(&[hook]);
            self.operations += 1;
        }
        for (chain, _) in chains.iter().filter(|(_, lines)| lines.is_none()) {
            self.line(&["-X ", &chain.name]);
            self.operations += 1;
        }
        self.line(&["COMMIT"]);
    }

    fn line(&mut self, parts: &[&str]) {
        parts.iter().for_each(|part| self.text.push_str(part));
        self.text.push('\n');
    }
}
