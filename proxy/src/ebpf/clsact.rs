//! Programs for packets on kernels before 6.6: filters of each interface, which stay by themselves.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};

use keelson_netlink::netns::Netns;
use keelson_netlink::route::{Direction, Rtnl};
use keelson_netlink::socket::NetlinkError;

use super::attach::{Refused, pin};
use super::error::EbpfError;
use super::programs::Programs;
use super::sys;

/// In the order in which they are attached.
const FILTERS: [(&str, &str, Direction); 2] = [
    ("egress", "keelson-egress", Direction::Egress),
    ("ingress", "keelson-ingress", Direction::Ingress),
];

/// Attaches what is not attached yet, and says how much that was.
pub(super) fn serve(
    netns: &Netns,
    programs: &Programs,
    interfaces: &HashSet<u32>,
    refused: &mut Vec<Refused>,
) -> Result<usize, EbpfError> {
    let mut rtnl = Rtnl::open_in(netns)?;
    let mut operations = 0;
    for (name, filter, direction) in FILTERS {
        let Some(program) = programs.get(name) else { continue };
        let fail =
            |source| EbpfError::Attach { program: name, target: "interfaces".to_owned(), source };
        let number = sys::program_id(program.as_fd()).map_err(fail)?;
        for index in interfaces.iter().copied() {
            match ensure(&mut rtnl, (index, direction, filter), program, number) {
                Ok(changed) => operations += usize::from(changed),
                Err(error) => {
                    refused.push(Refused { program: name, index, error: EbpfError::Filter(error) });
                }
            }
        }
    }
    Ok(operations)
}

fn ensure(
    rtnl: &mut Rtnl,
    (index, direction, filter): (u32, Direction, &str),
    program: &OwnedFd,
    number: u32,
) -> Result<bool, NetlinkError> {
    let found = rtnl.classifiers(index, direction)?;
    if found.iter().any(|found| found.ours && found.program == number) {
        return Ok(false);
    }
    rtnl.set_classifier(index, direction, program.as_fd(), filter).map(|()| true)
}

/// What is not attached to these interfaces.
pub(crate) fn missing(rtnl: &mut Rtnl, interfaces: impl Iterator<Item = u32>) -> Vec<String> {
    let mut missing = Vec::new();
    for index in interfaces {
        for (name, _, direction) in FILTERS {
            let found = rtnl.classifiers(index, direction);
            if !found.is_ok_and(|found| found.iter().any(|found| found.ours)) {
                missing.push(pin(name, index));
            }
        }
    }
    missing
}

/// Takes the programs away from all interfaces of that namespace.
pub(crate) fn remove(rtnl: &mut Rtnl) -> Result<(), NetlinkError> {
    for link in rtnl.links()? {
        for (_, _, direction) in FILTERS {
            rtnl.remove_classifier(link.index, direction)?;
        }
    }
    Ok(())
}
