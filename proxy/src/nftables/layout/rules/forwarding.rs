//! The rules that choose an endpoint and translate.

use std::time::Duration;

use keelson_netlink::nft::{DESTINATION_PORT, Dynamic, Header, Meta, Nat, Register, Rule};

use super::{address_registers, destination, frontend, hide_others_rules, only, set_mark, source};
use crate::backend::BackendConfig;
use crate::model::{Family, Masquerade};
use crate::nftables::layout::{Forward, Kind, Map, Sticky, View};

pub(super) fn forward_rules(forward: Forward, config: &BackendConfig) -> Vec<Rule> {
    let mut rules = match forward.masquerade {
        Masquerade::Never => Vec::new(),
        Masquerade::Always => vec![set_mark(Rule::new(), config.mark())],
        Masquerade::UnlessPod => hide_others_rules(forward.family, config),
    };
    let registers = Registers::new(forward);
    if let Some(secs) = forward.sticky_secs {
        let timeout = Duration::from_secs(secs.into());
        rules.push(registers.stick(forward, timeout));
        rules.push(registers.choose_and_remember(forward, timeout));
        // The table of remembered clients is full.
        rules.push(registers.choose_place(forward).nat(registers.translation(forward)));
    } else {
        rules.push(registers.choose(forward));
    }
    rules
}

/// Forwards to the endpoint that is remembered for the client, if it is still there.
pub(super) fn stick_rule(sticky: Sticky) -> Rule {
    let forward = forward_of(sticky);
    Registers::new(forward).stick(forward, Duration::from_secs(sticky.secs.into()))
}

/// Remembers the endpoint that the packet is on its way to. `key` has loaded the frontend that it was for.
pub(super) fn remember_rule(sticky: Sticky, key: Rule) -> Rule {
    let (family, forward) = (sticky.family, forward_of(sticky));
    let registers = Registers::new(forward);
    let (pool, next) = (Register(registers.pool), registers.next);
    let port = Register(next + address_registers(family));
    let chosen = destination(registers.pool_of(key, forward), family, next)
        .payload(Header::Transport, DESTINATION_PORT, 2, port)
        .lookup_value(Map::PlacesOf.name(family), pool, PLACE);
    let placed = source(through_mark(chosen, PLACE, &[PLACE]), family, next);
    registers.remember(placed, forward, Duration::from_secs(sticky.secs.into()))
}

/// For the registers and maps: IPVS, not the number of endpoints, decides.
fn forward_of(sticky: Sticky) -> Forward {
    Forward {
        family: sticky.family,
        kind: sticky.kind,
        view: View::Direct,
        masquerade: sticky.masquerade,
        sticky_secs: Some(sticky.secs),
        size: 1,
    }
}

/// Where a forwarding rule keeps what: all sixteen registers are needed with IPv6 and affinity.
///
/// `frontend, later the packet's mark and a place | pool | place or client | address, port`
///
/// A number that came out of a map goes through the packet mark before it becomes part of another key,
/// and the mark gets its old value back at once. The registers would do without, but `nft list` can
/// show a key with a part that comes from a map only in this way (1.0.6 aborts otherwise).
struct Registers {
    pool: u8,
    next: u8,
    endpoint: u8,
    port: u8,
}

const SAVED_MARK: Register = Register(0);
const PLACE: Register = Register(1);

impl Registers {
    fn new(forward: Forward) -> Self {
        let address = address_registers(forward.family);
        let pool = match forward.kind {
            Kind::Address => address + 2,
            Kind::NodePort | Kind::Loopback => 2,
        };
        let endpoint = pool + 1 + address;
        Registers { pool, next: pool + 1, endpoint, port: endpoint + address }
    }

    fn load_pool(&self, forward: Forward) -> Rule {
        self.pool_of(frontend(only(forward.family), forward.family, forward.kind).0, forward)
    }

    /// Loads the pool of the frontend whose key is loaded.
    fn pool_of(&self, key: Rule, forward: Forward) -> Rule {
        let map = Map::Pools(forward.kind, forward.view).name(forward.family);
        let pool = Register(self.pool);
        let found = key.lookup_value(map, Register(0), pool).meta(Meta::Mark, SAVED_MARK);
        through_mark(found, pool, &[pool])
    }

    /// A random slot.
    fn random(&self, rule: Rule, forward: Forward) -> Rule {
        rule.random(forward.size, Register(self.next))
    }

    fn load_endpoint(&self, rule: Rule, forward: Forward) -> Rule {
        let map = Map::Endpoints.name(forward.family);
        rule.lookup_value(map, Register(self.pool), Register(self.endpoint))
    }

    /// Without affinity the slots are the places.
    fn choose(&self, forward: Forward) -> Rule {
        let rule = self.random(self.load_pool(forward), forward);
        self.load_endpoint(rule, forward).nat(self.translation(forward))
    }

    /// Forwards to the place that is remembered for the client, if somebody is still there.
    fn stick(&self, forward: Forward, timeout: Duration) -> Rule {
        let affinity = Map::Affinity.name(forward.family);
        let pool = Register(self.pool);
        let remembered = source(self.load_pool(forward), forward.family, self.next)
            .lookup_value(affinity, pool, PLACE);
        let remembered = through_mark(remembered, PLACE, &[PLACE]).dynamic_set(
            affinity,
            Dynamic::Update,
            pool,
            Some(PLACE),
            Some(timeout),
        );
        let placed = through_mark(remembered, PLACE, &[Register(self.next)]);
        self.load_endpoint(placed, forward).nat(self.translation(forward))
    }

    fn choose_place(&self, forward: Forward) -> Rule {
        let slot = self.random(self.load_pool(forward), forward);
        let found = slot.lookup_value(Map::Places.name(forward.family), Register(self.pool), PLACE);
        let placed = through_mark(found, PLACE, &[Register(self.next), PLACE]);
        self.load_endpoint(placed, forward)
    }

    /// An element's value cannot be overwritten by a rule: so remove the old one first.
    fn choose_and_remember(&self, forward: Forward, timeout: Duration) -> Rule {
        let chosen = source(self.choose_place(forward), forward.family, self.next);
        self.remember(chosen, forward, timeout).nat(self.translation(forward))
    }

    /// Remembers the place for the client, both of which are loaded.
    fn remember(&self, rule: Rule, forward: Forward, timeout: Duration) -> Rule {
        let affinity = Map::Affinity.name(forward.family);
        let pool = Register(self.pool);
        rule.dynamic_set(affinity, Dynamic::Delete, pool, Some(PLACE), Some(timeout)).dynamic_set(
            affinity,
            Dynamic::Add,
            pool,
            Some(PLACE),
            Some(timeout),
        )
    }

    fn translation(&self, forward: Forward) -> Nat {
        Nat {
            destination: true,
            ipv6: forward.family == Family::V6,
            address: Register(self.endpoint),
            address_end: None,
            port: Some(Register(self.port)),
            port_end: None,
        }
    }
}

/// Copies a register to others by way of the packet mark, which [`SAVED_MARK`] restores.
///
/// Nothing between the two changes of the mark can end the rule.
fn through_mark(rule: Rule, from: Register, to: &[Register]) -> Rule {
    let set = rule.set_meta(Meta::Mark, from);
    let loaded = to.iter().fold(set, |rule, register| rule.meta(Meta::Mark, *register));
    loaded.set_meta(Meta::Mark, SAVED_MARK)
}
