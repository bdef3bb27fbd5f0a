//! What can go wrong with IPVS.

use nix::errno::Errno;

use crate::socket::NetlinkError;

/// An error of the IPVS interface.
#[derive(Debug, thiserror::Error)]
pub enum IpvsError {
    /// No generic netlink.
    #[error("cannot open a generic netlink socket")]
    Open(#[source] NetlinkError),
    /// The kernel has no IPVS.
    #[error(
        "this kernel has no IPVS: load the module ip_vs or use a kernel that has it (CONFIG_IP_VS)"
    )]
    Absent,
    /// The right is missing.
    #[error("IPVS refuses to {action}: CAP_NET_ADMIN is missing")]
    Forbidden {
        /// What was asked.
        action: String,
    },
    /// The kernel refused a request.
    #[error("IPVS refuses to {action}")]
    Refused {
        /// What was asked.
        action: String,
        /// Why not.
        #[source]
        source: NetlinkError,
    },
}

impl IpvsError {
    pub(super) fn refused(action: String, source: NetlinkError) -> Self {
        match source.errno() {
            Some(Errno::EPERM) => Self::Forbidden { action },
            _ => Self::Refused { action, source },
        }
    }

    /// The error number, where the kernel gave one.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { source, .. } => source.errno(),
            Self::Forbidden { .. } => Some(Errno::EPERM),
            Self::Open(_) | Self::Absent => None,
        }
    }

    /// Something is there already, or not there: the kernel has something else than was thought.
    #[must_use]
    pub fn is_out_of_step(&self) -> bool {
        matches!(self.errno(), Some(Errno::EEXIST | Errno::ENOENT | Errno::ESRCH))
    }
}
