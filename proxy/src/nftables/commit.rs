//! From operations to transactions.

use keelson_netlink::nft::Batch;

use super::error::is_out_of_step;
use super::transaction::{Operations, encode};
use super::{Nftables, NftablesError, Pending, Programmed};
use crate::backend::Applied;
use crate::model::{Family, ServiceKey};

/// Small enough that nobody waits long for the kernel's lock, large enough to be quick.
pub(super) const OPERATIONS_PER_TRANSACTION: usize = 8192;
/// Transactions up to this size are watched by our own monitor, larger ones are not: their announcements
/// would overflow its buffer, and that looks like a foreign change.
const ANNOUNCED_OPERATIONS: usize = 128;

impl Nftables {
    pub(super) fn commit_if_full(
        &mut self,
        waiting: &mut Vec<Pending>,
        applied: &mut Applied,
    ) -> Result<(), NftablesError> {
        let operations: usize = waiting.iter().map(|pending| pending.operations.len()).sum();
        if operations < OPERATIONS_PER_TRANSACTION {
            return Ok(());
        }
        self.commit_all(waiting, applied)
    }

    /// Sends one transaction; only then its Services count as programmed. When the kernel refuses it,
    /// each Service is tried alone, so that one that cannot be programmed does not hold up the others.
    pub(super) fn commit_all(
        &mut self,
        waiting: &mut Vec<Pending>,
        applied: &mut Applied,
    ) -> Result<(), NftablesError> {
        let waiting: Vec<Pending> = std::mem::take(waiting);
        let committed = self.commit(waiting.iter().map(|pending| &pending.operations));
        if committed.is_err() {
            self.note_failure(&waiting);
        }
        match committed {
            Ok(operations) => {
                applied.operations += operations;
                waiting.into_iter().for_each(|pending| self.settle(pending.service, pending.after));
            }
            Err(error) if is_out_of_step(&error) && !self.isolating => return Err(error),
            Err(error) if waiting.len() == 1 => {
                let refused = waiting.into_iter().next();
                applied.refused.extend(refused.map(|pending| {
                    self.settle(pending.service.clone(), pending.before);
                    (pending.service, error.into())
                }));
            }
            Err(_) => {
                for pending in waiting {
                    self.commit_all(&mut vec![pending], applied)?;
                }
            }
        }
        Ok(())
    }

    /// Counts a refused transaction for the families that it was about.
    fn note_failure(&mut self, waiting: &[Pending]) {
        let operations = || waiting.iter().map(|pending| &pending.operations);
        let items = || operations().flat_map(|o| o.deletes.iter().chain(&o.adds));
        for family in Family::BOTH {
            let concerned = items().any(|item| item.family == family);
            self.figures.of_mut(family).failures += u64::from(concerned);
        }
    }

    fn commit<'o>(
        &mut self,
        parts: impl IntoIterator<Item = &'o Operations>,
    ) -> Result<usize, NftablesError> {
        let (batch, new_chains) = encode(parts, &self.chains, &self.setup);
        let operations = batch.operations();
        self.send(batch)?;
        self.chains.extend(new_chains);
        Ok(operations)
    }

    fn settle(&mut self, service: ServiceKey, programmed: Option<Programmed>) {
        if let Some(programmed) = programmed {
            self.programmed.insert(service, programmed);
        }
    }

    /// Commits. Our own monitor need not hear of a big transaction: the kernel would have to describe
    /// every element of it; instead the generation tells whether somebody else came in between.
    pub(super) fn send(&mut self, batch: Batch) -> Result<(), NftablesError> {
        if batch.operations() <= ANNOUNCED_OPERATIONS {
            return self.nft.commit(batch).map_err(NftablesError::Apply);
        }
        let before = self.nft.generation().map_err(NftablesError::Observe)?;
        self.monitor.pause().map_err(NftablesError::Watch)?;
        let result = self.nft.commit(batch).map_err(NftablesError::Apply);
        self.monitor.resume().map_err(NftablesError::Watch)?;
        let after = self.nft.generation().map_err(NftablesError::Observe)?;
        self.suspicious |= result.is_ok() && after != before.wrapping_add(1);
        result
    }
}
