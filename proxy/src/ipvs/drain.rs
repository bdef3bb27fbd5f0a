//! Real servers that get nothing new go when their last connection has ended, a virtual server with the last of them.

use keelson_netlink::ipvs::{Command, Key};

use super::{Ipvs, LOOKED_AT};

impl Ipvs {
    /// Removes real servers whose last connection has ended, of some of the virtual servers, each time of others.
    pub(super) fn drain_some(&mut self) {
        use std::ops::Bound::{Excluded, Unbounded};
        let last = self.drained_at.map_or(Unbounded, Excluded);
        let next = self.draining.range((last, Unbounded)).map(|(key, _)| *key);
        let next: Vec<Key> = next.take(LOOKED_AT).collect();
        // At the end it begins anew the next time.
        self.drained_at = next.last().copied().filter(|_| next.len() == LOOKED_AT);
        self.drain(next.into_iter());
    }

    pub(super) fn drain(&mut self, keys: impl Iterator<Item = Key>) {
        for key in keys {
            if !self.draining.contains_key(&key) {
                continue;
            }
            if let Err(error) = self.drain_one(key) {
                let error = crate::switch::with_sources(&error);
                tracing::debug!(%key, %error, "Cannot look after real servers that shall go");
            }
        }
    }

    fn drain_one(&mut self, key: Key) -> Result<(), keelson_netlink::ipvs::IpvsError> {
        let found = self.kernel.reals(key)?;
        let Some(draining) = self.draining.get_mut(&key) else { return Ok(()) };
        let mut commands = Vec::new();
        draining.retain(|at| match found.iter().find(|found| found.real.at == *at) {
            Some(found) if found.connections > 0 && found.real.weight == 0 => true,
            Some(found) if found.real.weight == 0 => {
                commands.push(Command::RemoveReal(key, *at));
                false
            }
            // Gone, or in use again.
            _ => false,
        });
        if draining.is_empty() {
            self.draining.remove(&key);
        }
        if commands.len() == found.len() && self.servers.wanted(key).is_none() {
            commands = vec![Command::RemoveVirtual(key)];
        }
        self.kernel.perform(&commands)
    }
}
