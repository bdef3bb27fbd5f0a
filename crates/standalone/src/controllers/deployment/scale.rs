//! How many replicas each ReplicaSet of a Deployment gets: the arithmetic of rolling updates.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use k8s_openapi::api::apps::v1::DeploymentSpec;

/// The bounds of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// How many pods are wanted.
    pub(crate) replicas: i32,
    /// How many more may exist during a rollout.
    pub(crate) surge: i32,
    /// How many of the wanted may be unavailable.
    pub(crate) unavailable: i32,
}

impl Bounds {
    /// Reads the bounds; percentages of surge are rounded up, those of unavailability down, and both being zero would
    /// never move, so one may then be unavailable.
    pub(crate) fn of(spec: &DeploymentSpec) -> Self {
        let replicas = spec.replicas.unwrap_or(1);
        let strategy = spec.strategy.as_ref();
        if is_recreate(spec) {
            return Self { replicas, surge: 0, unavailable: 0 };
        }
        let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let part = |value: Option<&IntOrString>, up: bool| match value {
            None => share("25%", replicas, up),
            Some(IntOrString::Int(number)) => *number,
            Some(IntOrString::String(text)) => share(text, replicas, up),
        };
        let surge = part(rolling.and_then(|rolling| rolling.max_surge.as_ref()), true);
        let unavailable = part(rolling.and_then(|rolling| rolling.max_unavailable.as_ref()), false);
        let unavailable = if surge == 0 && unavailable == 0 { 1 } else { unavailable };
        Self { replicas, surge, unavailable: unavailable.min(replicas) }
    }

    /// The most pods that may exist.
    pub(crate) fn ceiling(self) -> i32 {
        if self.replicas == 0 { 0 } else { self.replicas + self.surge }
    }

    /// The fewest pods that must be available.
    pub(crate) fn floor(self) -> i32 {
        self.replicas - self.unavailable
    }
}

/// Whether the old pods must be gone before new ones come.
pub(crate) fn is_recreate(spec: &DeploymentSpec) -> bool {
    spec.strategy.as_ref().and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate")
}

fn share(text: &str, of: i32, up: bool) -> i32 {
    let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
    let product = percent * i64::from(of);
    let rounded = if up { (product + 99).div_euclid(100) } else { product.div_euclid(100) };
    i32::try_from(rounded).unwrap_or(i32::MAX)
}

/// One ReplicaSet in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    /// What its spec asks for.
    pub(crate) replicas: i32,
    /// How many of its pods are available.
    pub(crate) available: i32,
    /// The ceiling that was in force when it was last scaled.
    pub(crate) scaled_for: i32,
    /// How many pods it may still have, not known while its controller has not seen its newest size.
    pub(crate) holds: Option<i32>,
}

impl Share {
    /// A set that does not exist yet.
    pub(crate) const NOTHING: Self =
        Self { replicas: 0, available: 0, scaled_for: 0, holds: Some(0) };
}

/// The size of the current set in a rolling update: as far up as the ceiling allows.
///
/// Upstream counts what the old sets are asked for; this counts the pods that they have, so that a set which was just
/// told to shrink does not lend out room that its pods still take.
pub(crate) fn grow_current(bounds: Bounds, current: Share, old: &[Share]) -> i32 {
    if current.replicas >= bounds.replicas {
        return bounds.replicas;
    }
    let held: Option<i32> = old.iter().map(|share| share.holds).sum();
    let Some(held) = held else { return current.replicas };
    let total = current.replicas + held;
    let room = (bounds.replicas + bounds.surge - total).max(0);
    current.replicas + room.min(bounds.replicas - current.replicas)
}

/// The sizes of the old sets (oldest first) in a rolling update: first without what is not available anyway, then
/// without as many as the current set's available pods can stand in for.
///
/// While a set's controller has not seen its newest size, its count of available pods may include some that are about
/// to go: nothing is decided on it (upstream does, and can then undercut the floor for a moment).
pub(crate) fn shrink_old(bounds: Bounds, current: Share, old: &[Share]) -> Vec<i32> {
    let mut sizes: Vec<i32> = old.iter().map(|share| share.replicas).collect();
    if old.iter().chain([&current]).any(|share| share.holds.is_none()) {
        return sizes;
    }
    let total = current.replicas + sum(old, |share| share.replicas);
    let current_unavailable = current.replicas - current.available;
    let may_go = total - bounds.floor() - current_unavailable;
    if may_go <= 0 {
        return sizes;
    }
    let mut unhealthy_left = may_go;
    for (size, share) in sizes.iter_mut().zip(old) {
        let unhealthy = (*size - share.available).max(0).min(unhealthy_left);
        *size -= unhealthy;
        unhealthy_left -= unhealthy;
    }
    let available = current.available + sum(old, |share| share.available);
    let mut spare = (available - bounds.floor()).max(0);
    for size in &mut sizes {
        let gone = (*size).min(spare);
        *size -= gone;
        spare -= gone;
    }
    sizes
}

/// The sizes of all sets after the Deployment was scaled in the midst of a rollout: each gets its part of the change
/// in proportion to its size. `sets` come largest first; the rounding rest goes to the first.
pub(crate) fn scale_proportionally(bounds: Bounds, sets: &[Share]) -> Vec<i32> {
    let mut sizes: Vec<i32> = sets.iter().map(|share| share.replicas).collect();
    let to_add = bounds.ceiling() - sum(sets, |share| share.replicas);
    let mut added = 0;
    for (size, share) in sizes.iter_mut().zip(sets) {
        if to_add == 0 || *size == 0 {
            continue;
        }
        let part = part(bounds, *share, to_add, added);
        *size += part;
        added += part;
    }
    if let Some(first) = sizes.first_mut() {
        *first = (*first + to_add - added).max(0);
    }
    sizes
}

/// One set's part of the change: its share of the new ceiling less what it has, never against the direction of the
/// change nor beyond it.
fn part(bounds: Bounds, share: Share, to_add: i32, added: i32) -> i32 {
    let before = share.scaled_for.max(1);
    let scaled = f64::from(share.replicas) * f64::from(bounds.ceiling()) / f64::from(before);
    #[expect(clippy::cast_possible_truncation, reason = "replica counts fit; floats saturate")]
    let fraction = scaled.round() as i32 - share.replicas;
    let left = to_add - added;
    if to_add > 0 { fraction.clamp(0, left.max(0)) } else { fraction.clamp(left.min(0), 0) }
}

fn sum(shares: &[Share], field: impl Fn(&Share) -> i32) -> i32 {
    shares.iter().map(field).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn share(replicas: i32, available: i32) -> Share {
        Share { replicas, available, scaled_for: 0, holds: Some(replicas) }
    }

    fn bounds(replicas: i32, surge: &str, unavailable: &str) -> Bounds {
        let spec = serde_json::from_value(serde_json::json!({
            "replicas": replicas, "selector": {}, "template": {},
            "strategy": {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}}))
        .unwrap();
        Bounds::of(&spec)
    }

    #[test]
    fn percentages_round_towards_progress_and_availability() {
        assert_eq!(bounds(3, "25%", "25%"), Bounds { replicas: 3, surge: 1, unavailable: 0 });
        assert_eq!(bounds(10, "25%", "25%"), Bounds { replicas: 10, surge: 3, unavailable: 2 });
        assert_eq!(bounds(4, "0%", "10%"), Bounds { replicas: 4, surge: 0, unavailable: 1 });
        assert_eq!(bounds(0, "25%", "25%").ceiling(), 0);
    }

    #[test]
    fn a_rolling_update_steps_between_ceiling_and_floor() {
        let b = Bounds { replicas: 3, surge: 1, unavailable: 0 };
        assert_eq!(grow_current(b, share(0, 0), &[share(3, 3)]), 1);
        assert_eq!(shrink_old(b, share(1, 0), &[share(3, 3)]), [3]);
        assert_eq!(shrink_old(b, share(1, 1), &[share(3, 3)]), [2]);
        assert_eq!(grow_current(b, share(1, 1), &[share(2, 2)]), 2);
        assert_eq!(grow_current(b, share(5, 5), &[]), 3);
        // The old set shall shrink but still has all its pods, or nobody knows.
        let told = |holds| [Share { holds, ..share(2, 2) }];
        assert_eq!(grow_current(b, share(1, 1), &told(Some(3))), 1);
        assert_eq!(grow_current(b, share(1, 1), &told(None)), 1);
        assert_eq!(shrink_old(b, share(1, 1), &told(None)), [2]);
    }

    #[test]
    fn what_is_not_available_anyway_goes_first() {
        let b = Bounds { replicas: 4, surge: 1, unavailable: 1 };
        // Two old pods are broken: both may go, and no healthy one with them.
        assert_eq!(shrink_old(b, share(1, 0), &[share(2, 0), share(2, 2)]), [1, 2]);
        assert_eq!(shrink_old(b, share(2, 2), &[share(2, 0), share(2, 2)]), [0, 1]);
    }

    #[test]
    fn scaling_in_the_midst_keeps_the_proportions() {
        let sets = |a, b, scaled_for| {
            [Share { scaled_for, ..share(a, a) }, Share { scaled_for, ..share(b, b) }]
        };
        let b = Bounds { replicas: 20, surge: 5, unavailable: 5 };
        assert_eq!(scale_proportionally(b, &sets(8, 5, 13)), [15, 10]);
        let b = Bounds { replicas: 5, surge: 1, unavailable: 1 };
        assert_eq!(scale_proportionally(b, &sets(8, 5, 13)), [4, 2]);
    }
}
