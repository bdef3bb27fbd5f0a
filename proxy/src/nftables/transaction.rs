//! Collects elements to remove and to add, and encodes them as one batch. Pure.

use std::collections::{BTreeMap, HashSet};

use keelson_netlink::nft::{Batch, Element, Table, Value, Verdict};

use super::item::{Item, Key, Val};
use super::layout::{Chain, Map, Setup};
use crate::model::Family;

/// What one Service's change does to the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Operations {
    pub(crate) deletes: Vec<Item>,
    pub(crate) adds: Vec<Item>,
}

impl Operations {
    pub(crate) fn len(&self) -> usize {
        self.deletes.len() + self.adds.len()
    }

    /// From one sorted list of elements to another.
    pub(crate) fn replace(before: &[Item], after: &[Item]) -> Self {
        let mut operations = Operations::default();
        let (mut old, mut new) = (before.iter().peekable(), after.iter().peekable());
        loop {
            match (old.peek(), new.peek()) {
                (Some(a), Some(b)) if a == b => {
                    old.next();
                    new.next();
                }
                (Some(a), Some(b)) if a < b => operations.deletes.extend(old.next()),
                (_, Some(_)) => operations.adds.extend(new.next()),
                (Some(_), None) => operations.deletes.extend(old.next()),
                (None, None) => return operations,
            }
        }
    }
}

/// One batch of several Services' operations; chains that are needed but not `known` are made first
/// and come back.
pub(crate) fn encode<'o>(
    parts: impl IntoIterator<Item = &'o Operations>,
    known: &HashSet<Chain>,
    setup: &Setup,
) -> (Batch, HashSet<Chain>) {
    let mut deletes: BTreeMap<(Map, Family), Vec<&Item>> = BTreeMap::new();
    let mut adds: BTreeMap<(Map, Family), Vec<&Item>> = BTreeMap::new();
    let mut targets: HashSet<Chain> = HashSet::new();
    for operations in parts {
        for item in &operations.deletes {
            deletes.entry((item.map, item.family)).or_default().push(item);
        }
        for item in &operations.adds {
            adds.entry((item.map, item.family)).or_default().push(item);
            if let Val::Goto(chain) = item.val {
                targets.insert(chain);
            }
        }
    }
    let (table, mut batch) = (setup.role.table(), Batch::new());
    let mut new_chains: Vec<Chain> = targets.difference(known).copied().collect();
    new_chains.sort_unstable();
    for chain in &new_chains {
        add_chain(&mut batch, table, *chain, setup);
    }
    let names = targets.iter().map(|chain| (*chain, chain.to_string())).collect();
    // A value is changed by removing the element and adding it again: so removals first.
    for ((map, family), items) in &deletes {
        let encoded: Vec<_> = items.iter().map(|item| element(item, &names)).collect();
        batch.delete_elements(table, map.name(*family), encoded.iter().map(Encoded::borrow));
    }
    for ((map, family), items) in &adds {
        let encoded: Vec<_> = items.iter().map(|item| element(item, &names)).collect();
        batch.add_elements(table, map.name(*family), encoded.iter().map(Encoded::borrow));
    }
    (batch, new_chains.into_iter().collect())
}

/// Makes a chain that is not a base chain, with its rules.
pub(crate) fn add_chain(batch: &mut Batch, table: Table<'_>, chain: Chain, setup: &Setup) {
    let name = chain.to_string();
    batch.add_chain(table, &name, chain.base());
    for rule in chain.rules(setup) {
        batch.add_rule(table, &name, &rule);
    }
}

type Names = std::collections::HashMap<Chain, String>;

/// An element whose value has the kernel's form.
struct Encoded<'a> {
    key: &'a Key,
    last: Option<&'a Key>,
    value: Key,
    verdict: Option<Verdict<'a>>,
}

fn element<'a>(item: &'a Item, names: &'a Names) -> Encoded<'a> {
    let (value, verdict) = match item.val {
        Val::None | Val::Foreign => (Key::new(), None),
        Val::Number(number) => (Key::new().number(number), None),
        Val::Endpoint(endpoint) => (Key::new().endpoint(endpoint), None),
        Val::Goto(chain) => {
            (Key::new(), names.get(&chain).map(|name| Verdict::Goto(name.as_str())))
        }
        Val::Drop => (Key::new(), Some(Verdict::Drop)),
    };
    Encoded { key: &item.key, last: item.last.as_ref(), value, verdict }
}

impl Encoded<'_> {
    fn borrow(&self) -> Element<'_> {
        let value = match self.verdict {
            Some(verdict) => Value::Verdict(verdict),
            None if self.value.as_bytes().is_empty() => Value::None,
            None => Value::Bytes(self.value.as_bytes()),
        };
        Element {
            key: self.key.as_bytes(),
            last: self.last.map(Key::as_bytes),
            value,
            timeout: None,
        }
    }
}
