//! What can go wrong in this mode.

use keelson_netlink::netns::NetnsError;
use keelson_netlink::nft::NftError;

/// An error of the nftables backend.
#[derive(Debug, thiserror::Error)]
pub enum NftablesError {
    #[error("cannot read the proxy's nftables table")]
    Observe(#[source] NftError),
    #[error("cannot change the proxy's nftables table")]
    Apply(#[source] NftError),
    #[error("cannot watch the ruleset")]
    Watch(#[source] NftError),
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    #[error("cannot connect to nf_tables")]
    Open(#[source] NftError),
    #[error("this kernel's nf_tables lacks something that Services need")]
    Probe(#[source] NftError),
}

/// True when the kernel has something else than we think: absent what we change, or present already.
pub(crate) fn is_out_of_step(error: &NftablesError) -> bool {
    let NftablesError::Apply(source) = error else { return false };
    matches!(source.errno(), Some(libc::ENOENT | libc::EEXIST | libc::EBUSY))
}
