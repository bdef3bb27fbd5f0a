//! What the kernel has, and how it differs from what is wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use keelson_netlink::ipvs::{Command, Ipvs as Kernel, Key, Virtual};
use nix::errno::Errno;

use super::servers::Servers;
use super::steps::{Known, KnownReal, Steps, is_ours, ours};
use super::{Ipvs, IpvsError, LOOKED_AT, servers_of};
use crate::backend::{Backend, BackendError, Difference};
use crate::diff::Plans;

/// The dummy address (RFC 7600), which nobody has.
const NOBODY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8));

/// Makes a virtual server with that scheduler and removes it again.
pub(super) fn try_scheduler(kernel: &mut Kernel, scheduler: &str) -> Result<(), IpvsError> {
    let key = Key { address: NOBODY, protocol: libc::IPPROTO_UDP as u8, port: 9 };
    match kernel.perform(&[Command::AddVirtual(ours(key, scheduler))]) {
        Ok(()) => {}
        // Another process tries at the same time, or was killed while it did.
        Err(error) if error.errno() == Some(Errno::EEXIST) => {}
        Err(source) if source.errno() == Some(Errno::ENOENT) => {
            return Err(IpvsError::Scheduler { scheduler: scheduler.to_owned(), source });
        }
        Err(error) => return Err(IpvsError::Open(error)),
    }
    match kernel.perform(&[Command::RemoveVirtual(key)]) {
        Err(error) if !error.is_out_of_step() => Err(IpvsError::Open(error)),
        _ => Ok(()),
    }
}

impl Ipvs {
    /// The scheduler that is configured, or round robin where the kernel lacks that one.
    pub(super) fn scheduler(&mut self) -> Result<String, IpvsError> {
        if let Some(known) = &self.scheduler {
            return Ok(known.clone());
        }
        let wanted = self.config.ipvs.scheduler.clone();
        let usable = match try_scheduler(&mut self.kernel, &wanted) {
            Ok(()) => wanted,
            Err(error @ IpvsError::Scheduler { .. }) => {
                tracing::warn!(%error, "Using the scheduler rr instead");
                "rr".to_owned()
            }
            Err(error) => return Err(error),
        };
        self.scheduler = Some(usable.clone());
        Ok(usable)
    }

    /// A virtual server as the kernel has it.
    pub(super) fn observe(&mut self, key: Key) -> Result<Option<Known>, IpvsError> {
        let found = self.kernel.find(key).map_err(IpvsError::Observe)?;
        found.map(|found| self.complete(found)).transpose()
    }

    fn complete(&mut self, found: Virtual) -> Result<Known, IpvsError> {
        let reals = self.kernel.reals(found.key).map_err(IpvsError::Observe)?;
        let reals = reals.into_iter().map(|found| {
            let known = KnownReal { weight: found.real.weight, translated: found.translated };
            (found.real.at, known)
        });
        let ours = is_ours(&found);
        Ok(Known { scheduler: found.scheduler, ours, reals: reals.collect() })
    }

    /// The virtual servers that are ours by their mark.
    pub(super) fn own(&mut self) -> Result<Vec<Virtual>, IpvsError> {
        let all = self.kernel.virtuals().map_err(IpvsError::Observe)?;
        Ok(all.into_iter().filter(is_ours).collect())
    }

    /// What leads from what the kernel has to what the plans want.
    pub(super) fn steps(&mut self) -> Result<Steps, IpvsError> {
        let servers = std::mem::take(&mut self.servers);
        let steps = self.compare(&servers);
        self.servers = servers;
        steps
    }

    fn compare(&mut self, servers: &Servers) -> Result<Steps, IpvsError> {
        let scheduler = self.scheduler()?;
        let excluded = self.config.ipvs.excluded.clone();
        let is_excluded = |key: Key| excluded.iter().any(|range| range.contains(key.address));
        let all = self.kernel.virtuals().map_err(IpvsError::Observe)?;
        let mut known: BTreeMap<Key, Known> = BTreeMap::new();
        for found in all {
            let key = found.key;
            let wanted = servers.wanted(key).is_some();
            if wanted || (is_ours(&found) && !is_excluded(key)) {
                let found = self.complete(found)?;
                known.insert(key, found);
            }
        }
        // A list may lack one that is there.
        for key in servers.keys() {
            if !known.contains_key(&key)
                && let Some(found) = self.observe(key)?
            {
                known.insert(key, found);
            }
        }
        let keys: BTreeSet<Key> = servers.keys().chain(known.keys().copied()).collect();
        let mut steps = Steps::default();
        for key in keys {
            steps.lead(key, known.get(&key), servers.wanted(key), &scheduler);
        }
        Ok(steps)
    }

    /// Compares some virtual servers, each time others.
    pub(super) fn look(&mut self) -> Result<bool, IpvsError> {
        let scheduler = self.scheduler()?;
        let mut keys = self.servers.after(self.looked_at, LOOKED_AT);
        self.looked_at = keys.last().copied();
        keys.retain(|key| !self.refused.contains(key));
        for key in keys {
            let known = self.observe(key)?;
            let mut steps = Steps::default();
            steps.lead(key, known.as_ref(), self.servers.wanted(key), &scheduler);
            if steps.operations() > 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn differences(&mut self, plans: &Plans) -> Result<Vec<Difference>, BackendError> {
        let mut differences = self.table.verify(plans)?;
        let ground = self.look_around()?;
        let servers = servers_of(plans, &ground);
        let steps = self.compare(&servers)?;
        let commands = steps.first.iter().chain(&steps.last);
        differences.extend(commands.map(|command| Difference {
            service: key_of(command).and_then(|key| servers.owner(key)).cloned(),
            what: format!("IPVS: it takes to {command}"),
        }));
        // Both stay as long as connections do, and are of no use without Services.
        if !plans.is_empty() {
            differences.extend(self.flows.verify(&Plans::new())?);
            let gaps = self.gaps()?.len();
            let what = format!("{gaps} routing rules or routes to IPVS differ");
            differences.extend((gaps > 0).then_some(Difference { service: None, what }));
        }
        Ok(differences)
    }
}

fn key_of(command: &Command) -> Option<Key> {
    match command {
        Command::AddVirtual(new) | Command::SetVirtual(new) => Some(new.key),
        Command::RemoveVirtual(key)
        | Command::AddReal(key, _)
        | Command::SetReal(key, _)
        | Command::RemoveReal(key, _) => Some(*key),
        Command::SetTimeouts(_) | Command::Flush => None,
    }
}
