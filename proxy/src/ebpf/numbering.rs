//! Numbers of pools and frontends, and the order of a pool's slots. Pure.
//!
//! No number is given out twice: flows, clients that stick and counters may remember it.

use crate::diff::place;
use crate::model::{Endpoint, PortPlan, Route, Scope, ServicePlan, Target};

/// The next numbers, and up to where they are marked as used in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Numbers {
    next: u32,
    reserved: u32,
}

impl Numbers {
    /// Marked at once, so that the mark is written seldom.
    const BLOCK: u32 = 1 << 16;

    /// Goes on after the mark that the kernel has.
    pub(crate) fn after(reserved: u32) -> Self {
        Numbers { next: reserved.max(1), reserved }
    }

    fn take(&mut self) -> u32 {
        let number = self.next;
        // 0 stands for none. After four thousand million numbers the first ones are long forgotten.
        self.next = self.next.checked_add(1).unwrap_or(1);
        number
    }

    /// The mark that must be in the kernel before the numbers given out are used, if another one is needed.
    pub(crate) fn reserve(&mut self) -> Option<u32> {
        if self.next <= self.reserved {
            return None;
        }
        self.reserved = self.next.saturating_add(Self::BLOCK);
        Some(self.reserved)
    }
}

/// A list of endpoints in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NumberedPool {
    pub(crate) number: u32,
    pub(crate) slots: Box<[Endpoint]>,
}

/// What a Service port has in the kernel beside its plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NumberedPort {
    pub(crate) cluster: Option<NumberedPool>,
    pub(crate) local: Option<NumberedPool>,
    /// One for each frontend of the plan.
    pub(crate) frontends: Box<[u32]>,
}

impl NumberedPort {
    pub(crate) fn pool(&self, scope: Scope) -> Option<&NumberedPool> {
        match scope {
            Scope::Cluster => self.cluster.as_ref(),
            Scope::Local => self.local.as_ref(),
        }
    }
}

/// What a plan had before, from which its successor keeps what it can.
pub(crate) trait Before {
    /// The pool that a port had with the same affinity.
    fn pool(&mut self, port: &PortPlan, scope: Scope) -> Option<NumberedPool>;
    fn frontend(&self, key: &crate::model::FrontendKey) -> Option<u32>;
}

/// The list whose number a frontend carries. Where it forwards to none, that of the endpoints that would have been
/// chosen, so that flows to those that drain can be told after a restart.
pub(crate) fn scope_of(target: Target) -> Scope {
    match target {
        Target::Forward(scope) => scope,
        Target::Reject => Scope::Cluster,
        Target::Drop => Scope::Local,
    }
}

fn leads_to(route: Route, scope: Scope) -> bool {
    match route {
        Route::Same { target, .. } => scope_of(target) == scope,
        Route::BySource { inside, outside } => {
            scope_of(inside) == scope || scope_of(outside) == scope
        }
    }
}

/// Numbers a plan.
pub(crate) fn number(
    plan: &ServicePlan,
    before: &mut impl Before,
    numbers: &mut Numbers,
) -> Box<[NumberedPort]> {
    plan.ports
        .iter()
        .map(|port| {
            let mut pool = |scope| {
                let wanted = port.pool(scope);
                // Flows to endpoints that drain need a pool to belong to, and a frontend that tells which.
                let drains = !port.draining.is_empty()
                    && port.frontends.iter().any(|frontend| leads_to(frontend.route, scope));
                if wanted.is_empty() && !drains {
                    return None;
                }
                let (number, slots) = match before.pool(port, scope) {
                    Some(old) => (old.number, old.slots),
                    None if wanted.is_empty() => return None,
                    None => (numbers.take(), Box::default()),
                };
                let slots: Vec<_> = slots.iter().copied().map(Some).collect();
                Some(NumberedPool { number, slots: place(&slots, wanted).into() })
            };
            let (cluster, local) = (pool(Scope::Cluster), pool(Scope::Local));
            let frontend = |key| before.frontend(key).unwrap_or_else(|| numbers.take());
            let frontends = port.frontends.iter().map(|f| &f.key).map(frontend).collect();
            NumberedPort { cluster, local, frontends }
        })
        .collect()
}
