//! From two desired states to the difference between them.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::{Endpoint, ServiceKey, ServicePlan};

/// What is desired for all Services.
pub type Plans = HashMap<ServiceKey, Arc<ServicePlan>>;

/// All plans in the order of names, so that numbers that are given out do not depend on chance.
pub(crate) fn sorted(plans: &Plans) -> Vec<(&ServiceKey, &Arc<ServicePlan>)> {
    let mut all: Vec<_> = plans.iter().collect();
    all.sort_unstable_by_key(|(service, _)| *service);
    all
}

/// One Service's plan changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub service: ServiceKey,
    /// The plan until now, or nothing when the Service is new.
    pub before: Option<Arc<ServicePlan>>,
    /// The new plan, or nothing when the Service is gone.
    pub plan: Option<Arc<ServicePlan>>,
}

/// Compares the Services in `keys` with what is planned now, and takes the new plans over.
///
/// Costs as much as the Services named, however many others there are.
pub fn advance(
    plans: &mut Plans,
    keys: impl IntoIterator<Item = ServiceKey>,
    plan: impl Fn(&ServiceKey) -> Option<ServicePlan>,
) -> Vec<Change> {
    let mut changes = Vec::new();
    for service in keys {
        let after = plan(&service).map(Arc::new);
        if plans.get(&service) == after.as_ref() {
            continue;
        }
        let before = match &after {
            Some(plan) => plans.insert(service.clone(), Arc::clone(plan)),
            None => plans.remove(&service),
        };
        changes.push(Change { service, before, plan: after });
    }
    changes
}

/// Puts a list of endpoints into numbered slots without moving those that stay.
///
/// A slot that becomes free is filled by a new endpoint, or else by the last one, so that the slots
/// have no holes and the number of slots that differ follows the number of endpoints that differ.
#[must_use]
pub fn place(before: &[Option<Endpoint>], after: &[Endpoint]) -> Vec<Endpoint> {
    let mut slots: Vec<Option<Endpoint>> = before.to_vec();
    slots.resize(before.len().max(after.len()), None);
    let mut placed = std::collections::HashSet::with_capacity(after.len());
    let wanted: std::collections::HashSet<&Endpoint> = after.iter().collect();
    for slot in &mut slots {
        if slot.is_some_and(|e| !wanted.contains(&e) || !placed.insert(e)) {
            *slot = None;
        }
    }
    let mut new = after.iter().filter(|endpoint| !placed.contains(*endpoint)).copied();
    for slot in slots.iter_mut().filter(|slot| slot.is_none()) {
        *slot = new.next();
    }
    // More slots than endpoints: the last ones move into the holes.
    let mut first = 0;
    while slots.len() > after.len() {
        let Some(Some(last)) = slots.pop() else { continue };
        while slots.get(first).is_some_and(Option::is_some) {
            first += 1;
        }
        if let Some(hole) = slots.get_mut(first) {
            *hole = Some(last);
        }
    }
    slots.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint(number: u8) -> Endpoint {
        Endpoint::new(std::net::IpAddr::from([10, 0, 0, number]), 80)
    }

    fn numbers(slots: &[Endpoint]) -> Vec<String> {
        slots.iter().map(|e| e.address.to_string().replace("10.0.0.", "")).collect()
    }

    #[test]
    fn a_removed_endpoint_is_replaced_by_the_last_one() {
        let before: Vec<_> = (1..=4).map(|n| Some(endpoint(n))).collect();
        let after: Vec<_> = [1, 3, 4].map(endpoint).to_vec();
        assert_eq!(numbers(&place(&before, &after)), ["1", "4", "3"]);
    }

    #[test]
    fn a_new_endpoint_takes_the_free_slot() {
        let before: Vec<_> = (1..=3).map(|n| Some(endpoint(n))).collect();
        let after: Vec<_> = [1, 3, 9].map(endpoint).to_vec();
        assert_eq!(numbers(&place(&before, &after)), ["1", "9", "3"]);
    }

    proptest! {
        #[test]
        fn slots_hold_exactly_the_endpoints_and_few_move(
            before in proptest::collection::vec(proptest::option::of(0u8..20), 0..20),
            after in proptest::collection::btree_set(0u8..20, 0..20),
        ) {
            let before: Vec<_> = before.into_iter().map(|n| n.map(endpoint)).collect();
            let after: Vec<_> = after.into_iter().map(endpoint).collect();
            let slots = place(&before, &after);
            let mut sorted = slots.clone();
            sorted.sort();
            prop_assert_eq!(&sorted, &after);
            let again: Vec<_> = slots.iter().copied().map(Some).collect();
            prop_assert_eq!(place(&again, &after), slots);
        }
    }
}
