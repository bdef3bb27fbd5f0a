//! Who owns whom: pure bookkeeping over the metadata of all objects, and the decision about one of them.
//!
//! Only objects that have owners, or that wait for their dependents, are kept.

use std::collections::{BTreeSet, HashMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use crate::Propagation;
use crate::controllers::cluster::Key;
use crate::kinds::{self, Kind};

pub(crate) const FOREGROUND: &str = "foregroundDeletion";
pub(crate) const ORPHAN: &str = "orphan";

/// An object of any kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Id {
    pub(crate) kind: usize,
    pub(crate) key: Key,
}

impl Id {
    pub(crate) fn kind(&self) -> &'static Kind {
        kinds::all()[self.kind]
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.kind().qualified(), self.key)
    }
}

/// What matters of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) uid: String,
    pub(crate) owners: Vec<(String, bool)>,
    pub(crate) deleting: bool,
    pub(crate) finalizers: Vec<String>,
}

impl Entry {
    pub(crate) fn of(meta: &ObjectMeta) -> Self {
        let owner =
            |owner: &OwnerReference| (owner.uid.clone(), owner.block_owner_deletion == Some(true));
        Self {
            uid: meta.uid.clone().unwrap_or_default(),
            owners: meta.owner_references.iter().flatten().map(owner).collect(),
            deleting: meta.deletion_timestamp.is_some(),
            finalizers: meta.finalizers.clone().unwrap_or_default(),
        }
    }

    /// Whether the object is being deleted and waits for this finalizer, which is ours to remove.
    pub(crate) fn waits_for(&self, finalizer: &str) -> bool {
        self.deleting && self.finalizers.iter().any(|held| held == finalizer)
    }

    fn is_worth_keeping(&self) -> bool {
        !self.owners.is_empty() || self.waits_for(FOREGROUND) || self.waits_for(ORPHAN)
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    entries: HashMap<Id, Entry>,
    dependents: HashMap<String, BTreeSet<Id>>,
    waiting: HashMap<String, Id>,
}

impl Graph {
    /// Takes note of an object as it is. Returns which objects need a look now.
    pub(crate) fn put(&mut self, id: Id, entry: Entry) -> Vec<Id> {
        let before = self.take(&id);
        if before.as_ref() == Some(&entry) {
            self.insert(id, entry);
            return Vec::new();
        }
        let mut look = Vec::new();
        // A dependent that is newly being deleted, or no longer one, may be what its owner waits for.
        let owners = entry.owners.iter().chain(before.iter().flat_map(|before| &before.owners));
        look.extend(owners.filter_map(|(uid, _)| self.waiting.get(uid).cloned()));
        if entry.is_worth_keeping() {
            look.push(id.clone());
            let starts = entry.waits_for(FOREGROUND)
                && before.is_none_or(|before| !before.waits_for(FOREGROUND));
            if starts {
                look.extend(self.dependents_of(&entry.uid));
            }
        }
        self.insert(id, entry);
        look
    }

    /// Takes note that an object is gone. Returns which objects need a look now.
    pub(crate) fn gone(&mut self, id: &Id, uid: &str) -> Vec<Id> {
        let before = self.take(id);
        let owners = before.iter().flat_map(|before| &before.owners);
        let mut look: Vec<Id> =
            owners.filter_map(|(uid, _)| self.waiting.get(uid).cloned()).collect();
        look.extend(self.dependents_of(uid));
        look
    }

    pub(crate) fn dependents_of(&self, uid: &str) -> Vec<Id> {
        self.dependents.get(uid).into_iter().flatten().cloned().collect()
    }

    /// How many dependents keep their owner from going first.
    pub(crate) fn blocking(&self, uid: &str) -> usize {
        let blocks = |id: &Id| {
            self.entries.get(id).is_some_and(|entry| {
                entry.owners.iter().any(|(owner, blocks)| owner == uid && *blocks)
            })
        };
        self.dependents_of(uid).iter().filter(|id| blocks(id)).count()
    }

    /// All objects of a kind that are kept, to find those which a list no longer shows.
    pub(crate) fn of_kind(&self, kind: usize) -> Vec<(Id, String)> {
        let entries = self.entries.iter().filter(|(id, _)| id.kind == kind);
        entries.map(|(id, entry)| (id.clone(), entry.uid.clone())).collect()
    }

    fn insert(&mut self, id: Id, entry: Entry) {
        if !entry.is_worth_keeping() {
            return;
        }
        for (owner, _) in &entry.owners {
            self.dependents.entry(owner.clone()).or_default().insert(id.clone());
        }
        if entry.waits_for(FOREGROUND) || entry.waits_for(ORPHAN) {
            self.waiting.insert(entry.uid.clone(), id.clone());
        }
        self.entries.insert(id, entry);
    }

    fn take(&mut self, id: &Id) -> Option<Entry> {
        let entry = self.entries.remove(id)?;
        self.waiting.remove(&entry.uid);
        for (owner, _) in &entry.owners {
            if let Some(dependents) = self.dependents.get_mut(owner) {
                dependents.remove(id);
                if dependents.is_empty() {
                    self.dependents.remove(owner);
                }
            }
        }
        Some(entry)
    }
}

/// How an owner is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// It is there.
    Solid,
    /// It is not there, or is another object of the same name.
    Absent,
    /// It is being deleted and waits for its dependents.
    Waiting,
}

/// What becomes of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Keep,
    /// It goes, its own dependents in this way.
    Delete(Propagation),
    /// It stays, for the owners that are left; these uids are taken out of its references.
    DropOwners(Vec<String>),
}

/// Decides about an object by its owners (uid and state).
pub(crate) fn judge(entry: &Entry, owners: &[(String, Owner)], has_dependents: bool) -> Verdict {
    if entry.deleting || owners.is_empty() {
        return Verdict::Keep;
    }
    let of = |state: Owner| owners.iter().filter(move |(_, owner)| *owner == state);
    if of(Owner::Solid).next().is_some() {
        let gone: Vec<String> =
            of(Owner::Absent).chain(of(Owner::Waiting)).map(|(uid, _)| uid.clone()).collect();
        return if gone.is_empty() { Verdict::Keep } else { Verdict::DropOwners(gone) };
    }
    if of(Owner::Waiting).next().is_some() && has_dependents {
        return Verdict::Delete(Propagation::Foreground);
    }
    // A finalizer that is on the object already says how it wants to go.
    let has = |finalizer: &str| entry.finalizers.iter().any(|held| held == finalizer);
    Verdict::Delete(if has(ORPHAN) {
        Propagation::Orphan
    } else if has(FOREGROUND) {
        Propagation::Foreground
    } else {
        Propagation::Background
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> Id {
        Id { kind: 0, key: Key::new("n", name) }
    }

    fn entry(uid: &str, owners: &[(&str, bool)], finalizers: &[&str], deleting: bool) -> Entry {
        Entry {
            uid: uid.into(),
            owners: owners.iter().map(|(uid, blocks)| ((*uid).into(), *blocks)).collect(),
            deleting,
            finalizers: finalizers.iter().map(|name| (*name).into()).collect(),
        }
    }

    #[test]
    fn only_objects_without_a_living_owner_go() {
        let own = |states: &[Owner]| -> Vec<(String, Owner)> {
            states.iter().enumerate().map(|(n, state)| (n.to_string(), *state)).collect()
        };
        use Owner::{Absent, Solid, Waiting};
        let plain = entry("x", &[], &[], false);
        let table = [
            (&plain, own(&[]), false, Verdict::Keep),
            (&plain, own(&[Solid]), false, Verdict::Keep),
            (
                &plain,
                own(&[Solid, Absent, Waiting]),
                false,
                Verdict::DropOwners(vec!["1".into(), "2".into()]),
            ),
            (&plain, own(&[Absent]), true, Verdict::Delete(Propagation::Background)),
            (&plain, own(&[Waiting]), false, Verdict::Delete(Propagation::Background)),
            (&plain, own(&[Waiting]), true, Verdict::Delete(Propagation::Foreground)),
        ];
        for (number, (entry, owners, has_dependents, want)) in table.into_iter().enumerate() {
            assert_eq!(judge(entry, &owners, has_dependents), want, "row {number}");
        }
        let leaving = entry("x", &[], &[], true);
        assert_eq!(judge(&leaving, &own(&[Absent]), false), Verdict::Keep);
        let orphaning = entry("x", &[], &[ORPHAN], false);
        assert_eq!(judge(&orphaning, &own(&[Absent]), false), Verdict::Delete(Propagation::Orphan));
    }

    #[test]
    fn a_gone_owner_brings_its_dependents_and_a_gone_dependent_its_waiting_owner() {
        let mut graph = Graph::default();
        assert_eq!(graph.put(id("rs"), entry("rs", &[("d", true)], &[], false)), [id("rs")]);
        assert_eq!(graph.put(id("rs"), entry("rs", &[("d", true)], &[], false)), []);
        assert_eq!(graph.gone(&id("d"), "d"), [id("rs")]);
        // A deployment that goes in the foreground waits, and its dependents get a look.
        let waiting = entry("d", &[], &[FOREGROUND], true);
        assert_eq!(graph.put(id("d"), waiting), [id("d"), id("rs")]);
        assert_eq!(graph.blocking("d"), 1);
        assert_eq!(graph.gone(&id("rs"), "rs"), [id("d")]);
        assert_eq!((graph.blocking("d"), graph.dependents_of("d").len()), (0, 0));
        // An object without owners and finalizers is not kept.
        assert_eq!(graph.put(id("x"), entry("x", &[], &[], false)), []);
        assert_eq!(graph.of_kind(0).len(), 1);
    }
}
