//! All rules that are to be in force, and which chains a change touches. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use super::names::{Chain, HAIRPIN, Leaf, NODE_PORTS, SERVICES, Table, UNSERVED, UNSERVED_PORTS};
use super::rules::{LineKey, ServiceRules, rules_of};
use super::{fixed, names};
use crate::backend::BackendConfig;
use crate::model::{Family, ServiceKey, ServicePlan};

/// Chains to write, with all their rules, and chains to remove.
pub(crate) type Dirty = BTreeMap<Chain, Option<Vec<String>>>;

/// One Service's new plan, or nothing when it is gone.
pub(crate) type Update = (ServiceKey, Option<Arc<ServicePlan>>);

/// The rules of all Services.
///
/// Only what several Services share is kept as text; a Service's own chains are made from its plan
/// when they are needed.
#[derive(Debug)]
pub(crate) struct Ruleset {
    config: BackendConfig,
    families: Vec<Family>,
    plans: HashMap<ServiceKey, Arc<ServicePlan>>,
    leaves: BTreeMap<Leaf, BTreeMap<LineKey, Vec<String>>>,
    /// How many Service ports have an endpoint with that address on this node.
    hairpins: Counter<IpAddr>,
}

impl Ruleset {
    pub(crate) fn new(config: BackendConfig, families: &[Family]) -> Self {
        Ruleset {
            config,
            families: families.to_vec(),
            plans: HashMap::new(),
            leaves: BTreeMap::new(),
            hairpins: Counter::default(),
        }
    }

    /// The plan that is in force for a Service.
    pub(crate) fn plan(&self, service: &ServiceKey) -> Option<&Arc<ServicePlan>> {
        self.plans.get(service)
    }

    /// Takes new plans over and says which chains that changes.
    pub(crate) fn take(&mut self, updates: &[Update]) -> Dirty {
        let mut dirty = Dirty::new();
        let mut touched = Touched::default();
        let mut added = Vec::new();
        // A frontend may go from one Service to another: first everything is taken away, then added.
        for (service, plan) in updates {
            let before = match plan {
                Some(plan) => self.plans.insert(service.clone(), Arc::clone(plan)),
                None => self.plans.remove(service),
            };
            let old = before.as_deref().map(|plan| self.rules(service, plan)).unwrap_or_default();
            let new = plan.as_deref().map(|plan| self.rules(service, plan)).unwrap_or_default();
            compare_chains(old.chains, new.chains, &mut dirty);
            for (leaf, key, lines) in &old.lines {
                if !new.lines.contains(&(*leaf, *key, lines.clone())) {
                    self.remove_line(*leaf, *key, &mut touched);
                }
            }
            added.extend(new.lines);
            self.count(before.as_deref(), plan.as_deref(), &mut touched);
        }
        for (leaf, key, lines) in added {
            self.add_line(leaf, key, lines, &mut touched);
        }
        self.render(&touched, &mut dirty);
        dirty
    }

    /// The chains that are there however many Services there are.
    pub(crate) fn fixed(&self) -> Dirty {
        let chains = self.families.iter().flat_map(|family| fixed::names(*family));
        chains.map(|chain| (chain.clone(), Some(self.fixed_chain(&chain)))).collect()
    }

    /// Names of all chains that shall exist.
    pub(crate) fn own_chains(&self, service: &ServiceKey) -> Vec<(Chain, Vec<String>)> {
        let plan = self.plans.get(service);
        plan.map(|plan| self.rules(service, plan).chains).unwrap_or_default()
    }

    fn rules(&self, service: &ServiceKey, plan: &ServicePlan) -> ServiceRules {
        let mut rules = rules_of(service, plan, &self.config.pods);
        let known = |family| self.families.contains(&family);
        rules.chains.retain(|(chain, _)| known(chain.family));
        rules.lines.retain(|(leaf, _, _)| known(leaf.family));
        rules
    }

    fn add_line(&mut self, leaf: Leaf, key: LineKey, lines: Vec<String>, touched: &mut Touched) {
        let entries = self.leaves.entry(leaf).or_default();
        if entries.is_empty() {
            touched.ways.insert(leaf);
        }
        if entries.get(&key) != Some(&lines) {
            entries.insert(key, lines);
            touched.leaves.insert(leaf);
        }
    }

    fn remove_line(&mut self, leaf: Leaf, key: LineKey, touched: &mut Touched) {
        let Some(entries) = self.leaves.get_mut(&leaf) else { return };
        entries.remove(&key);
        touched.leaves.insert(leaf);
        if entries.is_empty() {
            self.leaves.remove(&leaf);
            touched.ways.insert(leaf);
        }
    }

    /// Several Services may have the same pod as endpoint.
    fn count(
        &mut self,
        before: Option<&ServicePlan>,
        after: Option<&ServicePlan>,
        touched: &mut Touched,
    ) {
        for address in after.map(|plan| self.hairpin_addresses(plan)).unwrap_or_default() {
            if self.hairpins.add(address) {
                touched.hairpins.insert(Family::of(address));
            }
        }
        for address in before.map(|plan| self.hairpin_addresses(plan)).unwrap_or_default() {
            if self.hairpins.remove(address) {
                touched.hairpins.insert(Family::of(address));
            }
        }
    }

    fn hairpin_addresses(&self, plan: &ServicePlan) -> Vec<IpAddr> {
        let here = plan.ports.iter().flat_map(|port| port.here.iter().copied());
        here.filter(|address| self.families.contains(&Family::of(*address))).collect()
    }

    fn render(&self, touched: &Touched, dirty: &mut Dirty) {
        for leaf in &touched.leaves {
            let lines = self.leaves.get(leaf);
            let lines = lines.map(|entries| entries.values().flatten().cloned().collect());
            dirty.insert(leaf.chain(), lines);
        }
        for leaf in &touched.ways {
            let in_branch: Vec<String> =
                self.in_branch(leaf).map(|leaf| leaf.leaf_rule()).collect();
            let lines = (!in_branch.is_empty()).then_some(in_branch);
            dirty.insert(leaf.branch_chain(), lines);
            let root = leaf.root_chain();
            let lines = self.fixed_chain(&root);
            dirty.insert(root, Some(lines));
        }
        for family in &touched.hairpins {
            let chain = Chain::new(*family, Table::Nat, HAIRPIN);
            let lines = self.fixed_chain(&chain);
            dirty.insert(chain, Some(lines));
        }
    }

    fn in_branch(&self, leaf: &Leaf) -> impl Iterator<Item = &Leaf> {
        let ends = Leaf { slot: 0, ..*leaf }..=Leaf { slot: 15, ..*leaf };
        self.leaves.range(ends).map(|(leaf, _)| leaf)
    }

    /// The rules that lead from a root chain to its branches.
    fn branches(&self, family: Family, table: Table, by_port: bool) -> Vec<String> {
        let mut rules = Vec::new();
        let mut last = None;
        for leaf in self.leaves.keys().filter(|leaf| (leaf.family, leaf.table) == (family, table)) {
            if matches!(leaf.branch, names::Branch::Port(..)) == by_port
                && last != Some(leaf.branch)
            {
                last = Some(leaf.branch);
                rules.push(leaf.branch_rule());
            }
        }
        rules
    }

    fn fixed_chain(&self, chain: &Chain) -> Vec<String> {
        let (family, config) = (chain.family, &self.config);
        match &*chain.name {
            SERVICES => {
                let mut lines = self.branches(family, Table::Nat, false);
                // Last: a node port's number on a Service's address means something else.
                lines.extend(fixed::to_node_ports(config, family, NODE_PORTS));
                lines
            }
            UNSERVED => {
                let mut lines = vec!["-m conntrack --ctstate DNAT -j RETURN".to_owned()];
                lines.extend(self.branches(family, Table::Filter, false));
                lines.extend(fixed::unassigned(config, family));
                lines.extend(fixed::to_node_ports(config, family, UNSERVED_PORTS));
                lines
            }
            NODE_PORTS => self.branches(family, Table::Nat, true),
            UNSERVED_PORTS => self.branches(family, Table::Filter, true),
            HAIRPIN => fixed::hairpins(self.hairpins.sorted(family)),
            name => fixed::rules(config, family, name),
        }
    }
}

fn compare_chains(
    old: Vec<(Chain, Vec<String>)>,
    new: Vec<(Chain, Vec<String>)>,
    dirty: &mut Dirty,
) {
    let mut old: BTreeMap<Chain, Vec<String>> = old.into_iter().collect();
    for (chain, lines) in new {
        if old.remove(&chain).as_ref() != Some(&lines) {
            dirty.insert(chain, Some(lines));
        }
    }
    for chain in old.into_keys() {
        // Another Service's chain cannot have the name, since the Service's name is hashed in.
        dirty.entry(chain).or_insert(None);
    }
}

#[derive(Debug, Default)]
struct Touched {
    leaves: BTreeSet<Leaf>,
    /// Leaves that came or went: the way to them changes.
    ways: BTreeSet<Leaf>,
    hairpins: BTreeSet<Family>,
}

/// Counts how often something is wanted.
#[derive(Debug)]
struct Counter<T>(HashMap<T, u32>);

impl<T> Default for Counter<T> {
    fn default() -> Self {
        Counter(HashMap::new())
    }
}

impl<T: Eq + Hash> Counter<T> {
    /// True for the first.
    fn add(&mut self, item: T) -> bool {
        let count = self.0.entry(item).or_default();
        *count += 1;
        *count == 1
    }

    /// True for the last.
    fn remove(&mut self, item: T) -> bool {
        let Some(count) = self.0.get_mut(&item) else { return false };
        *count -= 1;
        let last = *count == 0;
        if last {
            self.0.remove(&item);
        }
        last
    }
}

impl Counter<IpAddr> {
    fn sorted(&self, family: Family) -> BTreeSet<IpAddr> {
        self.0.keys().copied().filter(|address| Family::of(*address) == family).collect()
    }
}
