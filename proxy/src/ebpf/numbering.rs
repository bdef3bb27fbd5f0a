//! Numbers of pools and Service ports, and the order of a pool's slots. Pure.
//!
//! No number is given out twice: flows, clients that stick and counters may remember it.

use super::config::Algorithm;
use super::maglev;
use crate::diff::place;
use crate::model::{At, Endpoint, PortPlan, Route, Scope, ServicePlan, Target};

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
    /// Of the Service port: all its frontends carry it, in both families, so that what is counted under it goes on
    /// when addresses come and go. 0 when it has none.
    pub(crate) number: u32,
    /// Packets choose by the client.
    pub(crate) hashed: bool,
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
    /// The number that frontends of the Service port carry.
    fn number(&mut self, port: &PortPlan) -> Option<u32>;
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

/// Whether packets choose an endpoint by the client: clients outside come by several nodes.
pub(crate) fn is_hashed(plan: &ServicePlan, port: &PortPlan, algorithm: Algorithm) -> bool {
    let is_outside = |at: At| match at {
        At::NodePort(_) => true,
        At::Address(address) => !plan.guarded.contains(&address),
    };
    algorithm == Algorithm::Maglev && port.frontends.iter().any(|f| is_outside(f.key.at))
}

/// Numbers a plan.
pub(crate) fn number(
    plan: &ServicePlan,
    before: &mut impl Before,
    numbers: &mut Numbers,
    algorithm: Algorithm,
) -> Box<[NumberedPort]> {
    let mut given: Vec<(&PortPlan, u32)> = Vec::new();
    plan.ports
        .iter()
        .map(|port| {
            let hashed = is_hashed(plan, port, algorithm);
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
                if hashed {
                    return Some(NumberedPool { number, slots: maglev::slots(wanted).into() });
                }
                let slots: Vec<_> = slots.iter().copied().map(Some).collect();
                Some(NumberedPool { number, slots: place(&slots, wanted).into() })
            };
            let (cluster, local) = (pool(Scope::Cluster), pool(Scope::Local));
            let known = given.iter().find(|(other, _)| is_same_port(other, port));
            let number = match known {
                Some((_, number)) => *number,
                None => service_port_number(plan, port, before, numbers),
            };
            given.push((port, number));
            NumberedPort { cluster, local, number, hashed }
        })
        .collect()
}

/// Whether they are of one port of a Service, in whatever family.
pub(crate) fn is_same_port(one: &PortPlan, other: &PortPlan) -> bool {
    (&one.name, one.protocol) == (&other.name, other.protocol)
}

fn service_port_number(
    plan: &ServicePlan,
    port: &PortPlan,
    before: &mut impl Before,
    numbers: &mut Numbers,
) -> u32 {
    let mut same = plan.ports.iter().filter(|other| is_same_port(other, port));
    match same.clone().find_map(|port| before.number(port)) {
        Some(number) => number,
        None if same.any(|port| !port.frontends.is_empty()) => numbers.take(),
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ebpf::programmed::Programmed;
    use crate::model::{At, Family, Frontend, FrontendKey, Masquerade, Protocol};

    fn port(name: &str, addresses: &[&str]) -> PortPlan {
        let frontend = |address: &&str| Frontend {
            key: FrontendKey {
                at: At::Address(address.parse().unwrap()),
                protocol: Protocol::Tcp,
                port: 80,
            },
            route: Route::Same { target: Target::Reject, masquerade: Masquerade::Never },
            sources: None,
        };
        PortPlan {
            name: name.into(),
            protocol: Protocol::Tcp,
            family: addresses.first().map_or(Family::V4, |a| Family::of(a.parse().unwrap())),
            affinity_secs: None,
            cluster: Box::default(),
            local: Box::default(),
            draining: Box::default(),
            here: Box::default(),
            strangers: Box::default(),
            frontends: addresses.iter().map(frontend).collect(),
        }
    }

    fn programmed(
        ports: Vec<PortPlan>,
        before: Option<&Programmed>,
        numbers: &mut Numbers,
    ) -> Programmed {
        let plan = ServicePlan { ports: ports.into(), guarded: Box::default() };
        let ports = number(&plan, &mut { before }, numbers, Algorithm::Random);
        Programmed { plan: plan.into(), ports }
    }

    fn given(programmed: &Programmed) -> Vec<u32> {
        programmed.ports.iter().map(|port| port.number).collect()
    }

    #[test]
    fn a_service_port_has_one_number_for_all_its_addresses() {
        let mut numbers = Numbers::after(10);
        let ports = vec![
            port("http", &["10.96.0.1", "198.51.100.1"]),
            port("http", &["fd96::1"]),
            port("https", &["10.96.0.2"]),
            port("nowhere", &[]),
        ];
        assert_eq!(given(&programmed(ports, None, &mut numbers)), [10, 10, 11, 0]);
    }

    #[test]
    fn it_stays_when_addresses_or_a_family_come_and_go() {
        let mut numbers = Numbers::after(10);
        let first = programmed(vec![port("http", &["10.96.0.1"])], None, &mut numbers);
        let both = vec![port("http", &["10.96.0.9", "198.51.100.1"]), port("http", &["fd96::1"])];
        let second = programmed(both, Some(&first), &mut numbers);
        let third = vec![port("http", &["fd96::1"]), port("https", &["fd96::1"])];
        let third = programmed(third, Some(&second), &mut numbers);
        assert_eq!(
            [given(&first), given(&second), given(&third)],
            [vec![10], vec![10, 10], vec![10, 11]]
        );
    }
}
