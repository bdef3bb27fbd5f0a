//! From what the kernel has to what is wanted: commands, in an order that never leaves a Service without. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use keelson_netlink::ipvs::{Command, Key, Real, Virtual};

use super::servers::Wanted;

/// A virtual server without persistence keeps a timeout for which nobody has a use: this number in it tells
/// which ones are ours.
pub(crate) const MARK: u32 = 0x6b65;

/// A real server that takes new connections: all get the same share.
const WEIGHT: u32 = 1;

/// A virtual server as the kernel has it, or is believed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) scheduler: String,
    pub(crate) ours: bool,
    pub(crate) reals: BTreeMap<SocketAddr, KnownReal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KnownReal {
    pub(crate) weight: u32,
    pub(crate) translated: bool,
}

/// The virtual server that we make.
pub(crate) fn ours(key: Key, scheduler: &str) -> Virtual {
    Virtual { key, scheduler: scheduler.to_owned(), persistent: false, mark: MARK }
}

pub(crate) fn is_ours(found: &Virtual) -> bool {
    found.mark == MARK && !found.persistent
}

/// What is to be done for some virtual servers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Steps {
    /// Before packets are led there.
    pub(crate) first: Vec<Command>,
    /// When they are not any more.
    pub(crate) last: Vec<Command>,
    /// Real servers that get nothing new and go when their last connection has ended.
    pub(crate) draining: BTreeMap<Key, BTreeSet<SocketAddr>>,
}

impl Steps {
    pub(crate) fn operations(&self) -> usize {
        self.first.len() + self.last.len()
    }

    /// Adds what leads from `known` to `wanted`.
    pub(crate) fn lead(
        &mut self,
        key: Key,
        known: Option<&Known>,
        wanted: Option<&Wanted>,
        scheduler: &str,
    ) {
        match (known, wanted) {
            (known, Some(wanted)) => self.provide(key, known, wanted, scheduler),
            (Some(known), None) => self.retire(key, known),
            (None, None) => {}
        }
    }

    fn provide(&mut self, key: Key, known: Option<&Known>, wanted: &Wanted, scheduler: &str) {
        let none = BTreeMap::new();
        let reals = known.map_or(&none, |known| &known.reals);
        match known {
            None => self.first.push(Command::AddVirtual(ours(key, scheduler))),
            Some(known) if known.ours && known.scheduler == scheduler => {}
            Some(_) => self.first.push(Command::SetVirtual(ours(key, scheduler))),
        }
        let mut staying = BTreeSet::new();
        for at in wanted.reals() {
            let real = Real { at, weight: WEIGHT };
            staying.insert(at);
            match reals.get(&at) {
                None => self.first.push(Command::AddReal(key, real)),
                Some(KnownReal { weight: WEIGHT, translated: true }) => {}
                Some(_) => self.first.push(Command::SetReal(key, real)),
            }
        }
        for (at, real) in reals.iter().filter(|(at, _)| !staying.contains(at)) {
            if wanted.lets_drain(*at) {
                self.drain(key, *at, *real);
            } else {
                self.last.push(Command::RemoveReal(key, *at));
            }
        }
    }

    fn retire(&mut self, key: Key, known: &Known) {
        if key.protocol == libc::IPPROTO_UDP as u8 || known.reals.is_empty() {
            self.last.push(Command::RemoveVirtual(key));
            return;
        }
        for (at, real) in &known.reals {
            self.drain(key, *at, *real);
        }
    }

    fn drain(&mut self, key: Key, at: SocketAddr, real: KnownReal) {
        if real.weight != 0 {
            self.last.push(Command::SetReal(key, Real { at, weight: 0 }));
        }
        self.draining.entry(key).or_default().insert(at);
    }
}

/// What the kernel has after the steps for a virtual server have been taken.
pub(crate) fn known_after(
    wanted: Option<&Wanted>,
    draining: Option<&BTreeSet<SocketAddr>>,
    scheduler: &str,
) -> Option<Known> {
    let real = |weight| KnownReal { weight, translated: true };
    let drained = draining.into_iter().flatten().map(|at| (*at, real(0)));
    let reals: BTreeMap<_, _> = drained
        .chain(wanted.into_iter().flat_map(Wanted::reals).map(|at| (at, real(WEIGHT))))
        .collect();
    let exists = wanted.is_some() || !reals.is_empty();
    exists.then(|| Known { scheduler: scheduler.to_owned(), ours: true, reals })
}
