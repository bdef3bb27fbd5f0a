//! Whose a socket is that has no address yet: programs know its network namespace, people the pod's address.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use keelson_netlink::netns::{self, Netns};
use keelson_netlink::route::Rtnl;

use super::decision::From;
use crate::ebpf::own_cookie;

/// Namespaces that came meanwhile are looked for at most that often: it takes a thread for each.
const AGAIN: Duration = Duration::from_secs(1);

/// As many namespaces that ended may be remembered.
const ENDED: usize = 1000;

/// Network namespaces by their cookie.
pub(super) struct Sockets {
    /// Where namespaces are pinned, beside those that a process lives in.
    folders: Vec<PathBuf>,
    /// Cookie of the node's own.
    node: u64,
    addresses: HashMap<u64, Vec<IpAddr>>,
    looked: Option<Instant>,
}

impl Sockets {
    pub(super) fn of_node(node: u64, folders: Vec<PathBuf>) -> Self {
        Sockets { folders, node, addresses: HashMap::new(), looked: None }
    }

    /// Who speaks to an address of that family.
    pub(super) fn owner(&mut self, cookie: u64, is_v4: bool, now: Instant) -> From {
        if cookie == self.node {
            return From::Node;
        }
        let long_ago = |at: Instant| now.saturating_duration_since(at) >= AGAIN;
        if !self.addresses.contains_key(&cookie) && self.looked.is_none_or(long_ago) {
            self.look();
            self.looked = Some(now);
        }
        let addresses = self.addresses.get(&cookie);
        let address = addresses.and_then(|all| all.iter().find(|ip| ip.is_ipv4() == is_v4));
        address.map_or(From::Namespace(cookie), |address| From::Pod(*address))
    }

    fn look(&mut self) {
        let folders: Vec<&Path> = self.folders.iter().map(PathBuf::as_path).collect();
        let mut existing = HashSet::new();
        for netns in netns::existing(&folders) {
            // One that ends meanwhile is nobody's any more.
            let Ok(cookie) = own_cookie(&netns) else { continue };
            existing.insert(cookie);
            self.addresses.entry(cookie).or_insert_with(|| addresses(&netns));
        }
        // Those that ended are kept for their last events, but not for ever.
        if self.addresses.len() > existing.len() + ENDED {
            self.addresses.retain(|cookie, _| existing.contains(cookie));
        }
    }
}

/// Those that others can answer to.
fn addresses(netns: &Netns) -> Vec<IpAddr> {
    let found = Rtnl::open_in(netns).ok().and_then(|mut rtnl| rtnl.addresses(None).ok());
    let all = found.into_iter().flatten().map(|address| address.network.ip());
    all.filter(|ip| match ip {
        IpAddr::V4(ip) => !ip.is_loopback(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    })
    .collect()
}
