//! What can go wrong in this mode.

use keelson_netlink::netns::NetnsError;
use keelson_netlink::socket::NetlinkError;

use crate::nftables::NftablesError;

/// An error of the IPVS backend.
#[derive(Debug, thiserror::Error)]
pub enum IpvsError {
    #[error("cannot connect to IPVS")]
    Open(#[source] keelson_netlink::ipvs::IpvsError),
    #[error("the kernel has no IPVS scheduler {scheduler}: load the module ip_vs_{scheduler}")]
    Scheduler {
        scheduler: String,
        #[source]
        source: keelson_netlink::ipvs::IpvsError,
    },
    #[error("cannot read the virtual servers")]
    Observe(#[source] keelson_netlink::ipvs::IpvsError),
    #[error("cannot change the virtual servers")]
    Apply(#[source] keelson_netlink::ipvs::IpvsError),
    #[error("the nftables table beside IPVS")]
    Table(#[from] NftablesError),
    #[error("cannot lead packets to IPVS by routing rules")]
    Routing(#[source] NetlinkError),
    #[error("cannot wait for changes")]
    Alarm(#[source] nix::errno::Errno),
    #[error(transparent)]
    Namespace(#[from] NetnsError),
}
