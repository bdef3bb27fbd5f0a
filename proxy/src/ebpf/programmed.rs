//! What is in force for a Service, and how changes of several go into the kernel together. Pure.

use std::collections::HashSet;
use std::sync::Arc;

use super::item::{Item, Key, Operations, guard_item, items_of};
use super::numbering::{Before, NumberedPool, NumberedPort, is_same_port};
use super::sizes::Amounts;
use crate::model::{PortPlan, Scope, ServiceKey, ServicePlan};

/// What is in force for one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Programmed {
    pub(crate) plan: Arc<ServicePlan>,
    pub(crate) ports: Box<[NumberedPort]>,
}

impl Programmed {
    /// Its elements, in order.
    pub(crate) fn items(&self) -> Vec<Item> {
        let mut items = Vec::new();
        for (plan, numbers) in self.plan.ports.iter().zip(&self.ports) {
            items_of(plan, numbers, &mut items);
        }
        items.extend(self.plan.guarded.iter().map(|address| guard_item(*address)));
        items.sort_unstable();
        // Frontends of one port may let the same sources in.
        items.dedup();
        items
    }

    /// Numbers of its ports.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u32> {
        self.ports.iter().map(|port| port.number).filter(|number| *number != 0)
    }
}

impl Before for Option<&Programmed> {
    fn pool(&mut self, port: &PortPlan, scope: Scope) -> Option<NumberedPool> {
        let before = self.as_ref()?;
        let same = |p: &PortPlan| {
            (&p.name, p.protocol, p.family, p.affinity_secs)
                == (&port.name, port.protocol, port.family, port.affinity_secs)
        };
        let index = before.plan.ports.iter().position(same)?;
        before.ports.get(index)?.pool(scope).cloned()
    }

    fn number(&mut self, port: &PortPlan) -> Option<u32> {
        let before = self.as_ref()?;
        let index = before.plan.ports.iter().position(|before| is_same_port(before, port))?;
        before.ports.get(index).map(|numbered| numbered.number).filter(|number| *number != 0)
    }
}

/// A Service's change on its way into the kernel.
pub(crate) struct Pending {
    pub(crate) service: ServiceKey,
    pub(crate) before: Option<Programmed>,
    pub(crate) after: Option<Programmed>,
    pub(crate) operations: Operations,
    /// What it puts where nothing was.
    pub(crate) adds: Amounts,
}

impl Pending {
    /// From what is in force to what shall be.
    pub(crate) fn replace(
        service: ServiceKey,
        before: Option<Programmed>,
        after: Option<Programmed>,
    ) -> Self {
        let items = |of: Option<&Programmed>| of.map(Programmed::items).unwrap_or_default();
        let (from, to) = (items(before.as_ref()), items(after.as_ref()));
        let operations = Operations::replace(&from, &to);
        let keys = to.iter().map(Item::key);
        let new: Vec<Key> =
            keys.filter(|key| from.binary_search_by_key(key, Item::key).is_err()).collect();
        let adds = Amounts::of_keys(new.iter());
        Pending { service, before, after, operations, adds }
    }

    pub(crate) fn removes(&self) -> Amounts {
        Amounts::of_keys(self.operations.deletes.iter())
    }

    /// What it removes where all changes write these.
    fn gives_up(&self, written: &HashSet<Key>) -> impl Iterator<Item = Key> {
        self.operations.deletes.iter().copied().filter(|key| !written.contains(key))
    }

    /// What it does by itself where all changes write these.
    pub(crate) fn alone(&self, written: &HashSet<Key>) -> Operations {
        let puts = self.operations.puts.clone();
        Operations { puts, deletes: self.gives_up(written).collect() }
    }

    pub(crate) fn removes_members(&self) -> bool {
        self.operations.deletes.iter().any(|key| matches!(key, Key::Member(_)))
    }
}

/// What changes write. A key that one Service gives up may be another one's then.
pub(crate) fn written(all: &[Pending]) -> HashSet<Key> {
    all.iter().flat_map(|pending| pending.operations.puts.iter().map(Item::key)).collect()
}

/// All changes at once: everything is written before anything is removed.
pub(crate) fn together(all: &[Pending], written: &HashSet<Key>) -> Operations {
    let mut puts: Vec<Item> = all.iter().flat_map(|p| p.operations.puts.iter().copied()).collect();
    puts.sort_unstable();
    let mut deletes: Vec<Key> = all.iter().flat_map(|pending| pending.gives_up(written)).collect();
    deletes.sort_unstable_by(|a, b| b.cmp(a));
    Operations { puts, deletes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_service_takes_over_is_not_removed() {
        let pending = |name, puts: &[Item], deletes: &[Key]| Pending {
            service: ServiceKey::new("ns", name),
            before: None,
            after: None,
            operations: Operations { puts: puts.to_vec(), deletes: deletes.to_vec() },
            adds: Amounts::default(),
        };
        let [moved, gone] = ["10.96.0.1", "10.96.0.2"].map(|ip| guard_item(ip.parse().unwrap()));
        let all = [pending("heir", &[moved], &[]), pending("old", &[], &[moved.key(), gone.key()])];
        let written = written(&all);
        let expected = Operations { puts: vec![moved], deletes: vec![gone.key()] };
        assert_eq!(together(&all, &written), expected);
        let [heir, old] = all.map(|pending| pending.alone(&written));
        assert_eq!(heir, Operations { puts: vec![moved], deletes: vec![] });
        assert_eq!(old, Operations { puts: vec![], deletes: vec![gone.key()] });
    }
}
