//! What the verbs need of the system, with its refusals in CNI's words.

use std::path::PathBuf;

use ipnetwork::IpNetwork;
use keelson_netlink::nft::{Nft, NftError};
use keelson_netlink::route::Rtnl;
use keelson_netlink::sysctl::{self, SysctlError};

use crate::config::Network;
use crate::error::{CniError, chain, code};
use crate::journal::{Journal, JournalError};
use crate::wire::WireError;

pub(super) fn enable_forwarding(pods: &[IpNetwork]) -> Result<(), CniError> {
    let failed =
        |e: SysctlError| CniError::new(code::NETWORK, "cannot switch forwarding on").caused_by(&e);
    if pods.iter().any(IpNetwork::is_ipv4) {
        sysctl::ensure("net/ipv4/ip_forward", "1").map_err(failed)?;
    }
    const FORWARDING_V6: &str = "net/ipv6/conf/all/forwarding";
    if pods.iter().any(IpNetwork::is_ipv6) && sysctl::read(FORWARDING_V6).map_err(failed)? != "1" {
        keep_router_advertisements();
        sysctl::write(FORWARDING_V6, "1").map_err(failed)?;
    }
    Ok(())
}

/// A node that forwards no longer listens to routers unless told so (accept_ra = 2), and would lose the default route
/// that it has from them.
fn keep_router_advertisements() {
    let links = std::fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten();
    for link in links {
        let key = format!("net/ipv6/conf/{}/accept_ra", link.file_name().to_string_lossy());
        if sysctl::read(&key).is_ok_and(|value| value == "1") {
            // A link that goes away meanwhile needs no setting.
            sysctl::write(&key, "2").ok();
        }
    }
}

pub(super) fn rtnl() -> Result<Rtnl, CniError> {
    Rtnl::open().map_err(|e| {
        CniError::new(code::NETWORK, "cannot talk to the kernel's routing").caused_by(&e)
    })
}

pub(super) fn nft() -> Result<Nft, CniError> {
    Nft::open().map_err(packet_filter)
}

pub(super) fn open_journal(network: &Network) -> Result<Journal, CniError> {
    Journal::open(&network.folder(), network.lock_timeout).map_err(journal_error)
}

pub(super) fn boot_id() -> Result<String, CniError> {
    let path = PathBuf::from("/proc/sys/kernel/random/boot_id");
    std::fs::read_to_string(&path).map(|text| text.trim().to_owned()).map_err(|e| {
        CniError::new(code::IO, format!("cannot read {}", path.display())).caused_by(&e)
    })
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn journal_error(error: JournalError) -> CniError {
    let code = if matches!(error, JournalError::Busy { .. }) { code::TRY_AGAIN } else { code::IO };
    CniError::new(code, "cannot use the record of addresses").with_details(chain(&error))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn kernel(error: WireError) -> CniError {
    let code = if matches!(error, WireError::InterfaceExists { .. }) {
        code::EXISTS
    } else {
        code::NETWORK
    };
    CniError::new(code, "cannot connect the pod").with_details(chain(&error))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn packet_filter(error: NftError) -> CniError {
    CniError::new(
        code::NETWORK,
        "cannot set up address translation (does this kernel have nftables with NAT?)",
    )
    .with_details(chain(&error))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn port_error(error: NftError) -> CniError {
    CniError::new(code::NETWORK, "a port of the node is taken or cannot be opened")
        .with_details(chain(&error))
}
