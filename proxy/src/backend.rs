//! The only place that knows how many backends there are.

use std::os::fd::BorrowedFd;

use crate::diff::{Change, Plans};
use crate::model::ServiceKey;
use crate::nftables::{Nftables, NftablesError};

/// Programs plans into one kernel interface. Knows no Service semantics: those live in `model`.
///
/// Calls block and belong on a thread of their own.
pub trait Backend {
    /// Reads what the kernel has and makes it equal to `plans`, touching only what differs.
    ///
    /// This is the start, the repair after a crash, and the answer to foreign changes.
    fn adopt(&mut self, plans: &Plans) -> Result<Applied, BackendError>;

    /// Puts changes in force, each Service's change at one moment. `plans` is everything that is to be
    /// in force, changes included: for the case that the kernel turns out to be in another state.
    fn apply(&mut self, changes: &[Change], plans: &Plans) -> Result<Applied, BackendError>;

    /// Readable when somebody changed the kernel's tables.
    fn alarm(&self) -> BorrowedFd<'_>;

    /// Reads the alarm: true when what we programmed may have been changed by others.
    fn disturbed(&mut self) -> Result<bool, BackendError>;

    /// Removes everything that the backend ever made.
    fn cleanup(&mut self) -> Result<(), BackendError>;
}

/// What a call to a backend did.
#[derive(Debug, Default)]
pub struct Applied {
    /// Kernel objects added or removed.
    pub operations: usize,
    /// Services that the kernel refused; everything else is in force.
    pub refused: Vec<(ServiceKey, BackendError)>,
}

/// An error of a backend.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error(transparent)]
    Nftables(#[from] NftablesError),
}

/// The backends that exist.
pub enum AnyBackend {
    Nftables(Nftables),
}

impl Backend for AnyBackend {
    fn adopt(&mut self, plans: &Plans) -> Result<Applied, BackendError> {
        match self {
            AnyBackend::Nftables(backend) => backend.adopt(plans),
        }
    }

    fn apply(&mut self, changes: &[Change], plans: &Plans) -> Result<Applied, BackendError> {
        match self {
            AnyBackend::Nftables(backend) => backend.apply(changes, plans),
        }
    }

    fn alarm(&self) -> BorrowedFd<'_> {
        match self {
            AnyBackend::Nftables(backend) => backend.alarm(),
        }
    }

    fn disturbed(&mut self) -> Result<bool, BackendError> {
        match self {
            AnyBackend::Nftables(backend) => backend.disturbed(),
        }
    }

    fn cleanup(&mut self) -> Result<(), BackendError> {
        match self {
            AnyBackend::Nftables(backend) => backend.cleanup(),
        }
    }
}
