//! The program at XDP: at which interfaces it is, and how. It forwards frames of connections that the programs for packets
//! know; without it they do that.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::AsFd;

use keelson_ebpf_abi::{XDP_SENDS, XdpInterface};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::{Link, Route, Rtnl};
use serde::{Deserialize, Serialize};

use super::attach::Links;
use super::config::EbpfConfig;
use super::error::EbpfError;
use super::follow::replace;
use super::maps::Maps;
use super::node::has_default_route;
use super::programs::Programs;
use super::refusals::Refusals;
use super::sys;

const PROGRAM: &str = "forward";
/// How often it is asked whether neighbours are still there.
const CHECK_EVERY_NS: u64 = 30_000_000_000;

/// Whether frames are forwarded at XDP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum XdpChoice {
    /// No.
    #[default]
    Off,
    /// By the interface's driver where that can do it, else by the kernel.
    Auto,
    /// By the driver only.
    Native,
    /// By the kernel, before it looks at packets.
    Generic,
}

/// Who runs the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Native,
    Generic,
}

impl How {
    /// `XDP_FLAGS_DRV_MODE`, `XDP_FLAGS_SKB_MODE`.
    fn flags(self) -> u32 {
        match self {
            How::Native => 4,
            How::Generic => 2,
        }
    }

    fn pin(self, index: u32) -> String {
        match self {
            How::Native => format!("xdp_native-{index}"),
            How::Generic => format!("xdp_generic-{index}"),
        }
    }

    fn interface(self, link: [u8; 6]) -> XdpInterface {
        // Not every driver takes frames from another one, and those that it does not take are lost.
        let flags = if self == How::Generic { XDP_SENDS } else { 0 };
        XdpInterface { link, flags }
    }
}

/// An interface that shall have the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    index: u32,
    name: String,
    link: [u8; 6],
    /// The best first.
    ways: &'static [How],
}

/// The interfaces that shall have the program: those that are named, else those that a default route leaves by.
pub(crate) fn wanted(config: &EbpfConfig, links: &[Link], routes: &[Route]) -> Vec<Wanted> {
    let serves = |link: &Link| match &*config.xdp_interfaces {
        [] => has_default_route(link, routes),
        names => names.contains(&link.name),
    };
    // Frames at a port of a bridge or bond are the bridge's.
    let usable = links.iter().filter(|link| !link.loopback && link.master.is_none());
    usable
        .filter(|link| serves(link))
        .filter_map(|link| {
            let Link { index, name, mac, .. } = link;
            Some(Wanted {
                index: *index,
                name: name.clone(),
                link: (*mac)?.0,
                ways: ways(config.xdp, link),
            })
        })
        .filter(|wanted| !wanted.ways.is_empty())
        .collect()
}

fn ways(choice: XdpChoice, link: &Link) -> &'static [How] {
    match choice {
        XdpChoice::Off => &[],
        XdpChoice::Native => &[How::Native],
        // What a veth's driver sends is lost unless the other end has a program as well, which cannot be seen from here.
        XdpChoice::Auto if link.kind.as_deref() == Some("veth") => &[How::Generic],
        XdpChoice::Auto => &[How::Native, How::Generic],
        XdpChoice::Generic => &[How::Generic],
    }
}

/// The interfaces that have the program.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    served: BTreeMap<u32, How>,
    /// Interfaces of which it was said that they cannot have it.
    told: HashSet<u32>,
    /// By the monotonic clock.
    check_again_ns: u64,
}

impl Frames {
    /// Attaches the program where it is not yet, and says how much had to be done.
    pub(crate) fn serve(
        &mut self,
        (links, programs, maps): (&Links, &Programs, &Maps),
        netns: &Netns,
        all: &[Wanted],
        refusals: &mut Refusals,
    ) -> Result<usize, EbpfError> {
        let mut operations = 0;
        let mut interfaces = BTreeMap::new();
        let before = std::mem::take(&mut self.served);
        for wanted in all {
            // Only one way at a time is possible.
            let other = |name: &str| {
                let is = |how: &How| how.pin(wanted.index) == name;
                [How::Native, How::Generic].iter().any(is) && !wanted.ways.iter().any(is)
            };
            operations += links.remove_where(other);
            match attach(wanted, links, programs, netns) {
                Ok((how, changed)) => {
                    operations += usize::from(changed);
                    self.served.insert(wanted.index, how);
                    interfaces.insert(wanted.index, how.interface(wanted.link));
                    self.told.remove(&wanted.index);
                    if before.get(&wanted.index) != Some(&how) {
                        tracing::info!(interface = wanted.name, mode = ?how, "XDP forwards known connections");
                    }
                }
                Err(error) => self.refused(wanted, &error),
            }
        }
        operations += links.remove_where(|name| name.starts_with("xdp_") && !self.has(name));
        let found = maps.xdp_interfaces.read()?.into_iter().collect();
        let name = |index: &u32| format!("interface {index}");
        let table = &maps.xdp_interfaces;
        Ok(operations + replace(table, &found, &mut interfaces, name, refusals))
    }

    fn refused(&mut self, wanted: &Wanted, error: &io::Error) {
        if !self.told.insert(wanted.index) {
            return;
        }
        let taken = matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST));
        let why =
            if taken { "somebody else's program is there".to_owned() } else { error.to_string() };
        tracing::warn!(interface = wanted.name, why, "No XDP: its packets are forwarded at tc");
    }

    /// Has the kernel ask, now and then, whether neighbours are still where they were. By itself it does that only when
    /// it sends to them, and the program sends past it.
    pub(crate) fn check_neighbours(&mut self, netns: &Netns, now_ns: u64) -> Result<(), EbpfError> {
        if self.served.is_empty() || now_ns < self.check_again_ns {
            return Ok(());
        }
        self.check_again_ns = now_ns.saturating_add(CHECK_EVERY_NS);
        let mut rtnl = Rtnl::open_in(netns)?;
        for neighbour in rtnl.neighbours().map_err(EbpfError::Observe)? {
            if neighbour.stale && self.served.contains_key(&neighbour.link) {
                rtnl.check_neighbour(neighbour.link, neighbour.address)
                    .map_err(EbpfError::Observe)?;
            }
        }
        Ok(())
    }

    /// The pins that must be there.
    pub(crate) fn pins(&self) -> impl Iterator<Item = String> {
        self.served.iter().map(|(index, how)| how.pin(*index))
    }

    pub(crate) fn has(&self, pin: &str) -> bool {
        self.pins().any(|served| served == pin)
    }
}

/// Attaches the program in the way that is in use, else in the best one that works.
fn attach(
    wanted: &Wanted,
    links: &Links,
    programs: &Programs,
    netns: &Netns,
) -> io::Result<(How, bool)> {
    let program = programs.get(PROGRAM).ok_or(io::ErrorKind::NotFound)?;
    let index = wanted.index;
    let in_use = wanted.ways.iter().find(|how| links.works(&how.pin(index)));
    let ways = in_use.map_or(wanted.ways, std::slice::from_ref);
    let mut refused = io::ErrorKind::Unsupported.into();
    for how in ways {
        let create = || sys::create_xdp_link(program.as_fd(), index, how.flags());
        let create = || netns.run(create).map_err(io::Error::other)?;
        match links.ensure(&how.pin(index), program, index.into(), create) {
            Ok(changed) => return Ok((*how, changed)),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

#[cfg(test)]
mod tests {
    use keelson_netlink::route::Mac;

    use super::*;

    fn link(index: u32, name: &str, kind: Option<&str>) -> Link {
        Link {
            index,
            name: name.to_owned(),
            mac: Some(Mac([2, 0, 0, 0, 0, 1])),
            mtu: 1500,
            up: true,
            running: true,
            loopback: false,
            kind: kind.map(str::to_owned),
            alias: None,
            peer: None,
            peer_netns: None,
            master: None,
        }
    }

    fn names(config: &EbpfConfig, links: &[Link]) -> Vec<(String, &'static [How])> {
        let route = Route::default_via("192.0.2.1".parse().unwrap(), 2);
        let wanted = wanted(config, links, &[route]);
        wanted.into_iter().map(|wanted| (wanted.name, wanted.ways)).collect()
    }

    #[test]
    fn the_default_routes_interface_is_served_unless_others_are_named() {
        let links = [link(2, "eth0", None), link(3, "eth1", None), link(4, "pod", Some("veth"))];
        let mut config = EbpfConfig { xdp: XdpChoice::Auto, ..EbpfConfig::default() };
        let both: &[How] = &[How::Native, How::Generic];
        assert_eq!(names(&config, &links), [("eth0".to_owned(), both)]);
        config.xdp_interfaces = vec!["eth1".to_owned(), "eth7".to_owned()];
        assert_eq!(names(&config, &links), [("eth1".to_owned(), both)]);
        config.xdp = XdpChoice::Off;
        assert_eq!(names(&config, &links), []);
    }

    #[test]
    fn ports_of_a_bridge_and_tunnels_are_not_served() {
        let port = Link { master: Some(9), ..link(2, "eth0", None) };
        let tunnel = Link { mac: None, ..link(2, "eth0", None) };
        let config = EbpfConfig { xdp: XdpChoice::Auto, ..EbpfConfig::default() };
        assert_eq!(names(&config, &[port, tunnel]), []);
    }

    #[test]
    fn the_driver_of_a_veth_is_taken_only_when_asked_for() {
        let links = [link(2, "eth0", Some("veth"))];
        for (xdp, ways) in [
            (XdpChoice::Auto, &[How::Generic][..]),
            (XdpChoice::Native, &[How::Native]),
            (XdpChoice::Generic, &[How::Generic]),
        ] {
            let config = EbpfConfig { xdp, ..EbpfConfig::default() };
            assert_eq!(names(&config, &links), [("eth0".to_owned(), ways)]);
        }
    }
}
