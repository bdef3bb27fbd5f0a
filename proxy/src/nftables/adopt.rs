//! Start and repair: reads the table, keeps what is right, mends what is not.

mod observed;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use keelson_netlink::nft::{Batch, ChainFound, ElementFound, NftError, SetFound};

use super::commit::OPERATIONS_PER_TRANSACTION;
use super::item::{Item, Pool, Pools, guard_item, hairpin_item, items_of, pool_items, wanted_pool};
use super::layout::{Chain, Map, Role, STAMP, stamps_of};
use super::ranges::{boundaries, keys, node_port_ranges};
use super::transaction::Operations;
use super::{Nftables, NftablesError, Pending, Programmed};
use crate::backend::{Applied, Difference};
use crate::diff::{Plans, sorted};
use crate::model::{Family, PortPlan, Scope, ServiceKey, ServicePlan};
use observed::{Observed, was_sticky};

impl Nftables {
    /// One attempt to make the kernel's table equal to the plans.
    pub(super) fn adopt_once(&mut self, plans: &Plans) -> Result<Applied, NftablesError> {
        let repairs = self.repair_structure()?;
        let mut observed = self.observe()?;
        self.start_from(&observed);
        let mut claimed = HashSet::new();
        let mut waiting = Vec::new();
        let mut applied = Applied { operations: repairs, ..Applied::default() };
        for (service, plan) in sorted(plans) {
            waiting.push(self.compare(service, plan, &mut observed, &mut claimed));
            self.commit_if_full(&mut waiting, &mut applied)?;
        }
        self.commit_all(&mut waiting, &mut applied)?;
        applied.operations += self.delete_all(observed.leftovers())?;
        Ok(applied)
    }

    /// What [`Nftables::adopt_once`] would change.
    pub(super) fn differences(&mut self, plans: &Plans) -> Result<Vec<Difference>, NftablesError> {
        let mut differences = Vec::new();
        let mut differs = |service: Option<&ServiceKey>, what: String| {
            differences.push(Difference { service: service.cloned(), what });
        };
        let chains = self.chains.clone();
        let structure = self.structure();
        self.chains = chains;
        let (structure, _) = structure?;
        if !structure.is_empty() {
            let (name, count) = (self.table().name, structure.operations());
            differs(None, format!("table inet {name}: {count} maps, chains or rules differ"));
        }
        let mut observed = match self.observe() {
            Ok(observed) => observed,
            Err(NftablesError::Observe(error)) if error.is_not_found() => return Ok(differences),
            Err(error) => return Err(error),
        };
        let kept = (
            std::mem::take(&mut self.programmed),
            std::mem::take(&mut self.hairpin),
            self.next_pool,
        );
        self.start_from(&observed);
        let mut claimed = HashSet::new();
        for (service, plan) in sorted(plans) {
            let pending = self.compare(service, plan, &mut observed, &mut claimed);
            for item in &pending.operations.adds {
                differs(Some(service), format!("missing in {item}"));
            }
            for item in &pending.operations.deletes {
                differs(Some(service), format!("in vain in {item}"));
            }
        }
        for item in observed.leftovers() {
            differs(None, format!("belongs to no Service in {item}"));
        }
        (self.programmed, self.hairpin, self.next_pool) = kept;
        Ok(differences)
    }

    fn start_from(&mut self, observed: &Observed) {
        self.programmed.clear();
        self.hairpin.clear();
        self.next_pool = observed.greatest_pool.wrapping_add(1).max(1);
    }

    /// What must change for one Service.
    fn compare(
        &mut self,
        service: &ServiceKey,
        plan: &Arc<ServicePlan>,
        observed: &mut Observed,
        claimed: &mut HashSet<u32>,
    ) -> Pending {
        let pools = self.recognise_pools(plan, observed, claimed);
        let mut items = Vec::new();
        for (port, pools) in plan.ports.iter().zip(&pools) {
            items_of(&self.setup, port, pools, &mut items);
        }
        for address in plan.ports.iter().flat_map(|port| &port.here) {
            let count = self.hairpin.entry(*address).or_default();
            *count += 1;
            if *count == 1 {
                items.push(hairpin_item(*address));
            }
        }
        items.extend(plan.guarded.iter().map(|address| guard_item(*address)));
        let mut operations = Operations::default();
        for item in &items {
            observed.settle(item, &mut operations);
        }
        for item in items.iter().filter(|item| item.map == Map::Restricted) {
            observed.remove_other_sources(item, &items, &mut operations);
        }
        let after = Some(Programmed { plan: Arc::clone(plan), pools });
        Pending { service: service.clone(), before: None, after, operations }
    }

    /// Numbers and slots as the kernel has them, where the pool can be recognised by its frontends.
    fn recognise_pools(
        &mut self,
        plan: &ServicePlan,
        observed: &Observed,
        claimed: &mut HashSet<u32>,
    ) -> Box<[Pools]> {
        plan.ports
            .iter()
            .map(|port| {
                let mut recognise = |scope| self.recognise_pool(port, scope, observed, claimed);
                Pools { cluster: recognise(Scope::Cluster), local: recognise(Scope::Local) }
            })
            .collect()
    }

    fn recognise_pool(
        &mut self,
        port: &PortPlan,
        scope: Scope,
        observed: &Observed,
        claimed: &mut HashSet<u32>,
    ) -> Option<Pool> {
        let wanted = wanted_pool(&self.setup, port, scope)?;
        let number = pool_items(&self.setup, port, scope)
            .filter(|(map, key)| was_sticky(observed, port, *map, *key) == port.affinity_secs)
            .filter_map(|item| observed.pool_number(port.family, item))
            .find(|number| !claimed.contains(number));
        let found = match number {
            Some(number) => observed.pool(port.family, number, port.affinity_secs.is_some()),
            None => self.new_pool(port),
        };
        claimed.insert(found.number);
        Some(found.with(wanted))
    }

    fn observe(&mut self) -> Result<Observed, NftablesError> {
        const ATTEMPTS: u32 = 20;
        for _ in 0..ATTEMPTS {
            match self.try_observe() {
                // Somebody changed some table meanwhile: what was read may be half old, half new.
                Err(NftError::Interrupted) => {}
                Ok(observed) => return Ok(observed),
                Err(error) => return Err(NftablesError::Observe(error)),
            }
        }
        Err(NftablesError::Observe(NftError::Interrupted))
    }

    fn try_observe(&mut self) -> Result<Observed, NftError> {
        let before = self.nft.generation()?;
        let mut observed = Observed::default();
        let programmed = |map: &Map| {
            !matches!(map, Map::ClusterCidrs | Map::NodePortAddresses | Map::ServiceRanges)
        };
        for family in Family::BOTH {
            for map in Map::all(self.setup.role).filter(programmed) {
                self.nft.elements(self.setup.role.table(), map.name(family), |element| {
                    observed.take_in(family, map, &element);
                })?;
            }
        }
        observed.finish();
        if self.nft.generation()? == before { Ok(observed) } else { Err(NftError::Interrupted) }
    }

    /// Makes sure that table, maps, chains and rules are there and as this version wants them.
    fn repair_structure(&mut self) -> Result<usize, NftablesError> {
        let (batch, chains) = self.structure()?;
        let operations = batch.operations();
        let sent = self.send(batch);
        if sent.is_err() {
            // The table and its chains are those of both.
            Family::BOTH.into_iter().for_each(|family| self.figures.of_mut(family).failures += 1);
        }
        sent?;
        self.chains = chains;
        Ok(operations)
    }

    /// What is to be done for that, and the chains that there are then.
    fn structure(&mut self) -> Result<(Batch, HashSet<Chain>), NftablesError> {
        let observe = NftablesError::Observe;
        let found = self.nft.table(self.setup.role.table()).map_err(observe)?;
        let mut batch = Batch::new();
        self.chains.clear();
        let usable = match &found {
            Some(table) => table.stamp.as_deref() == Some(STAMP) && self.maps_fit()?,
            None => false,
        };
        if !usable {
            if found.is_some() {
                tracing::warn!("Replacing the table of another version");
                batch.delete_table(self.table());
            }
            batch.create_table(self.table(), STAMP);
        }
        self.repair_maps(&mut batch, usable)?;
        let chains = self.repair_chains(&mut batch, usable)?;
        Ok((batch, chains))
    }

    fn maps_fit(&mut self) -> Result<bool, NftablesError> {
        let found = self.nft.sets(self.setup.role.table()).map_err(NftablesError::Observe)?;
        let fits = |set: &SetFound| match described(self.setup.role, &set.name) {
            Some(wanted) => wanted == (set.flags, set.key_len),
            None => true,
        };
        Ok(found.iter().all(fits))
    }

    fn repair_maps(&mut self, batch: &mut Batch, usable: bool) -> Result<(), NftablesError> {
        let found = match usable {
            true => self.nft.sets(self.setup.role.table()).map_err(NftablesError::Observe)?,
            false => Vec::new(),
        };
        let table = self.table();
        for family in Family::BOTH {
            for map in Map::all(self.setup.role) {
                let name = map.name(family);
                let exists = found.iter().any(|set| set.name == name);
                if !exists {
                    map.describe(family, |set| batch.add_set(table, set));
                }
                let wanted = match map {
                    Map::ClusterCidrs => keys(self.setup.config.pods.ranges(), family),
                    Map::NodePortAddresses => node_port_ranges(&self.setup.config, family),
                    Map::ServiceRanges => keys(&self.setup.config.service_ranges, family),
                    _ => continue,
                };
                if exists && self.ranges(name)? == boundaries(&wanted) {
                    continue;
                }
                if exists {
                    batch.flush_set(self.table(), name);
                }
                let ranges = wanted.iter().map(|(a, b)| (a.as_bytes(), b.as_bytes()));
                if !wanted.is_empty() {
                    batch.add_ranges(self.table(), name, ranges);
                }
            }
        }
        Ok(())
    }

    /// The boundaries that a map of ranges has: key, and whether a range ends there.
    fn ranges(&mut self, name: &str) -> Result<Vec<(Vec<u8>, bool)>, NftablesError> {
        let mut found = Vec::new();
        let visit = |e: ElementFound<'_>| found.push((e.key.to_vec(), e.ends_range));
        self.nft.elements(self.setup.role.table(), name, visit).map_err(NftablesError::Observe)?;
        found.sort();
        Ok(found)
    }

    fn repair_chains(
        &mut self,
        batch: &mut Batch,
        usable: bool,
    ) -> Result<HashSet<Chain>, NftablesError> {
        let (table, setup) = (self.table(), self.setup.clone());
        let mut found: HashMap<String, Vec<Option<Vec<u8>>>> = HashMap::new();
        if usable {
            for chain in self.nft.chains(table).map_err(NftablesError::Observe)? {
                if is_misplaced(&chain) {
                    // No kernel moves a chain; the maps, and who sticks to what, stay.
                    batch.delete_chain(table, &chain.name);
                } else {
                    found.insert(chain.name, Vec::new());
                }
            }
            for rule in self.nft.rules(table).map_err(NftablesError::Observe)? {
                if let Some(rules) = found.get_mut(&rule.chain) {
                    rules.push(rule.stamp);
                }
            }
        }
        let mut chains: HashSet<Chain> =
            found.keys().filter_map(|name| Chain::parse(name)).collect();
        // While the maps are empty, a rule costs the kernel nothing.
        if !usable {
            chains.extend(Chain::prepared(self.setup.role));
        }
        // In the order in which they may refer to each other.
        let fixed: Vec<Chain> = Chain::fixed(self.setup.role).collect();
        let forwarding = chains.iter().filter(|chain| !fixed.contains(chain)).copied();
        let all: Vec<Chain> = forwarding.chain(fixed.iter().copied()).collect();
        let missing = |chain: &&Chain| !found.contains_key(&chain.to_string());
        for chain in all.iter().filter(missing) {
            batch.add_chain(table, &chain.to_string(), chain.base());
        }
        for chain in &all {
            let name = chain.to_string();
            let wanted = stamps_of(*chain, &setup).into_iter().map(Some).collect::<Vec<_>>();
            match found.get(&name) {
                Some(rules) if *rules == wanted => continue,
                Some(rules) if !rules.is_empty() => batch.flush_chain(table, &name),
                _ => {}
            }
            for rule in chain.rules(&setup) {
                batch.add_rule(table, &name, &rule);
            }
        }
        chains.extend(fixed);
        Ok(chains)
    }

    fn delete_all(&mut self, items: Vec<Item>) -> Result<usize, NftablesError> {
        let mut operations = 0;
        for chunk in items.chunks(OPERATIONS_PER_TRANSACTION) {
            let part = Operations { deletes: chunk.to_vec(), adds: Vec::new() };
            let (batch, _) = super::transaction::encode([&part], &self.chains, &self.setup);
            operations += batch.operations();
            let sent = self.send(batch);
            if sent.is_err() {
                let families = Family::BOTH.into_iter();
                for family in families.filter(|f| chunk.iter().any(|item| item.family == *f)) {
                    self.figures.of_mut(family).cleanup_failures += 1;
                }
            }
            sent?;
        }
        Ok(operations)
    }
}

/// A base chain of another version, or a stranger's, that has its name right and its place in the packet path
/// wrong.
fn is_misplaced(found: &ChainFound) -> bool {
    let base = Chain::parse(&found.name).and_then(Chain::base);
    base.is_some_and(|base| found.hook != Some((base.hook as u32, base.priority)))
}

fn described(role: Role, name: &str) -> Option<(u32, u32)> {
    Family::BOTH.into_iter().find_map(|family| {
        let map = Map::all(role).find(|map| map.name(family) == name)?;
        Some(map.describe(family, |set| set.expected()))
    })
}
