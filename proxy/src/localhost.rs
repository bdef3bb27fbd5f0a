//! What the kernel needs so that node ports answer on 127.0.0.1, and how it is given back.

use keelson_netlink::netns::{Netns, NetnsError};
use keelson_netlink::sysctl::{self, SysctlError};

/// Lets packets from 127.0.0.1 leave through real interfaces, translated.
const SETTING: &str = "net/ipv4/conf/all/route_localnet";
const OFF: &str = "0";
/// To the kernel, on is whatever is not 0. Who else switches it on writes 1: so this says that it was us, as
/// long as it matters, and nobody has to remember it. (The proxy's routing table has this number, too.)
const ON_BY_US: &str = "27493";

/// The setting cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LocalhostError {
    #[error(transparent)]
    Setting(#[from] SysctlError),
    #[error(transparent)]
    Namespace(#[from] NetnsError),
}

/// Switches it on where node ports on 127.0.0.1 are wanted; whoever calls this also keeps strangers from
/// sending there (CVE-2020-8558). Where they are not, it is given back.
pub(crate) fn arrange(netns: &Netns, wanted: bool) {
    let done = match wanted {
        true => replace(netns, OFF, ON_BY_US),
        false => give_back(netns),
    };
    match done {
        Ok(()) => {}
        Err(error) if wanted => {
            tracing::warn!(%error, "Node ports will not answer on 127.0.0.1");
        }
        Err(error) => tracing::warn!(%error, "The node still routes packets to 127.0.0.1"),
    }
}

/// Switches it off if it was us who switched it on.
pub(crate) fn give_back(netns: &Netns) -> Result<(), LocalhostError> {
    replace(netns, ON_BY_US, OFF)
}

fn replace(netns: &Netns, from: &'static str, to: &'static str) -> Result<(), LocalhostError> {
    netns.run(|| match sysctl::read(SETTING)? {
        value if value == from => Ok(sysctl::write(SETTING, to)?),
        _ => Ok(()),
    })?
}
